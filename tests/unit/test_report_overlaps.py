"""The figures of φ(i, j): contents of cells, grey cells, order of matrices."""

import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import pairwise

import pytest
import torch

from brushstroke.adapter import Adapter
from brushstroke.analysis import random_pair, subspace
from brushstroke.lowrank import LowRank
from brushstroke.report.analysis import overlap_page
from brushstroke.report.charts import choices, overlaps
from brushstroke.report.figures import GREY, HOT
from brushstroke.report.overlaps import CHOICES, overlap_records
from brushstroke.studies.page import file_name
from brushstroke.studies.tables import overlap_figures

pytest.importorskip("altair")
vl_convert = pytest.importorskip("vl_convert")

PLACES = ("mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
NAMES = ("q_proj", "v_proj")
ROUNDED = 0.0006  # a figure carries three digits
BYTE = 1.5  # of a colour's channel


def adapter(rank: int, seed: int, d: int = 12, h: int = 20, **ranks: int) -> Adapter:
    """An adapter of one rank, except for the named matrices."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            f"model.layers.{layer}.{place}": LowRank(
                torch.randn(d, r, generator=generator), torch.randn(r, h, generator=generator)
            )
            for layer in range(2)
            for place in PLACES
            for r in [ranks.get(place.rpartition(".")[2], rank)]
        }
    )


@cache
def rendered(spec: str) -> str:
    return vl_convert.vegalite_to_svg(json.loads(spec))


def svg_of(spec) -> ElementTree.Element:
    return ElementTree.fromstring(rendered(json.dumps(spec)))


def words_of(spec) -> list[str]:
    texts = [element for element in svg_of(spec).iter() if element.tag.endswith("text")]
    return [word for element in texts for word in element.itertext()]


def cells_of(spec) -> dict[str, dict[tuple[int, int], tuple[float, str, tuple[float, float]]]]:
    """Panel → (i, j) → (φ, colour, corner on the drawing), as the SVG draws them."""
    found: dict = {}

    def walk(element, x, y):
        moved = re.match(r"translate\(([-\d.e]+),([-\d.e]+)\)", element.get("transform", ""))
        if moved:
            x, y = x + float(moved[1]), y + float(moved[2])
        label = dict(re.findall(r"(panel|i|j|phi): ([^;]+)", element.get("aria-label", "")))
        if len(label) == 4:
            at = re.match(r"M([-\d.]+),([-\d.]+)", element.get("d"))
            place = (round(x + float(at[1]), 1), round(y + float(at[2]), 1))
            cell = (int(label["i"]), int(label["j"]))
            found.setdefault(label["panel"], {})[cell] = (
                float(label["phi"]),
                element.get("fill"),
                place,
            )
        for child in element:
            walk(child, x, y)

    walk(svg_of(spec), 0.0, 0.0)
    return found


def rgb(color: str) -> list[float]:
    if color.startswith("#"):
        return [float(int(color[at : at + 2], 16)) for at in (1, 3, 5)]
    return [float(part) for part in re.findall(r"[\d.]+", color)]


def drawn(found, side="left", corner=True, swapped=()):
    records = overlap_records(found, side, swapped=swapped)
    return overlaps(records, x_title="j", y_title="i", measure="ΔW", choose=CHOICES, corner=corner)


def test_cells_are_placed_as_in_the_paper():
    """φ(i, j) with i of the smaller rank downwards, j across: q beside v, corners grey where j > i."""
    found = subspace(adapter(3, 1), adapter(7, 2))
    panels = cells_of(drawn(found))
    assert list(panels) == [
        *("q_proj", "v_proj", "random pair"),
        *("q_proj, lower-left corner", "v_proj, lower-left corner"),
    ]
    shown = [found[f"model.layers.0.self_attn.{name}"].left for name in NAMES]
    shades: dict[str, list[tuple[float, float]]] = {"whole": [], "corner": []}
    for name, grid in zip(NAMES, shown, strict=True):
        whole, corner = panels[name], panels[f"{name}, lower-left corner"]
        assert set(whole) == {(i, j) for i in range(1, 4) for j in range(1, 8)}
        assert set(corner) == {(i, j) for i in range(1, 4) for j in range(1, 4)}
        for kind, cells in (("whole", whole), ("corner", corner)):
            for (i, j), (phi, color, (x, y)) in cells.items():
                assert phi == pytest.approx(float(grid[i - 1, j - 1]), abs=ROUNDED)
                if kind == "corner" and j > i:
                    assert rgb(color) == rgb(GREY)
                else:
                    shades[kind].append((phi, rgb(color)[0]))
                assert y > cells[i - 1, j][2][1] if i > 1 else y == cells[1, 1][2][1]
                assert x > cells[i, j - 1][2][0] if j > 1 else x == cells[1, 1][2][0]
    for one in shades.values():
        one.sort()
        assert all(more <= less + BYTE for (_, less), (_, more) in pairwise(one))  # the darker, the larger
        assert one[0][1] - one[-1][1] > 50
    assert shades["corner"][-1][1] == pytest.approx(rgb(HOT)[0], abs=BYTE)
    drawn_cells = [cell for name in (*NAMES, "random pair") for cell in panels[name].values()]
    assert rgb(max(drawn_cells)[1]) == pytest.approx(rgb(HOT), abs=BYTE)
    beside = [panels[name][1, 1][2] for name in ("q_proj", "v_proj", "random pair")]
    assert len({y for _, y in beside}) == 1
    assert beside[0][0] < beside[1][0] < beside[2][0]
    step = panels["q_proj, lower-left corner"]
    assert step[1, 2][2][0] - step[1, 1][2][0] > panels["q_proj"][1, 2][2][0] - panels["q_proj"][1, 1][2][0]


def test_the_smaller_rank_is_counted_downwards_whichever_comes_first():
    small, large = adapter(3, 1), adapter(7, 2)
    page = overlap_page(subspace(large, small), ("large", "small")).html()
    assert '"i, small"' in page
    assert '"j, large"' in page
    found = subspace(large, small)
    turned = cells_of(drawn(found, swapped=found))
    straight = cells_of(drawn(subspace(small, large)))
    for name in ("q_proj", "v_proj, lower-left corner"):
        assert {at: cell[0] for at, cell in turned[name].items()} == pytest.approx(
            {at: cell[0] for at, cell in straight[name].items()}, abs=ROUNDED
        )


def test_q_stays_beside_v_if_each_has_the_smaller_rank_in_another_adapter():
    one, two = adapter(4, 1, q_proj=3, v_proj=7), adapter(4, 2, q_proj=7, v_proj=3)
    found = subspace(one, two)
    page = overlap_page(found, ("one", "two")).html()
    assert page.count('"options":["q_proj and v_proj","o_proj and k_proj","up_proj"]') == 2  # two sides
    assert '"i, the smaller rank"' in page
    assert "At equal ranks, i counts one." in page
    v = "model.layers.0.self_attn.v_proj"
    cells = cells_of(drawn(found, swapped=[v]))["v_proj"]
    assert {at: cell[0] for at, cell in cells.items()} == pytest.approx(
        {(i, j): float(found[v].left[j - 1, i - 1]) for i in range(1, 4) for j in range(1, 8)}, abs=ROUNDED
    )


def test_equal_ranks_are_drawn_in_full():
    found = subspace(adapter(4, 1), adapter(4, 2))
    panels = cells_of(drawn(found, corner=False))
    assert list(panels) == ["q_proj", "v_proj", "random pair"]
    assert all(rgb(cell[1]) != rgb(GREY) for cells in panels.values() for cell in cells.values())
    page = overlap_page(found, ("one", "two")).html()
    assert 'lower-left corner"' not in page


def test_only_matrices_of_unequal_ranks_have_a_corner():
    found = subspace(adapter(4, 1), adapter(4, 2, q_proj=7))
    assert list(cells_of(drawn(found))) == [
        *("q_proj", "v_proj", "random pair, q_proj", "random pair, v_proj"),
        "q_proj, lower-left corner",
    ]


def test_the_scale_ends_at_the_largest_value_and_marks_chance():
    found = subspace(adapter(3, 1), adapter(7, 2))
    words = words_of(drawn(found))
    assert "chance, φ(3, 7): 0.583" in words  # of 12 dimensions
    assert "chance, φ(3, 3): 0.250" in words


def test_corners_have_a_scale_of_their_own():
    """At 8×64 the whole grids go up to values that would leave the corners without a difference to see."""
    found = subspace(adapter(8, 1, 80, 80), adapter(64, 2, 80, 80))
    spec = drawn(found)
    panels = cells_of(spec)
    grids = [found[f"model.layers.0.self_attn.{name}"].left for name in NAMES]
    shown = [float(grid[i, j]) for grid in grids for i in range(8) for j in range(i + 1)]
    corners = [panels[f"{name}, lower-left corner"] for name in NAMES]
    phi, color, _ = max(cell for cells in corners for (i, j), cell in cells.items() if j <= i)
    assert phi == pytest.approx(max(shown), abs=ROUNDED)
    assert rgb(color) == pytest.approx(rgb(HOT), abs=BYTE)
    words = words_of(spec)
    assert "chance, φ(8, 64): 0.800" in words
    assert "chance, φ(8, 8): 0.100" in words
    assert words.count("φ") == 1
    assert words.count("φ in the corners") == 1
    assert "φ in the corners" not in words_of(drawn(subspace(adapter(4, 1), adapter(4, 2)), corner=False))


def test_q_and_v_come_first_then_o_and_k_then_the_rest():
    spec = drawn(subspace(adapter(3, 1), adapter(7, 2)))
    (menu,) = [param["bind"]["options"] for param in spec["params"] if param["name"] == "chosen_matrices"]
    assert menu == ["q_proj and v_proj", "o_proj and k_proj", "up_proj"]
    assert choices(spec) == {"layer": "0", "matrices": "q_proj and v_proj"}
    words = words_of(spec)
    assert "layer 0, q_proj and v_proj" in words
    assert "φ(i, j), ΔW" in words


def test_matrices_of_different_shapes_have_random_pairs_of_their_own():
    """With grouped keys and values q has 128 outputs and v 64: what chance gives differs by a factor of 2."""
    generator = torch.Generator().manual_seed(0)

    def grouped(rank: int) -> Adapter:
        return Adapter(
            {
                f"model.layers.0.self_attn.{name}": LowRank(
                    torch.randn(128, rank, generator=generator), torch.randn(rank, h, generator=generator)
                )
                for name, h in (("q_proj", 128), ("v_proj", 64))
            }
        )

    found = subspace(grouped(4), grouped(8))
    panels = cells_of(drawn(found, "right", corner=False))
    assert list(panels) == ["q_proj", "v_proj", "random pair, q_proj", "random pair, v_proj"]
    for name in NAMES:
        expected = random_pair(found[f"model.layers.0.self_attn.{name}"], "right")
        assert panels[f"random pair, {name}"][4, 8][0] == pytest.approx(float(expected[3, 7]), abs=ROUNDED)
    assert list(cells_of(drawn(found, "left", corner=False))) == ["q_proj", "v_proj", "random pair"]


def test_captions_and_titles_say_of_what():
    page = overlap_page(subspace(adapter(3, 1), adapter(7, 2)), ("one", "two")).html()
    assert "By layer and matrix: φ of all directions, left." in page
    assert "By layer and matrix: z-score of φ of all directions, left." in page
    assert "Φ" not in page


def test_studies_draw_vectors_of_A_and_of_the_update():
    pair = adapter(3, 1), adapter(7, 2)
    found = {of: subspace(*pair, of=of) for of in ("delta", "U")}
    figures = {one.name: one for one in overlap_figures(found, "ranks", i="i", j="j", corner=True)}
    assert list(figures) == ["ranks-dW-input", "ranks-A", "ranks-dW-output"]
    assert file_name(figures["ranks-A"]) == "ranks-A-layer-0-q_proj-and-v_proj"
    paper = figures["ranks-A"]
    assert "still near its random start" in paper.caption
    words = words_of(paper.spec)
    assert "φ(i, j), the right-singular vectors of A" in words  # a line of the title: a phone cuts none
    grid = found["U"]["model.layers.0.self_attn.q_proj"].left
    cells = cells_of(paper.spec)["q_proj"]
    assert {at: cell[0] for at, cell in cells.items()} == pytest.approx(
        {(i, j): float(grid[i - 1, j - 1]) for i in range(1, 4) for j in range(1, 8)}, abs=ROUNDED
    )


def test_a_grid_of_8_by_64_has_room_for_every_cell():
    sites = (adapter(8, 1, 80, 80), adapter(64, 2, 80, 80))
    cells = cells_of(drawn(subspace(*sites)))["q_proj"]
    assert cells[1, 2][2][0] - cells[1, 1][2][0] >= 4
    assert cells[2, 1][2][1] - cells[1, 1][2][1] >= 14
