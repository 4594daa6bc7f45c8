"""How much of an adapter's gain survives in bfloat16: attached, with one rounding or two, and merged.

The gain is the loss of the base minus the loss with the adapter, both in one dtype, on the test rows. Only
the reference with two roundings is implemented here; `lowrank` and `merging` implement the others.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from brushstroke.adapter import Adapter
from brushstroke.analysis.weights import low_rank_updates
from brushstroke.checks import check_integer
from brushstroke.data import Example
from brushstroke.errors import ConfigError, MergeError
from brushstroke.inference import evaluate_loss
from brushstroke.layers import attach
from brushstroke.merging import merge
from brushstroke.merging.rounding import Mode
from brushstroke.report.charts import lines
from brushstroke.sites import site_module
from brushstroke.studies.arm_run import ArmRunner
from brushstroke.studies.arms import TASK, Arm, exact, matrices_name
from brushstroke.studies.findings import Figure, Finding, Table
from brushstroke.studies.runner import Results
from brushstroke.studies.statistics import Interval, interval
from brushstroke.studies.study import Material
from brushstroke.studies.tables import as_interval, limits
from brushstroke.studies.words import counted

ATTACHED, TWICE, NEAREST, STOCHASTIC = (
    "attached",
    "two roundings",
    "merged to nearest",
    "merged stochastically",
)
FORMS = (ATTACHED, TWICE, NEAREST, STOCHASTIC)
RATES, SEEDS = (1e-5, 1e-4, 1e-3), (0, 1, 2, 3, 4)
LEAST_GAIN = 0.03  # nats per token; below it, a share of the gain is mostly noise


@dataclass(frozen=True)
class RoundingStudy:
    """Trains in float32 for few steps, and measures each adapter in bfloat16.

    Args:
        targets: the matrices.
        ranks: of the updates.
        alpha: numerator of the scale.
        steps: numbers of training steps; the material's config must have `max_steps` equal to the largest.

    Raises:
        ConfigError: a rank or a number of steps is below 1.
    """

    targets: tuple[str, ...] = ("all-linear",)
    ranks: tuple[int, ...] = (8,)
    alpha: float = 16.0
    steps: tuple[int, ...] = (1, 5, 20, 100)
    name: str = "rounding"

    def __post_init__(self) -> None:
        for what, values in (("rank", self.ranks), ("steps", self.steps)):
            for value in values:
                check_integer(what, value)

    @property
    def training(self) -> dict[str, Any]:
        """The settings of a `TrainConfig` for this study: the most steps, at a constant rate."""
        return {"max_steps": max(self.steps), "schedule": "constant", "warmup": 0}

    def arms(self, material: Material) -> list[Arm]:
        """One arm for each rank, learning rate of the grid, and number of steps.

        Raises:
            ConfigError: the base is not in float32, or the config has another number of steps.
        """
        if material.base.dtype != torch.float32:
            raise ConfigError(
                "a study of rounding compares float32 with bfloat16, so it needs the base in float32; leave "
                "out --dtype"
            )
        total = max(self.steps)
        if material.config.max_steps != total:
            raise ConfigError(
                f"the longest run of this study has {total} steps, but the config has max_steps="
                f"{material.config.max_steps}; set both to the same number"
            )
        return [
            self._arm(rank, rate, steps)
            for rank in sorted(set(self.ranks))
            for rate in material.grid.rates
            for steps in sorted(set(self.steps))
        ]

    def _arm(self, rank: int, rate: float, steps: int) -> Arm:
        name = f"{matrices_name(self.targets)} r={rank}, rate {exact(rate)}, {counted(steps, 'step')}"
        share = steps / max(self.steps)
        return Arm(name, self.targets, rank, self.alpha, rate=rate, steps_share=share)

    def read(self, results: Results, arm_runner: ArmRunner) -> Finding:
        """The share of the gain that each form keeps, by rank, rate and steps."""
        test = arm_runner.tasks[TASK].test
        half: Any = copy.deepcopy(arm_runner.base.model).to(torch.bfloat16)
        base, base_half = results.untouched[TASK].loss, _loss(half, test)
        measured = []
        for name, found in results.arms.items():
            if found.arm.rate is None or not found.seeds:
                continue
            gains, kept = [], {form: [] for form in FORMS}
            for seed, loss in found.losses().items():
                gains.append(base - loss)
                for form, value in _losses(half, results.adapter(name, seed), test).items():
                    kept[form].append(None if value is None else base_half - value)
            measured.append(_Row(found.arm, arm_runner.steps(found.arm), tuple(gains), kept))
        question = "How much of an adapter's gain survives in bfloat16?"
        notes = (
            "The gain is the loss of the base minus the loss with the adapter, in nats per trained token on "
            f"the test rows; the base has {base:.4f} in float32 and {base_half:.4f} in bfloat16.",
            f"Where the gain in float32 is below {LEAST_GAIN}, the table shows by how much the gain in "
            "bfloat16 differs from it, not a share.",
            "Training was in float32. Two roundings: x·W is rounded before the low-rank term is added, as a "
            "forward hook does it.",
            "Refused: less than half of ΔW would survive at a site.",
            *limits(results, [row.arm.name for row in measured]),
        )
        if not measured:
            return Finding(question, "No run has an adapter; the question stays open.", notes=notes)
        return Finding(
            question,
            _answer(measured),
            (_table(measured),),
            (_figure(measured),) if any(row.large for row in measured) else (),
            notes,
            {"base": {"float32": base, "bfloat16": base_half}, "arms": [row.as_dict() for row in measured]},
        )


@dataclass(frozen=True)
class _Row:
    """The gains of one arm: in float32 by seed; in bfloat16 by form and seed, None for a refused merge."""

    arm: Arm
    steps: int
    gains: tuple[float, ...]
    kept: Mapping[str, Sequence[float | None]]

    @property
    def large(self) -> bool:
        """Whether the gain is large enough for a share."""
        return fmean(self.gains) >= LEAST_GAIN

    def share(self, form: str) -> Interval | None:
        """The mean share of the gain; None if a merge was refused or a gain is not above 0."""
        values = self._values(form)
        if values is None or min(self.gains) <= 0:
            return None
        return interval([value / gain for value, gain in zip(values, self.gains, strict=True)])

    def difference(self, form: str) -> Interval | None:
        """The mean gain in bfloat16 minus that in float32; None if a merge was refused."""
        values = self._values(form)
        if values is None:
            return None
        return interval([value - gain for value, gain in zip(values, self.gains, strict=True)])

    def _values(self, form: str) -> list[float] | None:
        values = [value for value in self.kept[form] if value is not None]
        return values if len(values) == len(self.gains) else None

    def text(self, form: str) -> str:
        """The share in per cent, or the difference, with its interval."""
        found = self.share(form) if self.large else self.difference(form)
        if found is None:
            return "refused"
        if self.large:
            return _percent(found)
        bounds = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
        return f"{found.mean:+.4f}{bounds} nats"

    def as_dict(self) -> dict[str, Any]:
        """All numbers, as JSON types."""
        return {
            "arm": self.arm.name,
            "rank": self.arm.rank,
            "rate": self.arm.rate,
            "steps": self.steps,
            "gain": list(self.gains),
            "kept": {form: list(values) for form, values in self.kept.items()},
            "share": {form: as_interval(self.share(form)) for form in FORMS},
        }


def _losses(half: nn.Module, adapter: Adapter, test: Sequence[Example]) -> dict[str, float | None]:
    """The loss in bfloat16 by form; None for a merge that is refused."""
    with attach(half, adapter):
        found: dict[str, float | None] = {ATTACHED: _loss(half, test)}
    with two_roundings(half, adapter):
        found[TWICE] = _loss(half, test)
    modes: dict[str, Mode] = {NEAREST: "nearest", STOCHASTIC: "stochastic"}
    for form, rounding in modes.items():
        try:
            found[form] = _loss(merge(half, adapter, rounding=rounding), test)
        except MergeError:
            found[form] = None
    return found


@contextmanager
def two_roundings(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Context manager: forward hooks add the rounded low-rank term to the rounded output of linear layers."""
    hooks = []
    try:
        for path, update in low_rank_updates(adapter).items():
            module: Any = site_module(model, path)
            U, V = (factor.to(module.weight.dtype) for factor in (update.U, update.V))
            hooks.append(module.register_forward_hook(_term(U, V, update.scale)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _term(U: Tensor, V: Tensor, scale: float) -> Callable[..., Tensor]:
    return lambda _, inputs, y: y + scale * (inputs[0] @ U @ V)


def _loss(model: nn.Module, examples: Sequence[Example]) -> float:
    loss = evaluate_loss(model, examples).mean
    assert loss is not None  # test rows have trained tokens
    return loss


def _percent(found: Interval) -> str:
    bounds = "" if found.low is None else f" [{100 * found.low:.1f}, {100 * (found.high or 0):.1f}]"
    return f"{100 * found.mean:.1f} %{bounds}"


def _answer(measured: Sequence[_Row]) -> str:
    rows = [row for row in measured if row.large]
    if not rows:
        return f"No adapter gains {LEAST_GAIN} nats in float32, so that no share of a gain is known."
    parts = []
    for form in FORMS:
        shares = [(share.mean, row) for row in rows if (share := row.share(form)) is not None]
        refused = len(rows) - len(shares)
        text = f"{form}: refused in all arms"
        if shares:
            mean, (worst, row) = fmean(share for share, _ in shares), min(shares, key=lambda pair: pair[0])
            text = f"{form}: {100 * mean:.1f} % on average, at worst {100 * worst:.1f} % ({row.arm.name})"
            if refused:
                text += f", refused in {counted(refused, 'arm')}"
        parts.append(text)
    arms = counted(len(rows), "arm")
    return f"Of the gain in float32, over {arms} that gain at least {LEAST_GAIN} nats: {'; '.join(parts)}."


def _table(measured: Sequence[_Row]) -> Table:
    rows = []
    for row in measured:
        gain = interval(row.gains)
        cells = (row.arm.rank, f"{row.arm.rate:g}", row.steps, str(gain))
        rows.append((*cells, *(row.text(form) for form in FORMS)))
    return Table(
        "The gain in float32 in nats, and what each form keeps of it in bfloat16; means over seeds with 95 % "
        "intervals.",
        ("rank", "rate", "steps", "gain in float32", *FORMS),
        tuple(rows),
    )


def _figure(measured: Sequence[_Row]) -> Figure:
    records = []
    for row in measured:
        for form in FORMS:
            share = row.share(form) if row.large else None
            if share is not None:
                record = {"steps": row.steps, "share": 100 * share.mean, "form": form}
                record |= {"rate": f"{row.arm.rate:g}", "rank": str(row.arm.rank)}
                if share.low is not None:
                    record |= {"low": 100 * share.low, "high": 100 * (share.high or 0)}
                records.append(record)
    spec = lines(
        records,
        x="steps",
        y="share",
        series="form",
        x_title="training steps",
        y_title="share of the gain kept, %",
        log_x=True,
        choose=("rate", "rank"),
    )
    return Figure("rounding-share", "The share of an adapter's gain that bfloat16 keeps.", spec)
