"""Text and tables for terminals of any width."""

import io

import pytest
from rich.console import Console

from brushstroke.cli import console as cli_console
from brushstroke.cli.layout import arrange, fit, hang, shorten, wrap

SITES = [f"model.layers.{n}.{m}" for n in range(12) for m in ("self_attn.q_proj", "mlp.down_proj")]
COLUMNS = ["site", "d×h", "rank", "norm", "left chance", "99 %"]
ROWS = [[site, "2048×11008", "16", "0.001234", "0.167", "15"] for site in SITES]


def cells(block):
    return {cell for row in block.rows for cell in row[1:]}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(width):
    return Console(file=Terminal(), width=width, soft_wrap=True, highlight=False, color_system=None)


def printed(console):
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", range(20, 130, 7))
def test_numbers_are_complete_at_any_width(width):
    blocks, gone = arrange(COLUMNS, ROWS, width, ["d×h", "left chance", "99 %"])
    assert gone == ["d×h", "left chance", "99 %"][: len(gone)]
    for block in blocks:
        assert cells(block) <= {cell for row in ROWS for cell in row}
        if width >= 40:
            assert block.width <= width
    heads = [" ".join(head.split("\n")) for block in blocks for head in block.heads]
    assert {*heads, *gone} == set(COLUMNS)


def test_wide_terminal_shows_the_full_table():
    (block,), gone = arrange(COLUMNS, ROWS, 200, ["d×h"])
    assert (block.heads, block.rows, gone) == (COLUMNS, ROWS, [])


def test_table_without_rows_has_headings():
    (block,), gone = arrange(["site", "norm"], [], 80, ["norm"])
    assert (block.heads, block.rows, gone) == (["site", "norm"], [], [])


def test_columns_are_omitted_in_the_stated_order_and_in_groups():
    order = [("rank", "norm"), "d×h", "99 %"]
    reported = [tuple(arrange(COLUMNS, ROWS, width, order)[1]) for width in range(100, 20, -1)]
    steps = [(), ("rank", "norm"), ("rank", "norm", "d×h"), ("rank", "norm", "d×h", "99 %")]
    assert list(dict.fromkeys(reported)) == steps


def test_required_columns_continue_in_a_table_below():
    columns = ["layer, rank99", *(f"mlp.experts.{n}.down_proj" for n in range(9))]
    blocks, gone = arrange(columns, [[str(n), *["13"] * 9] for n in range(3)], 60, ())
    assert gone == []
    assert len(blocks) > 1
    assert all(block.width <= 60 for block in blocks)
    assert [row[0] for row in blocks[-1].rows] == ["0", "1", "2"]
    assert sum(len(block.heads) - 1 for block in blocks) == 9


def test_names_are_shortened_in_the_middle_and_still_differ():
    (block,), _ = arrange(COLUMNS, ROWS, 60, COLUMNS[1:3])
    names = [row[0] for row in block.rows]
    assert len(set(names)) == len(SITES)
    assert any("…" in name for name in names)
    assert all(not name.startswith("…") and not name.endswith("…") for name in names)
    long = [f"{'very.' * 30}{n}.{'long.' * 30}" for n in range(3)]  # nothing can tell these apart
    (block,), _ = arrange(["site", "norm"], [[name, "1.5"] for name in long], 40, ())
    assert block.width <= 40


def test_names_of_wide_letters_are_measured_in_cells():
    assert shorten("模型.层.注意力.查询", 11) == "模…力.查询"
    (block,), _ = arrange(["site", "norm"], [["模型" * 30, "1.5"]], 40, ())
    assert block.width <= 40


def test_lines_break_between_words_and_long_words_stay_complete():
    assert wrap("one  two\n  three", 40) == ["one  two", "  three"]
    assert wrap("a " + "b" * 30 + " c", 10) == ["a", "b" * 30, "c"]
    assert wrap("", 10) == [""]
    text = "alpha, beta (gamma delta) epsilon-zeta" * 5
    assert " ".join(wrap(text, 23)).split() == text.split()
    assert all(len(line) <= 23 or " " not in line for line in wrap(text, 23))
    assert wrap("模型 模型 模型", 9) == ["模型 模型", "模型"]


def test_word_too_long_for_its_line_begins_on_the_next():
    assert hang("  hash  ", "f" * 14, 20) == ["  hash", "    " + "f" * 14]
    assert hang("  hash  ", "one two three four", 18) == ["  hash  one two", "        three four"]


def test_parts_that_do_not_fit_are_left_out_in_order():
    parts = [("loss", "loss 1.25"), ("speed", "900 tokens/s"), ("peak", "peak 2 GiB")]
    assert fit(parts, 80, ["peak", "speed"]) == "loss 1.25  900 tokens/s  peak 2 GiB"
    assert fit(parts, 30, ["peak", "speed"]) == "loss 1.25  900 tokens/s"
    assert fit(parts, 3, ["peak", "speed"]) == "loss 1.25"


GOLDEN = """
  site                    norm   left chance
 ────────────────────────────────────────────
  mod…self_attn.q_proj     1.5         0.167
  mod….0.mlp.down_proj   0.001         0.250

  columns left out: d×h; --json has all
"""


def test_a_table_on_a_narrow_terminal():
    console = terminal(46)
    rows = [
        ["model.layers.0.self_attn.q_proj", "11×22", "1.5", "0.167"],
        ["model.layers.0.mlp.down_proj", "3×4", "0.001", "0.250"],
    ]
    cli_console.table(console, ["site", "d×h", "norm", "left chance"], rows, leave_out=["d×h"])
    assert "\n".join(printed(console)).strip("\n") == GOLDEN.strip("\n")


def test_facts_on_a_narrow_terminal():
    console = terminal(30)
    cli_console.facts(console, {"base": "/a/b, float32 on a small cpu", "no": "", "hash": "f" * 24})
    assert printed(console) == [
        "  base  /a/b, float32 on a",
        "        small cpu",
        "  hash",
        "    " + "f" * 24,
    ]


def test_output_to_a_file_is_not_shortened(capsys):
    console = cli_console.results()
    rows = [["model." * 300, *["0.5"] * 400]]
    cli_console.table(console, ["site", *(f"column{n}" for n in range(400))], rows, leave_out=["column3"])
    cli_console.facts(console, {"targets": "q_proj, " * 300})
    cli_console.say("word " * 300)
    reported = capsys.readouterr()
    assert "…" not in reported.out
    assert "model." * 300 in reported.out
    assert reported.out.splitlines()[1].split() == ["site", *(f"column{n}" for n in range(400))]
    assert len(reported.out.splitlines()) == 6
    assert len(reported.err.splitlines()) == 1


def test_names_are_not_interpreted_as_markup_or_emoji(capsys):
    console = cli_console.results()
    cli_console.table(console, ["site", "norm"], [["a[red]b", "1"], [":star:", "2"]])
    cli_console.facts(console, {"base": "[bold]x:smile:"})
    cli_console.warn("[red]:smile:")
    reported = capsys.readouterr()
    assert all(name in reported.out for name in ("a[red]b", ":star:", "[bold]x:smile:"))
    assert reported.err == "warning: [red]:smile:\n"
