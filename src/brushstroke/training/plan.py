"""The plan of a run: counts and estimates before the first step.

It trains nothing and writes nothing.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.base import Base
from brushstroke.data import EncodedData
from brushstroke.packed.memory import peak_memory, resident_memory
from brushstroke.training.config import TrainConfig
from brushstroke.training.sampler import BatchSampler
from brushstroke.training.schedule import warmup_steps
from brushstroke.training.session import Training
from brushstroke.training.setup import RunRequest, make_chat, open_session, read_data
from brushstroke.training.trial import unlearnt_sites

COUNTED_STEPS = 200  # computed and shared tokens of further steps are extrapolated


class PlanWarning(UserWarning):
    """A run is possible, but the plan has warnings for the user."""


@dataclass(frozen=True)
class Plan:
    """The facts about a run that are known before its first step. Sizes are in bytes.

    Args:
        matches: target pattern → number of sites; empty if the run starts from an adapter.
        capped: site → requested rank, for small sites of a group, which get the largest rank that fits.
        skipped: site or weight → reason why the targets leave it out.
        skipped_shares: the same keys → share of the base's weights.
        parameters: number of trainable values; `share` is their ratio to the base's.
        memory_bytes: estimated peak of the process (of the device on a GPU).
        memory: "fast" or "low"; `memory_reason` says why.
        fused_modules: text with the number of modules of each kind that run fused functions.
        kernels: for the matrix products, see `choose_kernels`; `kernels_reason` says why.
        real_tokens, trained_tokens: of one epoch.
        computed_tokens: of one epoch; `shared_tokens` fewer than without shared prefixes.
        extrapolated: whether these two were counted on the first steps only.
        layout: "packed" or "padded"; `layout_reason` says why.
        warnings: warnings for the user, one line each.
    """

    base: str | None
    dtype: str
    device: str
    sites: int
    matches: Mapping[str, int]
    capped: Mapping[str, int]
    skipped: Mapping[str, str]
    skipped_shares: Mapping[str, float]
    parameters: int
    share: float
    adapter_bytes: int
    memory_bytes: int
    memory: str
    memory_reason: str
    fused_modules: str
    kernels: str
    kernels_reason: str
    examples: int
    steps: int
    epochs: float
    batch_size: int
    real_tokens: int
    trained_tokens: int
    computed_tokens: int
    shared_tokens: int
    extrapolated: bool
    micro_tokens: int
    micro_reason: str
    layout: str
    layout_reason: str
    learning_rate: float
    stop_tokens: tuple[str, ...]
    reading: str
    notes: tuple[str, ...]
    date: str | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return dataclasses.asdict(self)


def plan(
    base: Base,
    data: Any,
    lora: LoraConfig | None = None,
    config: TrainConfig | None = None,
    *,
    start: Adapter | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    allow_different_base: bool = False,
) -> Plan:
    """The plan of `train` with the same arguments; afterwards the base is the same as before.

    Raises:
        ConfigError, TargetError, DataError, BaseMismatchError: as `train`.
    """
    request = RunRequest(
        config or TrainConfig(),
        lora,
        start,
        prompt_column=prompt_column,
        completion_column=completion_column,
        allow_different_base=allow_different_base,
    )
    chat = make_chat(base, request)
    encoded = read_data(base, data, request, chat)
    with open_session(base, request, chat) as session:
        return make_plan(session, encoded, request.config)


def make_plan(session: Training, data: EncodedData, config: TrainConfig) -> Plan:
    """The plan of a session on encoded data."""
    order = BatchSampler(data, config.batch_size, config.seed)
    steps = order.steps(config.epochs, config.max_steps)
    report = data.report
    targets = session.attachment.plan
    parameters = sum(p.numel() for p in session.parameters)
    factors = {id(p) for p in session.parameters}
    total = max(1, sum(p.numel() for p in session.model.parameters() if id(p) not in factors))
    skipped = dict(targets.skipped) if targets else {}
    sizes = {name: p.numel() for name, p in session.model.named_parameters(remove_duplicate=False)}
    counted = min(order.steps_per_epoch, COUNTED_STEPS)
    computed = needed = seen = kept = most = 0
    for step in range(counted):
        batch = order.batch(step)
        seen += sum(len(example) for example in batch)
        passes = session.passes(batch)
        kept = max(kept, *(part.kept_tokens for part in passes))
        most = max(most, len(passes))
        if session.packed:
            computed += sum(part.computed_tokens for part in passes)
            needed += sum(example.reach for example in batch)
    computed = computed if session.packed else seen
    extrapolated = counted < order.steps_per_epoch
    scale = report.real_tokens / max(1, seen)
    longest = data.longest
    reach = data.largest_reach  # the longest example may not be in the counted steps
    return Plan(
        base=session.base.name,
        dtype=str(session.base.dtype).removeprefix("torch."),
        device=str(session.device),
        sites=len(session.attachment.sites),
        matches={pattern: len(paths) for pattern, paths in targets.matches.items()} if targets else {},
        capped=dict(targets.capped) if targets else {},
        skipped=skipped,
        skipped_shares={path: sizes.get(path, sizes.get(f"{path}.weight", 0)) / total for path in skipped},
        parameters=parameters,
        share=parameters / total,
        adapter_bytes=sum(p.numel() * p.element_size() for p in session.parameters),
        memory_bytes=max(
            peak_memory(session.device),
            resident_memory(session.device) + session.step.need.during(max(kept, reach), most > 1),
        ),
        memory=session.step.mode,
        memory_reason=session.step.mode_reason,
        fused_modules=session.step.fusion.describe(),
        kernels=session.step.kernels,
        kernels_reason=session.step.kernels_reason,
        examples=len(data),
        steps=steps,
        epochs=steps / order.steps_per_epoch,
        batch_size=config.batch_size,
        real_tokens=report.real_tokens,
        trained_tokens=report.trained_tokens,
        computed_tokens=round(computed * scale),
        shared_tokens=round(max(0, needed - computed) * scale),
        extrapolated=extrapolated,
        micro_tokens=session.micro_tokens,
        micro_reason=session.step.micro_reason,
        layout="packed" if session.packed else "padded",
        layout_reason=session.step.forward_reason,
        learning_rate=session.learning_rate,
        stop_tokens=report.stop_tokens,
        reading=report.reading,
        notes=report.notes,
        date=session.chat.date if session.chat else None,
        warnings=_warnings(data, session, longest, warmup_steps(config.warmup, steps), steps),
    )


def warn_of(plan: Plan) -> None:
    """Issue the warnings of a plan as one `PlanWarning`."""
    if plan.warnings:
        warnings.warn("; ".join(plan.warnings), PlanWarning, stacklevel=3)


def _warnings(data: EncodedData, session: Training, longest: int, warmup: int, steps: int) -> tuple[str, ...]:
    report = data.report
    found = list(unlearnt_sites(session))
    if report.cut_rows:
        found.append(
            f"{len(report.cut_rows)} examples are cut at the limit, {report.cut_tokens:,} tokens are lost "
            f"({_rows(report.cut_rows)}); raise --max-length to keep them"
        )
    if report.skipped_rows:
        found.append(
            f"{len(report.skipped_rows)} examples are left out, because their prompt fills the limit "
            f"({_rows(report.skipped_rows)})"
        )
    if not session.packed:
        found.append(session.step.forward_reason)
    if longest > session.micro_tokens:
        found.append(
            f"the longest example has {longest:,} tokens, more than one pass of {session.micro_tokens:,}; "
            "it runs in a separate pass and needs more memory"
        )
    if warmup >= steps:
        found.append(
            f"the warm-up has {warmup:,} steps and the run {steps:,}: the learning rate never reaches "
            f"{session.learning_rate:g}; lower --warmup"
        )
    return tuple(found)


def _rows(rows: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f"row {listed}" if len(rows) == 1 else f"rows {listed}"
