"""Question 2 of the paper, second half: do two seeds learn the same directions, and are these task-specific?

Does not implement overlaps (`analysis` does). Adds two controls to the chance level: another task, trained at
the same rate, and the principal directions of the layers' inputs. The overlap between seeds of the other task
is an upper limit for the overlap with this control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from brushstroke.analysis import SiteOverlap, subspace
from brushstroke.analysis.overlap import overlap_grid
from brushstroke.analysis.weights import low_rank_updates
from brushstroke.checks import check_integer
from brushstroke.report.charts import dots
from brushstroke.studies.arm_run import ArmRunner
from brushstroke.studies.arms import OTHER, Arm, low_rank, matrices_name, on_other_task
from brushstroke.studies.controls import principal_inputs
from brushstroke.studies.findings import Figure, Finding, Table, apart
from brushstroke.studies.runner import Results
from brushstroke.studies.statistics import exceeds, holm, over_pairs
from brushstroke.studies.study import Material
from brushstroke.studies.tables import (
    SIDES,
    arms_table,
    as_interval,
    block,
    limits,
    over_seeds,
    overlap_figures,
    own_ranks,
    pair_overlaps,
    places,
)

SIDE_NAMES = {"left": "input side", "right": "output side"}
DIFFERENCE = "q more than v"
CEILING = (
    " The other task was learnt at the same rate; what its own seeds share is a ceiling: a control that "
    "shares little with itself shares little with anything."
)
Pairs = Mapping[tuple[int, int], Mapping[str, SiteOverlap]]


@dataclass(frozen=True)
class SeedsStudy:
    """Compares several seeds of one arm, and of the same arm on another task.

    Args:
        targets: the matrices.
        rank: of the update.
        alpha: numerator of the scale.
        inner: tests the block φ(inner, rank) in addition to φ(rank, rank).

    Raises:
        ConfigError: the rank is below 1.
    """

    targets: tuple[str, ...] = ("all-linear",)
    rank: int = 8
    alpha: float = 16.0
    inner: int = 4
    name: str = "seeds"

    def __post_init__(self) -> None:
        check_integer("rank", self.rank)

    def arms(self, material: Material) -> list[Arm]:
        """The arm, and its control if there is another task."""
        arm = low_rank(matrices_name(self.targets), self.targets, self.rank, self.alpha)
        return [arm, on_other_task(arm)] if OTHER in material.tasks else [arm]

    def read(self, results: Results, arm_runner: ArmRunner) -> Finding:
        """φ between seeds, compared with chance, the other task, and principal directions of the inputs."""
        arm = low_rank(matrices_name(self.targets), self.targets, self.rank, self.alpha)
        names = [arm.name, on_other_task(arm).name]
        good = results.conclusive(names)
        question = "Do two seeds learn the same directions, and are they the task's own?"
        notes = (
            "The corner φ(1, 1) is no steady number: where two singular values nearly agree, their "
            "directions change places between runs. The blocks are steady.",
            *limits(results, names),
        )
        controlled = len(results.seeds(*good)) >= 2 if names[1] in good else False
        seeds = results.seeds(*(good if controlled else [arm.name])) if arm.name in good else ()
        if len(seeds) < 2:
            return Finding(
                question, _too_few_seeds(results), (arms_table(results, names[:1], "Runs."),), (), notes
            )
        same = pair_overlaps(results, arm.name, arm.name, seeds)
        other = pair_overlaps(results, arm.name, names[1], seeds) if controlled else {}
        ceiling = pair_overlaps(results, names[1], names[1], seeds) if controlled else {}
        sites = list(next(iter(same.values())))
        k = min(self.rank, own_ranks(results.adapter(arm.name, seeds[0])))
        sizes = list(dict.fromkeys([(min(self.inner, k), k), (k, k)]))
        inputs = self._inputs(results, arm_runner, arm.name, seeds, sites, k)
        tests = _tests(same, other, ceiling, sites, sizes)
        notes = (*_rank_note(self.rank, k), *notes)
        if untested := [_place(row) for row in tests if "p_chance" not in row]:
            notes = (f"Not tested, as φ is 1 for any two updates there: {', '.join(untested)}.", *notes)
        tables = [
            arms_table(results, [name for name in names if name in results.planned], "Runs."),
            _block_table(tests),
            _matrix_table(same, other, inputs, sites, k),
        ]
        if names[1] not in results.planned:
            notes = ("There is no control by another task: give one (--other DATA).", *notes)
        return Finding(
            question,
            _answer(tests, controlled, len(seeds), same, other, sites, k),
            tuple(tables),
            (*_overlap_figures(results, names, same, other), _shared_figure(same, other, sites, k)),
            notes,
            {
                "blocks": tests,
                "matrices": _by_matrix(same, other, sites, k),
                "inputs": inputs,
            },
        )

    def _inputs(
        self,
        results: Results,
        arm_runner: ArmRunner,
        arm: str,
        seeds: Sequence[int],
        sites: Sequence[str],
        k: int,
    ) -> dict[str, float]:
        """Site → φ(k, k) of the update's and the inputs' principal directions, mean over seeds."""
        principal = principal_inputs(arm_runner.base, sites, arm_runner.tasks["task"].train, k)
        updates = {seed: low_rank_updates(results.adapter(arm, seed)) for seed in seeds}
        found = {}
        for site in sites:
            values = []
            for seed in seeds:
                left = updates[seed][site].svd().left[:, :k]
                values.append(float(overlap_grid(left.cpu(), principal[site])[-1, -1]))
            found[site] = fmean(values)
        return found


def _too_few_seeds(results: Results) -> str:
    """The answer if there are no two updates to compare."""
    if len(results.estimate.seeds) < 2 and results.estimate.left_out_seeds:
        return (
            "Two seeds are needed, and the time budget left only one: give more minutes (--budget-minutes)."
        )
    return "Two seeds of a conclusive arm are needed; the question stays open."


def _rank_note(rank: int, k: int) -> tuple[str, ...]:
    """A note if the updates have fewer directions than the rank that was asked for."""
    if k >= rank:
        return ()
    return (f"Tested up to φ({k}, {k}), not φ({rank}, {rank}): the smallest matrix allows only rank {k}.",)


def _tests(
    same: Pairs, other: Pairs, ceiling: Pairs, sites: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """For each block and side: φ, chance, control, the excess over both with interval and corrected p.

    `within_other` is φ between seeds of the control, which the overlap with the control rarely exceeds. If a
    block fills its side, φ is 1 for any two updates, and there is no test.
    """
    found: list[dict[str, Any]] = []
    for i, j in sizes:
        for side in SIDES:
            means = {pair: _mean(rows, sites, side, i, j) for pair, rows in same.items()}
            sizes_here = [rows[site].shape[side == "right"] for rows in same.values() for site in sites]
            filled = _filled(same, sites, side, max(i, j))
            chance = fmean(max(i, j) / size for size in sizes_here)
            above_chance = {pair: value - chance for pair, value in means.items()}
            row: dict[str, Any] = {
                "block": f"φ({i}, {j})",
                "side": side,
                "phi": as_interval(over_seeds(means)),
                "chance": chance,
                "above_chance": as_interval(over_seeds(above_chance)),
                **({} if filled else {"p_chance": exceeds(over_pairs(above_chance), 0.0)}),
            }
            if other:
                control = {
                    (a, b): (_mean(other[a, b], sites, side, i, j) + _mean(other[b, a], sites, side, i, j))
                    / 2
                    for a, b in same
                }
                excess = {pair: means[pair] - control[pair] for pair in means}
                row |= {
                    "other_task": as_interval(over_seeds(control)),
                    "within_other": as_interval(
                        over_seeds({pair: _mean(rows, sites, side, i, j) for pair, rows in ceiling.items()})
                    ),
                    "above_other": as_interval(over_seeds(excess)),
                    **({} if filled else {"p_other": exceeds(over_pairs(excess), 0.0)}),
                }
            found.append(row)
    for key in ("p_chance", "p_other"):
        rows = [row for row in found if key in row]
        for row, corrected in zip(rows, holm([row[key] for row in rows]), strict=True):
            row[f"{key}_holm"] = corrected
    return found


def _filled(pairs: Pairs, sites: Sequence[str], side: str, count: int) -> bool:
    """Whether `count` directions fill the side at every site, so that any two updates share them all."""
    first = next(iter(pairs.values()))
    return all(count >= first[site].shape[side == "right"] for site in sites)


def _mean(rows: Mapping[str, SiteOverlap], sites: Sequence[str], side: str, i: int, j: int) -> float:
    return fmean(block(rows[site], side, i, j) for site in sites)


def _by_matrix(same: Pairs, other: Pairs, sites: Sequence[str], k: int) -> dict[str, dict[str, Any]]:
    """Kind of matrix → directions that two seeds share above the control, k·(φ(k, k) − control), by side.

    If there are q and v, the key `DIFFERENCE` has their paired difference; its intervals hold for both sides
    at once (Bonferroni). Omits a side that k directions fill, because any two updates share all directions
    there.
    """
    where = places(sites)
    shared: dict[str, dict[str, dict[tuple[int, int], float]]] = {}
    for matrix in dict.fromkeys(kind for _, kind in where.values()):
        chosen = [site for site in sites if where[site][1] == matrix]
        open_sides = [side for side in SIDES if not _filled(same, chosen, side, k)]
        shared[matrix] = {side: {} for side in open_sides}
        for side in open_sides:
            for (a, b), rows in same.items():
                if other:
                    control = fmean(_mean(other[pair], chosen, side, k, k) for pair in ((a, b), (b, a)))
                else:
                    control = fmean(k / rows[site].shape[side == "right"] for site in chosen)
                shared[matrix][side][a, b] = k * (_mean(rows, chosen, side, k, k) - control)
    if "q_proj" in shared and "v_proj" in shared:
        q, v = shared["q_proj"], shared["v_proj"]
        shared[DIFFERENCE] = {
            side: {p: q[side][p] - v[side][p] for p in q[side]} for side in SIDES if side in q and side in v
        }
    level = {DIFFERENCE: 1 - 0.05 / max(1, len(shared.get(DIFFERENCE, ())))}
    return {
        matrix: {
            side: as_interval(over_seeds(values, level.get(matrix, 0.95))) for side, values in sides.items()
        }
        for matrix, sides in shared.items()
    }


def _block_table(tests: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in tests:
        cells = [
            row["block"],
            SIDE_NAMES[row["side"]],
            _shown(row["phi"]),
            f"{row['chance']:.3f}",
            _p(row, "p_chance"),
        ]
        if "other_task" in row:
            cells += [_shown(row["other_task"]), _shown(row["within_other"])]
            cells += [_shown(row["above_other"]), _p(row, "p_other")]
        rows.append(tuple(cells))
    columns = ["block", "side", "φ, same task", "chance", "p above chance"]
    controlled = any("other_task" in row for row in tests)
    if controlled:
        columns += ["φ, with the other task", "φ within the other task", "difference", "p above other task"]
    return Table(
        "Mean over all matrices and pairs of seeds; 95 % intervals by the jackknife over seeds, p one-sided, "
        f"Holm.{CEILING if controlled else ''}",
        tuple(columns),
        tuple(rows),
    )


def _matrix_table(
    same: Pairs, other: Pairs, inputs: Mapping[str, float], sites: Sequence[str], k: int
) -> Table:
    where = places(sites)
    first = next(iter(same.values()))
    rows = []
    for site in sorted(sites, key=lambda site: list(where).index(site)):
        layer, matrix = where[site]
        cells: list[object] = [layer, matrix]
        for side in SIDES:
            cells.append(f"{fmean(block(rows_[site], side, k, k) for rows_ in same.values()):.3f}")
            if other:
                cells.append(f"{fmean(block(rows_[site], side, k, k) for rows_ in other.values()):.3f}")
            cells.append(f"{k / first[site].shape[side == 'right']:.3f}")
        cells.append(f"{inputs[site]:.3f} (chance {k / first[site].shape[0]:.3f})")
        rows.append(tuple(cells))
    sides = [
        column
        for side in ("input", "output")
        for column in (f"{side}: φ", *([f"{side}: other task"] if other else []), f"{side}: chance")
    ]
    return Table(
        f"φ({k}, {k}) by matrix; the last column is with the top {k} principal directions of the layer's "
        "inputs.",
        ("layer", "matrix", *sides, "inputs' own"),
        tuple(rows),
    )


def _answer(
    tests: Sequence[Mapping[str, Any]],
    controlled: bool,
    seeds: int,
    same: Pairs,
    other: Pairs,
    sites: Sequence[str],
    k: int,
) -> str:
    if seeds < 3:
        return (
            f"Two seeds share φ({k}, {k}) = {tests[-1]['phi']['mean']:.3f} of their output directions, where "
            f"chance is {tests[-1]['chance']:.3f}. One pair of seeds has no interval: no more is claimed."
        )

    def passed(key: str) -> list[Mapping[str, Any]]:
        return [row for row in tests if (p := row.get(f"{key}_holm")) is not None and p < 0.05]

    def listed(rows: Sequence[Mapping[str, Any]]) -> str:
        return ", ".join(
            f"{_place(row)} {row['phi']['mean']:.3f} (chance {row['chance']:.3f}"
            + (f", {_controls_told(row)})" if "other_task" in row else ")")
            for row in rows
        )

    text = f"Over {seeds} seeds, above chance at 5 % (Holm): {listed(passed('p_chance')) or 'no block'}. "
    if controlled:
        above = [row for row in passed("p_other") if row in passed("p_chance")]
        names = ", ".join(map(_place, above))
        text += (
            f"Above what they share with the other task as well: {names}. This rests on one other task. "
            if above
            else "No block is above both: what the seeds share is not shown to be the task's. "
        )
    kinds = _by_matrix(same, other, sites, k)
    if len(kinds) > 1:
        by_kind = "; ".join(
            f"{matrix} {_sides_shown(sides)}"
            for matrix, sides in kinds.items()
            if sides and matrix != DIFFERENCE
        )
        level = "the other task" if other else "chance"
        if by_kind:
            text += f"Directions of {k} that two seeds share above {level}, by kind of matrix: {by_kind}."
        if kinds.get(DIFFERENCE):
            text += (
                f" Of q more than of v: {_sides_shown(kinds[DIFFERENCE])} (intervals for both sides at once)."
            )
    return text


def _overlap_figures(results: Results, arms: Sequence[str], same: Pairs, other: Pairs) -> list[Figure]:
    """φ of the first pair of seeds, and of the other task if there is one."""
    (a, b), first = next(iter(same.items()))

    def with_factor(second: str, found: Mapping[str, SiteOverlap]) -> dict[str, Mapping[str, SiteOverlap]]:
        pair = results.adapter(arms[0], a), results.adapter(second, b)
        return {"delta": found, "U": subspace(*pair, of="U")}

    controls = {"other task": with_factor(arms[1], other[a, b])} if other else {}
    return overlap_figures(
        with_factor(arms[0], first),
        "overlap-between-seeds",
        i=f"i, seed {a}",
        j=f"j, seed {b}",
        controls=controls,
    )


def _shared_figure(same: Pairs, other: Pairs, sites: Sequence[str], k: int) -> Figure:
    kinds = _by_matrix(same, other, sites, k)
    dotted = [
        {
            "kind": f"{matrix}, {SIDE_NAMES[side]}",
            "shared": found["mean"],
            **({} if found["low"] is None else {"low": found["low"], "high": found["high"]}),
        }
        for matrix, sides in kinds.items()
        if matrix != DIFFERENCE
        for side, found in sides.items()
    ]
    title = f"directions of {k} shared above {'the other task' if other else 'chance'}"
    spec = dots(dotted, name="kind", value="shared", title=title)
    return Figure("shared-directions", "By kind of matrix, with 95 % intervals over seeds.", spec)


def _controls_told(row: Mapping[str, Any]) -> str:
    return f"other task {row['other_task']['mean']:.3f}, within it {row['within_other']['mean']:.3f}"


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['block']} {SIDE_NAMES[row['side']]}"


def _shown(found: Mapping[str, Any], digits: int = 3) -> str:
    if found["low"] is None:
        return f"{found['mean']:.{digits}f}"
    mean, low, high = apart([found["mean"], found["low"], found["high"]], digits, "f")
    return f"{mean} [{low}, {high}]"


def _sides_shown(sides: Mapping[str, Mapping[str, Any]]) -> str:
    return " and ".join(f"{_shown(found, 2)} ({SIDE_NAMES[side]})" for side, found in sides.items())


def _p(row: Mapping[str, Any], key: str) -> str:
    value = row.get(f"{key}_holm")
    return "–" if value is None else f"{value:.2g}"
