"""Question 2 of the paper, first half: what rank is enough, and is the update itself of low rank?"""

from dataclasses import dataclass
from statistics import median
from typing import Any

from brushstroke.analysis import SiteSpectrum, random_pair, spectrum
from brushstroke.report.charts import grids, lines
from brushstroke.studies.arms import Arm, low_rank, matrices_name, whole
from brushstroke.studies.findings import Figure, Finding, Table, difference_table
from brushstroke.studies.reading import (
    SIDES,
    arms_table,
    as_interval,
    inconclusive_note,
    left_out_note,
    pair_overlaps,
    places,
    smallest_side_of,
    test_loss,
)
from brushstroke.studies.runner import Results
from brushstroke.studies.statistics import compare_arms
from brushstroke.studies.study import Material
from brushstroke.studies.workshop import Workshop

WHOLE_RATE = 10  # W itself learns at about a tenth of the rate of low-rank factors (Schulman et al. 2025)
COMPARED_RANK = 8  # the smaller rank of the overlap figures, as in the paper


@dataclass(frozen=True)
class RankStudy:
    """Ranks of one set of matrices, and W itself at the same sites.

    Args:
        targets: the matrices.
        ranks: ascending; ranks that the smallest matrix does not allow are left out.
        alpha: the same for all ranks, as in the paper.
        scale_rule: "standard" or "rslora".
        train_whole: whether one arm trains W itself.
    """

    targets: tuple[str, ...] = ("all-linear",)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    alpha: float = 16.0
    scale_rule: str = "standard"
    train_whole: bool = True
    name: str = "rank"

    def arms(self, material: Material) -> list[Arm]:
        """One for each rank, and W itself."""
        matrices = matrices_name(self.targets)
        arms = [
            low_rank(matrices, self.targets, rank, self.alpha, self.scale_rule)
            for rank in sorted(set(self.ranks))
        ]
        if self.train_whole:
            rates = tuple(float(f"{rate / WHOLE_RATE:.1e}") for rate in material.grid.rates)
            arms.append(whole(matrices, self.targets, rates))
        return arms

    def read(self, results: Results, workshop: Workshop) -> Finding:
        """Losses by rank, spectra, and φ between a small and a large rank."""
        matrices = matrices_name(self.targets)
        ranked = {rank: f"{matrices} r={rank}" for rank in sorted(set(self.ranks))}
        full = f"{matrices} W itself"
        names = [*ranked.values(), *([full] if self.train_whole else [])]
        good = results.conclusive(names)
        kept = {rank: name for rank, name in ranked.items() if name in good}
        tables = [arms_table(results, names, "Loss on the test split by rank, lower is better.")]
        losses = {name: found.losses() for name, found in good.items()}
        figures = _loss_figures(results, kept, full if full in good else None)
        answer, compared = _answer(kept, losses, full if full in good else None, results)
        if compared:
            tables.append(difference_table(compared, "Paired over seeds, against the best of these arms."))
        seed = results.estimate.seeds[0]
        spectra = {
            name: spectrum(results.adapter(name, seed)) for name in good if seed in good[name].outcomes
        }
        if spectra:
            tables.append(_spectra_table(spectra))
            figures.append(_spectra_figure(spectra))
            answer += " " + _deficiency(spectra, full)
        overlap = _overlap_figure(results, kept)
        if overlap:
            figures.append(overlap)
        notes = (
            "An update of rank r is of rank r by construction: only the spectrum of W's own training says "
            "whether the update of this task is of low rank.",
            f"The scale is {self.scale_rule} with alpha {self.alpha:g} for every rank.",
            *inconclusive_note(results, names),
            *left_out_note(results),
        )
        return Finding(
            "What rank is enough, and is the update of low rank?",
            answer,
            tuple(tables),
            tuple(figures),
            notes,
            {
                "test_loss": {name: as_interval(test_loss(found)) for name, found in good.items()},
                "spectra": {name: found.as_dict() for name, found in spectra.items()},
            },
        )


def _answer(
    kept: dict[int, str], losses: dict[str, dict[int, float]], full: str | None, results: Results
) -> tuple[str, list[Any]]:
    if not kept:
        return "No rank has a learning rate that could be chosen: the study is inconclusive.", []
    means = {rank: sum(losses[name].values()) / len(losses[name]) for rank, name in kept.items()}
    best = min(means, key=lambda rank: means[rank])
    others = [(name, kept[best]) for rank, name in kept.items() if rank != best]
    if full:
        others.append((full, kept[best]))
    compared = compare_arms(losses, others)
    apart = {one.first: one for one in compared}
    count = len(losses[kept[best]])
    text = f"The lowest test loss of {len(kept)} ranks is {means[best]:.4f}, at rank {best}"
    text += f" ({count} seeds)." if count > 1 else " (one seed: no interval, and no claim of a difference)."
    if count > 1:
        enough = next((rank for rank in kept if rank == best or not apart[kept[rank]].significant()), best)
        if enough < best:
            gap = apart[kept[enough]].difference
            text += (
                f" The smallest rank that these seeds cannot tell from it is {enough}: its loss is higher by "
                f"{gap.mean:.4f} (95 % interval {gap.low:.4f} to {gap.high:.4f}), which proves no equality."
            )
        else:
            text += " Every smaller rank is significantly worse (paired t, Holm)."
    if full and full in apart:
        gap = apart[full].difference
        where = "no difference that these seeds can tell"
        if apart[full].significant():
            where = "significantly lower" if gap.mean < 0 else "significantly higher"
        text += f" W itself, trained at the same sites, comes to {gap.mean:+.4f} of it: {where}."
    return text, compared


