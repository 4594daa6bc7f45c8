"""Question 2 of the paper, first half: which rank is sufficient, and is the update of low rank?

Does not implement spectra or comparisons (`analysis` and `comparisons` do).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from brushstroke.analysis import SiteSpectrum, Spectrum, spectrum, subspace
from brushstroke.checks import check_integer, check_number
from brushstroke.report.charts import lines
from brushstroke.studies.arm_run import ArmRunner
from brushstroke.studies.arms import (
    Arm,
    allowed_ranks,
    by_rank,
    low_rank,
    matrices_name,
    too_large_note,
    whole,
)
from brushstroke.studies.comparisons import MARGIN, Comparison, compare_all, compare_with
from brushstroke.studies.findings import Figure, Finding, Table, basis, bounds, difference_table, format_seeds
from brushstroke.studies.runner import Results
from brushstroke.studies.statistics import interval
from brushstroke.studies.study import Material
from brushstroke.studies.tables import (
    arms_table,
    as_comparison,
    as_interval,
    band,
    comparison_notes,
    difference_figure,
    late_margin,
    limits,
    overlap_figures,
    pair_overlaps,
    places,
    smallest_side_of,
    test_loss,
)
from brushstroke.studies.words import counted

COMPARED_RANK = 8  # the smaller rank of the overlap figures, as in the paper


@dataclass(frozen=True)
class RankStudy:
    """Compares ranks of one set of matrices, and full fine-tuning of the same sites.

    Args:
        targets: the matrices.
        ranks: ranks that the smallest matrix does not allow are left out.
        alpha: the same for all ranks, as in the paper.
        scale_rule: "standard" or "rslora".
        train_whole: whether one arm trains W (full fine-tuning).
        margin: the margin of equality, in nats of test loss per trained token; stored before the runs.

    Raises:
        ConfigError: a rank is below 1, or the margin is not a finite number above 0.
    """

    targets: tuple[str, ...] = ("all-linear",)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    alpha: float = 16.0
    scale_rule: str = "standard"
    train_whole: bool = True
    margin: float = MARGIN
    name: str = "rank"

    def __post_init__(self) -> None:
        for value in self.ranks:
            check_integer("rank", value)
        check_number("the margin of equality (--margin)", self.margin, above=0)

    def arms(self, material: Material) -> list[Arm]:
        """One arm for each rank, and one that trains W."""
        matrices = matrices_name(self.targets)
        arms = [
            low_rank(matrices, self.targets, rank, self.alpha, self.scale_rule)
            for rank in allowed_ranks(self.ranks, self.targets, material.sites)
        ]
        if self.train_whole:
            arms.append(whole(matrices, self.targets, material.grid.rates))
        return arms

    def read(self, results: Results, arm_runner: ArmRunner) -> Finding:
        """Losses by rank, spectra, and φ between a small and a large rank."""
        matrices = matrices_name(self.targets)
        ranked, too_large = by_rank(matrices, self.ranks, results.planned)
        full = f"{matrices} W itself"
        names = [*ranked.values(), *([full] if self.train_whole else [])]
        good = results.conclusive(names)
        kept = {rank: name for rank, name in ranked.items() if name in good}
        tables = [arms_table(results, names, "Loss on the test split by rank, lower is better.")]
        losses = {name: found.losses() for name, found in good.items()}
        figures = _loss_figures(results, kept, full if full in good else None)
        rows = results.row_losses(list(good))
        ranks = compare_all({name: losses[name] for name in kept.values()}, rows)
        against = compare_with(full, losses, rows) if full in good and kept else None
        answer = _answer(kept, losses, ranks, against, self.margin)
        answer += late_margin(results, self.name, self.margin)
        for compared, caption in (
            (ranks, "All pairs of ranks, nats."),
            (against, "Ranks against W itself, nats."),
        ):
            if compared and compared.differences:
                tables.append(difference_table(compared, self.margin, caption))
        figures += difference_figure([c for c in (ranks, against) if c], self.name)
        every = {name: [spectrum(results.adapter(name, seed)) for seed in good[name].seeds] for name in good}
        spectra = {name: found[0] for name, found in every.items()}
        if spectra:
            tables.append(_spectra_table(spectra))
            figures.append(_spectra_figure(spectra))
            answer += " " + _deficiency(every.get(full, []))
        figures += _overlap_figures(results, kept)
        notes = (
            "An update of rank r is of rank r by construction: only the spectrum of W's own training says "
            "whether the update of this task is of low rank.",
            f"The scale is {self.scale_rule} with alpha {self.alpha:g} for every rank.",
            *([too_large_note(too_large)] if too_large else []),
            *comparison_notes(ranks if against is None else against, results, self.name, self.margin),
            *limits(results, names),
        )
        return Finding(
            "What rank is enough, and is the update of low rank?",
            answer,
            tuple(tables),
            tuple(figures),
            notes,
            {
                "test_loss": {name: as_interval(test_loss(found)) for name, found in good.items()},
                "ranks": as_comparison(ranks, self.margin),
                "against_whole": None if against is None else as_comparison(against, self.margin),
                "spectra": {name: found.as_dict() for name, found in spectra.items()},
            },
        )


def _answer(
    kept: dict[int, str],
    losses: dict[str, dict[int, float]],
    ranks: Comparison,
    against: Comparison | None,
    margin: float,
) -> str:
    """The answer: steps between ranks, equal ranks, and ranks compared with training W."""
    if not kept:
        return "No rank that was run has a learning rate that could be chosen: the study is inconclusive."
    means = {rank: sum(losses[name].values()) / len(losses[name]) for rank, name in kept.items()}
    best = min(means, key=lambda rank: means[rank])
    text = f"The lowest test loss of {len(kept)} ranks is" if len(kept) > 1 else "The test loss is"
    text += f" {means[best]:.4f}, at rank {best}"
    if max(len(losses[name]) for name in kept.values()) < 2:
        return f"{text} (one seed: no interval, and no claim of a difference)."
    text += "."
    if ranks.spread is not None:
        text += f" {_steps_told(kept, ranks, best)} {_equal_told(kept, ranks, margin)}"
    if against is not None and against.spread is not None:
        text += f" {_whole_told(kept, against)}"
    return text


def _steps_told(kept: dict[int, str], ranks: Comparison, best: int) -> str:
    steps = [(a, b, step) for a, b in pairwise(kept) if (step := ranks.of(kept[a], kept[b]))]
    apart = [(a, b, step.difference.mean > 0) for a, b, step in steps if step.significant()]
    lowering = [f"{a} to {b}" for a, b, lowers in apart if lowers]
    raising = [f"{a} to {b}" for a, b, lowers in apart if not lowers]
    text = (
        "Steps from one rank to the next that are shown to lower the loss "
        f"({basis(ranks)}): {', '.join(lowering) or 'none'}."
    )
    if raising:
        text += f" Steps that raise it: {', '.join(raising)}."
    if best == max(kept) and any(lowers and b == best for _, b, lowers in apart):
        text += " The last step still lowers it: a rank beyond which nothing is gained was not reached."
    return text


def _equal_told(kept: dict[int, str], ranks: Comparison, margin: float) -> str:
    rank_of = {name: rank for rank, name in kept.items()}
    equal = [
        f"{rank_of[one.first]} and {rank_of[one.second]}"
        for one in ranks.differences
        if one.equal_within(margin)
    ]
    return f"Ranks shown to be equal within ±{margin:g} nats: {', '.join(equal) or 'none'}."


def _whole_told(kept: dict[int, str], against: Comparison) -> str:
    """The ranks that are shown to differ from training W, and the difference at the largest rank."""
    rank_of = {name: rank for rank, name in kept.items()}
    differing = [f"{rank_of[one.first]}" for one in against.differences if one.significant()]
    text = (
        f"Ranks shown to differ from W's own training ({basis(against)}): {', '.join(differing) or 'none'}."
    )
    last = next((one for one in against.differences if one.first == kept[max(kept)]), None)
    if last is not None:
        text += f" Loss at rank {max(kept)} less that of W's own training: {bounds(last.difference, 3)}."
    return text


def _loss_figures(results: Results, kept: dict[int, str], full: str | None) -> list[Figure]:
    records = []
    for rank, name in kept.items():
        loss = test_loss(results.arms[name])
        if loss:
            records.append({"rank": rank, "loss": loss.mean, "arm": "low rank", **band(loss)})
    whole_loss = test_loss(results.arms[full]) if full else None
    if whole_loss and records:
        for rank in (min(kept), max(kept)):
            records.append(
                {
                    "rank": rank,
                    "loss": whole_loss.mean,
                    "arm": "W itself",
                    **band(whole_loss),
                }
            )
    if not records:
        return []
    spec = lines(
        records, x="rank", y="loss", series="arm", x_title="rank", y_title="test loss, nats", log_x=True
    )
    return [Figure("loss-by-rank", "Test loss by rank, with 95 % intervals over seeds.", spec)]


def _spectra_table(spectra: dict[str, Any]) -> Table:
    rows = []
    for name, found in spectra.items():
        sites: list[SiteSpectrum] = list(found.values())
        rows.append(
            (
                name,
                f"{median(row.stable_rank for row in sites):.2f}",
                f"{median(row.effective_rank for row in sites):.1f}",
                f"{median(row.energy_rank(0.90) for row in sites):g}",
                f"{median(row.energy_rank(0.99) for row in sites):g}",
                _smaller_sides(sites),
                f"{found.norm:.3g}",
            )
        )
    columns = ("arm", "stable rank", "effective rank", "90 % energy", "99 % energy", "of at most", "norm")
    return Table("Ranks of ΔW: medians over the sites, first seed.", columns, tuple(rows))


def _smaller_sides(sites: Sequence[SiteSpectrum]) -> str:
    """min(d, h) of the smallest and of the largest matrix, which limit the ranks: "8 to 32", or "8"."""
    sizes = sorted({min(row.shape) for row in sites})
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _spectra_figure(spectra: dict[str, Any]) -> Figure:
    records = []
    for name, found in spectra.items():
        where = places(list(found))
        for site, row in found.ordered():
            layer, matrix = where[site]
            top = float(row.sigma[0]) or 1.0
            values = row.sigma.tolist()
            for index in _thinned(len(values)):
                sigma = values[index - 1]
                if sigma > 1e-9 * top:
                    records.append(
                        {
                            "arm": name,
                            "layer": layer,
                            "matrix": matrix,
                            "i": index,
                            "sigma": float(f"{sigma / top:.4g}"),
                        }
                    )
    spec = lines(
        records,
        x="i",
        y="sigma",
        series="arm",
        x_title="i",
        y_title="σᵢ/σ₁ of ΔW",
        log_x=True,
        log_y=True,
        choose=("layer", "matrix"),
    )
    return Figure(
        "spectra", "Singular values of ΔW relative to the largest; choose a layer and a matrix.", spec
    )


def _thinned(count: int) -> list[int]:
    """At most about 40 of the numbers from 1 to count: all small ones, and fewer and fewer of the larger."""
    found, index = [], 1.0
    while index <= count:
        found.append(int(index))
        index = max(int(index) + 1, index * 1.12)
    return found if not found or found[-1] == count else [*found, count]


def _deficiency(found: list[Spectrum]) -> str:
    """A sentence on the energy distribution and stable rank of an update from training W, over seeds."""
    if not found:
        return "Whether the update is rank-deficient is not answered: it takes a conclusive run of W itself."
    sites: list[SiteSpectrum] = list(found[0].values())
    needed = interval([median(row.energy_rank(0.90) for row in one.values()) for one in found])
    stable = interval([median(row.stable_rank for row in one.values()) for one in found])
    return (
        f"Trained without a limit on its rank, ΔW has 90 % of its energy in {bounds(needed, 3)} of "
        f"{_smaller_sides(sites)} directions (median of {counted(len(sites), 'matrix', 'matrices')}, over "
        f"{format_seeds([needed.count])}) and a stable rank of {bounds(stable, 3)}."
    )


def _overlap_figures(results: Results, kept: dict[int, str]) -> list[Figure]:
    small = max((rank for rank in kept if rank <= COMPARED_RANK), default=None)
    smallest_side = min((smallest_side_of(results, name) for name in kept.values()), default=0)
    large = max((rank for rank in kept if small and small < rank < smallest_side), default=None)
    if small is None or large is None:
        return []
    seeds = results.seeds(kept[small], kept[large])
    pairs = pair_overlaps(results, kept[small], kept[large], seeds[:2]) if len(seeds) > 1 else {}
    if not pairs:
        return []
    (first, second), found = next(iter(pairs.items()))
    adapters = results.adapter(kept[small], first), results.adapter(kept[large], second)
    return overlap_figures(
        {"delta": found, "U": subspace(*adapters, of="U")},
        "overlap-between-ranks",
        i=f"i, rank {small} (seed {first})",
        j=f"j, rank {large} (seed {second})",
        corner=True,
    )
