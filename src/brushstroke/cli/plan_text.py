"""Prints a plan.

It computes nothing: all numbers come from the plan.
"""

from typing import TYPE_CHECKING, Any

from brushstroke.cli.console import facts, share, size

if TYPE_CHECKING:
    from brushstroke.training import Plan, TrainConfig

_NAMED = 4  # sites that one line names


KERNELS = {"onednn": "oneDNN", "fp32": "fp32 in blocks", "torch": "torch"}


def print_plan(console: Any, plan: "Plan", dtype_reason: str, config: "TrainConfig") -> None:
    """Print a plan without its warnings; the caller prints those."""
    console.print("plan", style="bold")
    targets = [f"{pattern}: {count} sites" for pattern, count in plan.matches.items()]
    rule = "the default for this width" if config.learning_rate is None else "asked for"
    about = "about " if plan.extrapolated else ""
    saved = plan.shared_tokens / max(1, plan.real_tokens)
    facts(
        console,
        {
            "base": f"{plan.base or 'a model'}, {plan.dtype} ({dtype_reason}), on {plan.device}",
            "targets": "; ".join(targets) or f"{plan.sites} sites of the adapter in --from",
            "smaller rank": _some([f"{site} (asked for {rank})" for site, rank in plan.capped.items()]),
            "left out": _left_out(plan),
            "adapter": f"{plan.sites} sites, {plan.parameters:,} trainable parameters "
            f"({share(plan.share)} of the base), {size(plan.adapter_bytes)}",
            "memory": f"about {size(plan.memory_bytes)}; {plan.memory} ({plan.memory_reason})",
            "fused modules": plan.fused_modules,
            "products": f"{KERNELS[plan.kernels]} ({plan.kernels_reason})",
            "data": f"{plan.examples:,} examples, {plan.real_tokens:,} tokens an epoch, "
            f"{plan.trained_tokens:,} of them trained",
            "read as": plan.reading,
            "notes": "; ".join(plan.notes),
            "date": f"{plan.date}, printed by the chat template" if plan.date else "",
            "run": f"{plan.steps:,} steps of {plan.batch_size} examples, {plan.epochs:.3g} epochs, "
            f"{plan.real_tokens * plan.epochs:,.0f} tokens",
            "sharing": f"{about}{plan.shared_tokens:,} of {plan.real_tokens:,} tokens saved by computing "
            f"shared prefixes once ({share(saved)})",
            "micro-tokens": f"{plan.micro_tokens:,} ({plan.micro_reason})",
            "learning rate": f"{plan.learning_rate:g} ({rule}), {config.schedule}",
            "layout": f"{plan.layout} ({plan.layout_reason})",
            "stop tokens": " ".join(plan.stop_tokens),
        },
    )


def _left_out(plan: "Plan") -> str:
    """Weights that the targets leave out, the largest first; equal names in several layers are one entry."""
    from brushstroke.sites import in_all_layers

    groups: dict[tuple[str, str], list[float]] = {}
    for path, why in plan.skipped.items():
        groups.setdefault((in_all_layers(path), why), []).append(plan.skipped_shares[path])
    entries = []
    for (name, why), shares in sorted(groups.items(), key=lambda group: -sum(group[1])):
        count = f"{len(shares)}, " if len(shares) > 1 else ""
        entries.append(f"{name} ({count}{share(sum(shares))} of the base): {why}")
    return _some(entries, "; ")


def _some(entries: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
    return separator.join(entries[:_NAMED]) + more