def _loss_figures(results: Results, kept: dict[int, str], full: str | None) -> list[Figure]:
    records = []
    for rank, name in kept.items():
        loss = test_loss(results.arms[name])
        if loss:
            records.append({"rank": rank, "loss": loss.mean, "arm": "low rank", **_band(loss.low, loss.high)})
    whole_loss = test_loss(results.arms[full]) if full else None
    if whole_loss and records:
        for rank in (min(kept), max(kept)):
            records.append(
                {
                    "rank": rank,
                    "loss": whole_loss.mean,
                    "arm": "W itself",
                    **_band(whole_loss.low, whole_loss.high),
                }
            )
    if not records:
        return []
    spec = lines(
        records, x="rank", y="loss", series="arm", x_title="rank", y_title="test loss, nats", log_x=True
    )
    return [Figure("loss-by-rank", "Test loss by rank, with 95 % intervals over seeds.", spec)]


def _band(low: float | None, high: float | None) -> dict[str, float]:
    return {} if low is None or high is None else {"low": low, "high": high}


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
                f"{median(min(row.shape) for row in sites):g}",
                f"{found.norm:.3g}",
            )
        )
    columns = ("arm", "stable rank", "effective rank", "90 % energy", "99 % energy", "of at most", "norm")
    return Table("Ranks of ΔW: medians over the sites, first seed.", columns, tuple(rows))


def _spectra_figure(spectra: dict[str, Any]) -> Figure:
    records = []
    for name, found in spectra.items():
        where = places(list(found))
        for site, row in found.ordered():
            layer, matrix = where[site]
            top = float(row.sigma[0]) or 1.0
            for index, sigma in enumerate(row.sigma.tolist(), start=1):
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


def _deficiency(spectra: dict[str, Any], full: str) -> str:
    found = spectra.get(full)
    if found is None:
        return "Whether the update is rank-deficient is not answered: there is no conclusive run of W itself."
    sites: list[SiteSpectrum] = list(found.values())
    needed, most = median(row.energy_rank(0.90) for row in sites), median(min(row.shape) for row in sites)
    stable = median(row.stable_rank for row in sites)
    return (
        f"Trained without a limit on its rank, ΔW has 90 % of its energy in {needed:g} of {most:g} "
        f"directions ({100 * needed / most:.0f} %, median of {len(sites)} matrices) and a stable rank of "
        f"{stable:.1f}: "
        + (
            "concentrated, so rank-deficient in the sense of its energy."
            if needed <= most / 4
            else "not of low rank in the sense of its energy, whatever a low-rank adapter reaches."
        )
    )


def _overlap_figure(results: Results, kept: dict[int, str]) -> Figure | None:
    small = max((rank for rank in kept if rank <= COMPARED_RANK), default=None)
    smallest_side = min((smallest_side_of(results, name) for name in kept.values()), default=0)
    large = max((rank for rank in kept if small and small < rank < smallest_side), default=None)
    if small is None or large is None:
        return None
    seeds = list(results.estimate.seeds)
    pairs = pair_overlaps(results, kept[small], kept[large], seeds[:2]) if len(seeds) > 1 else {}
    if not pairs:
        return None
    (first, second), found = next(iter(pairs.items()))
    where = places(list(found))
    records = []
    for site in found:
        row = found[site]
        layer, matrix = where[site]
        drawn = {
            f"{side}: r={small} (seed {first}), r={large} (seed {second})": getattr(row, side)
            for side in SIDES
        }
        drawn["two random Gaussian matrices"] = random_pair(row)
        for panel, grid in drawn.items():
            records.append({"layer": layer, "matrix": matrix, "panel": panel, "cells": grid.tolist()})
    across, down = f"j, rank {large}", f"i, rank {small}"
    spec = grids(records, x_title=across, y_title=down, choose=("layer", "matrix"))
    caption = (
        f"φ(i, j) between ranks {small} and {large}, of the directions of ΔW on the input side (left) and "
        "the output side (right), and of a random pair. In the corner, cells with j < i are grey."
    )
    return Figure("overlap-between-ranks", caption, spec)
