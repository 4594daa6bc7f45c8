"""Question 3 of the paper: how does ΔW relate to W, and how far does training move the model from its base?

Does not implement the analyses (`analysis` does) or the divergence (`divergence` does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from brushstroke.analysis import Relation, mean_deciles, relate, spectrum
from brushstroke.analysis.relate import SiteRelation
from brushstroke.analysis.table import short_names
from brushstroke.checks import check_integer
from brushstroke.report.charts import lines, site_map
from brushstroke.studies.arm_run import ArmRunner
from brushstroke.studies.arms import (
    TASK,
    Arm,
    allowed_ranks,
    by_rank,
    low_rank,
    matrices_name,
    too_large_note,
    whole,
)
from brushstroke.studies.divergence import compare_divergence, shortened_arms
from brushstroke.studies.findings import Figure, Finding, Table, bounds, format_seeds
from brushstroke.studies.runner import Results
from brushstroke.studies.statistics import Interval, interval
from brushstroke.studies.study import Material
from brushstroke.studies.tables import as_interval, format_rate, limits
from brushstroke.studies.words import counted

SHOWN = 8  # rows of the table by site, for each rank
COLUMNS = (
    *("rank", "site", "‖leftᵀ·W·right‖: ΔW", "W", "random"),
    *("‖W‖", "‖ΔW‖", "amplification", "over chance"),
)
MEASURES = {  # measures of the map → their names in the table
    "ratio_to_chance": "over chance",
    "amplification": "amplification",
    "amplification_random": "amplification at random",
    "norm_delta": "‖ΔW‖",
    "norm_base": "‖W‖",
}
RATIOS = ("ratio_to_chance",)  # measures whose chance level is 1


@dataclass(frozen=True)
class DeltaStudy:
    """Compares the updates of a small and a large rank of one set of matrices with W.

    Args:
        targets: the matrices.
        ranks: the ranks whose updates are compared with W.
        alpha: of all ranks.
        train_whole: whether to add an arm that trains W as the reference for divergence, if there is
            general text.

    Raises:
        ConfigError: a rank is below 1.
    """

    targets: tuple[str, ...] = ("all-linear",)
    ranks: tuple[int, ...] = (4, 32)
    alpha: float = 16.0
    train_whole: bool = True
    name: str = "delta"

    def __post_init__(self) -> None:
        for value in self.ranks:
            check_integer("rank", value)

    def arms(self, material: Material) -> list[Arm]:
        """One arm for each rank; with general text also one that trains W, and each with fewer steps."""
        matrices = matrices_name(self.targets)
        ranks = allowed_ranks(self.ranks, self.targets, material.sites)
        arms = [low_rank(matrices, self.targets, rank, self.alpha) for rank in ranks]
        if not material.general:
            return arms
        if self.train_whole:
            arms.append(whole(matrices, self.targets, material.grid.rates))
        return [*arms, *shortened_arms(arms)]

    def read(self, results: Results, arm_runner: ArmRunner) -> Finding:
        """Projection norms, amplification with its chance level, and the divergence of each arm."""
        matrices = matrices_name(self.targets)
        ranked, too_large = by_rank(matrices, self.ranks, results.planned)
        good = results.conclusive(list(ranked.values()))
        related = {
            rank: [
                relate(results.adapter(name, seed), arm_runner.base, seed=seed, allow_different_base=True)
                for seed in good[name].seeds
            ]
            for rank, name in ranked.items()
            if name in good
        }
        found = {rank: relations[0] for rank, relations in related.items()}
        records, rows, texts, ratios = [], [], [], {}
        for rank, relation in found.items():
            records += map_records(f"rank {rank}", relation)
            rows += [_row(rank, site, row) for site, row in relation.ordered()[:SHOWN]]
            values = [row for row in relation.values() if row.rank]
            strength = median(row.amplification or 0.0 for row in values)
            chance = median(row.amplification_random or 0.0 for row in values)
            ratios[rank] = _ratios(related[rank])
            own, drawn = ratios[rank]
            texts.append(
                f"At rank {rank} ΔW amplifies what W does in its directions {strength:.3g} times (median of "
                f"{counted(len(values), 'matrix', 'matrices')}, first seed); a random update of the same "
                f"norm would {chance:.3g} times. "
                f"W does {bounds(own, 3)} times as much in the directions of ΔW as chance gives "
                f"(median of the matrices, over {format_seeds([own.count])}); with directions drawn at "
                f"random it is {bounds(drawn, 3)}."
            )
        figures = []
        if records:
            figures.append(
                Figure(
                    "relation",
                    "ΔW against W by layer and matrix; choose the rank and the number.",
                    site_map(
                        records, measures=list(MEASURES), words=MEASURES, choose=("rank",), ratios=RATIOS
                    ),
                )
            )
            figures += _decile_figure(found)
        full = f"{matrices} W itself" if self.train_whole else None
        names = [*ranked.values(), *([full] if full in results.planned else [])]
        diverged = compare_divergence(results, names, full)
        return Finding(
            "How does ΔW relate to W?",
            _answer(texts, diverged.answer),
            (*_norm_table(rows), *diverged.tables, *_general_table(results, arm_runner)),
            (*figures, *diverged.figures),
            (
                "Amplification falls like 1/rank almost by construction; the number free of the rank is the "
                "ratio to chance.",
                *([too_large_note(too_large)] if too_large else []),
                *limits(results, names),
            ),
            {
                str(rank): {
                    **relation.as_dict(),
                    "over_chance": as_interval(ratios[rank][0]),
                    "random_over_chance": as_interval(ratios[rank][1]),
                }
                for rank, relation in found.items()
            }
            | {"general": diverged.data or {}},
        )


def _answer(texts: Sequence[str], diverged: str) -> str:
    return " ".join([*texts, diverged]) if texts else "No arm is conclusive: the question stays open."


def _norm_table(rows: Sequence[tuple[object, ...]]) -> list[Table]:
    caption = f"Frobenius norms, first seed; the first {SHOWN} matrices of each rank."
    return [Table(caption, COLUMNS, tuple(rows))] if rows else []


def _ratios(relations: Sequence[Relation]) -> tuple[Interval, Interval]:
    """Projection / chance level, median over matrices and interval over seeds: for ΔW, and for a sample."""
    own, drawn = [], []
    for relation in relations:
        values = [row for row in relation.values() if row.rank and row.projection_random]
        own.append(median(row.projection_delta / row.projection_random for row in values))
        drawn.append(median(row.projection_sampled / row.projection_random for row in values))
    return interval(own), interval(drawn)


def map_records(rank: str, relation: Relation) -> list[dict[str, Any]]:
    """A record of the map for each site, matrix by matrix: q and v of all layers first."""
    grid = relation.grid()
    names = short_names(grid.matrices)
    cells = sorted(grid.sites.items(), key=lambda cell: grid.matrices.index(cell[0][1]))
    return [
        {"rank": rank, "layer": layer or "–", "matrix": names[matrix], **_numbers(relation[site])}
        for (layer, matrix), site in cells
    ]


def _numbers(row: SiteRelation) -> dict[str, float | None]:
    return {
        "ratio_to_chance": row.ratio_to_chance,
        "amplification": _finite(row.amplification),
        "amplification_random": _finite(row.amplification_random),
        "norm_delta": row.norm_delta,
        "norm_base": row.norm_base,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and value != float("inf") else None


def _row(rank: int, site: str, row: SiteRelation) -> tuple[object, ...]:
    numbers = (
        row.projection_delta,
        row.projection_base,
        row.projection_random,
        row.norm_base,
        row.norm_delta,
    )
    return (
        rank,
        site,
        *(f"{value:.3g}" for value in numbers),
        f"{row.amplification or 0:.3g}",
        f"{row.ratio_to_chance or 0:.3g}",
    )


def _decile_figure(found: dict) -> list[Figure]:
    records = []
    for rank, relation in found.items():
        shares = mean_deciles(relation)
        if shares is None:
            continue
        for side, values in (("input side", shares.left), ("output side", shares.right)):
            records += [
                {"tenth": index, "share": value, "arm": f"rank {rank}, {side}"}
                for index, value in enumerate(values, start=1)
            ]
    if not records:
        return []
    spec = lines(
        records,
        x="tenth",
        y="share",
        series="arm",
        x_title="tenth of W's singular directions, strongest first",
        y_title="share of ‖ΔW‖²",
    )
    return [
        Figure("deciles", "Where the energy of ΔW lies in W's spectrum; chance is 0.1 in a square W.", spec)
    ]


def _general_table(results: Results, arm_runner: ArmRunner) -> list[Table]:
    """Loss on the general text before and after, and ‖ΔW‖/‖W‖, of every arm that is trained on the task."""
    before = results.untouched.get("general")
    if before is None:
        return []
    rows = []
    for name, found in results.conclusive().items():
        after = [o.general.loss for o in found.outcomes.values() if o.general]
        shortened = found.arm.rate_of is not None
        if not after or shortened or found.arm.task != TASK or found.arm.dimension is not None:
            continue
        spectra = spectrum(results.adapter(name, found.seeds[0]), arm_runner.base, allow_different_base=True)
        change = interval([loss - before.loss for loss in after])
        relative = median(row.relative_norm or 0.0 for row in spectra.values())
        rows.append((name, format_rate(found), bounds(interval(after)), bounds(change, 3), f"{relative:.3f}"))
    if not rows:
        return []
    caption = (
        f"Loss on the general text, no row of which is in the tasks; {before.loss:.4f} before. Each arm at a "
        "rate and a task loss of its own, so that arms cannot be compared here; median of the norms."
    )
    return [Table(caption, ("arm", "learning rate", "after", "change", "‖ΔW‖/‖W‖"), tuple(rows))]
