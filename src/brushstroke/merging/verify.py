"""Compares the outputs of the merged model with those of base and adapted model, if there is enough memory.

It writes no files and makes no decision: it reports numbers.
"""

import copy
import dataclasses
import gc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brushstroke.adapter import Adapter
from brushstroke.base import Base, load_base, preserved_rope, total_memory
from brushstroke.layers import Attachment, attach
from brushstroke.merging.made_inputs import Inputs, candidate_inputs
from brushstroke.merging.stored import stored_dtypes
from brushstroke.sites import is_quantised

MEMORY_SHARE = 0.25
SHARDS = 2
MEASURABLE = 1e-6  # relative change of an output; below it is rounding in fp32

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class CheckResult:
    """The drift of a merged model's outputs, or why there is none.

    Args:
        drift: ‖merged − adapted‖ / ‖adapted‖ of the output that differs most.
        effect: ⟨merged − base, adapted − base⟩ / ‖adapted − base‖² of the output that keeps least: the share
            of the adapter's change that the merged model has; None without a measurable change.
        outputs: the names of the outputs.
        skipped: what was not measured, and why.
    """

    drift: float | None = None
    effect: float | None = None
    outputs: tuple[str, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class _Trial:
    """Generated inputs, and the outputs of the base and of the adapted model for them."""

    inputs: Inputs
    base: Outputs
    adapted: Outputs


def check_merged(
    source: Base | str,
    adapter: Adapter,
    merged: Path,
    wanted: bool | None = None,
    *,
    trust_remote_code: bool = False,
) -> CheckResult:
    """Compare all float outputs on generated inputs: their drift, and the share of the adapter's effect.

    Both models run in fp32 on the CPU. The folder is loaded as plain transformers would load it.

    Args:
        source: the base, loaded or as a folder.
        adapter: what was merged into it.
        merged: the folder of the merged model.
        wanted: None runs the check only if it needs little memory.
        trust_remote_code: run code that is part of the model's folder.
    """
    if wanted is None and (reason := _too_large(merged)):
        return CheckResult(skipped=reason)
    load = partial(load_base, device="cpu", trust_remote_code=trust_remote_code)
    base = _in_float32(source) if isinstance(source, Base) else load(source, dtype="float32")
    dtype = str(base.dtype).removeprefix("torch.")
    with attach(base, adapter, allow_different_base=True) as attachment:  # checked before
        trials, idle, failure = _try_inputs(base.model, attachment)
    missed = f"{len(idle)} of {len(adapter)} sites, such as {idle[0]}: {failure}" if idle else None
    if not trials:
        return CheckResult(skipped=missed)
    del base
    gc.collect()
    model = load(merged, dtype=dtype).model
    drifts: dict[str, float] = {}
    effects: list[float] = []
    for trial in trials:
        found = _run(model, trial.inputs)
        for name, adapted in trial.adapted.items():
            drifts[name] = max(drifts.get(name, 0.0), _difference(found.get(name), adapted))
            share = _share(found.get(name), adapted, trial.base[name])
            effects += [] if share is None else [share]
    return CheckResult(max(drifts.values()), min(effects, default=None), tuple(drifts), missed)


def _in_float32(base: Base) -> Base:
    """The same base, with a copy of its model in fp32 if half precision would hide small updates."""
    if base.dtype.itemsize >= 4 or is_quantised(base):
        return base
    return dataclasses.replace(base, model=copy.deepcopy(base.model).float())


def _try_inputs(model: nn.Module, attachment: Attachment) -> tuple[list[_Trial], list[str], str]:
    """Generated inputs and the outputs of base and adapted model, until each adapted site has run.

    Also returns the sites that no input reached, and why.
    """
    trials: list[_Trial] = []
    idle, taken, failures = list(attachment.sites), set[str](), list[tuple[set[str], str]]()
    for make in candidate_inputs(model):
        inputs: Inputs = {}
        with _reached(attachment) as reached:
            try:
                inputs = make()
                outputs = _run(model, inputs)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # any error means that the model does not accept these inputs
                reason = " ".join(str(error).split())[:160]
                failures.append((set(inputs), f"generated inputs fail ({type(error).__name__}: {reason})"))
                continue
        taken |= set(inputs)
        if outputs and reached & set(idle):
            with attachment.disabled():
                trials.append(_Trial(inputs, _run(model, inputs), outputs))
            idle = [site for site in idle if site not in reached]
        if not idle:
            break
    return trials, idle, _why_idle(model, taken, failures)


def _why_idle(model: nn.Module, taken: set[str], failures: list[tuple[set[str], str]]) -> str:
    """Why sites did not run: the error of the first failed inputs that are not a form of accepted ones."""
    failed = [reason for names, reason in failures if not names or not names <= taken]
    if failed:
        return failed[0]
    kind = type(model).__name__
    takes = ", ".join(inspect.signature(model.forward).parameters)
    ran = ", and runs without them" if taken else ""
    return f"no generated input reaches them ({kind} takes {takes}{ran})"


@contextmanager
def _reached(attachment: Attachment) -> Iterator[set[str]]:
    """Context manager: collect the sites of an attachment whose modules run."""
    reached: set[str] = set()

    def note(site: str) -> Callable[..., None]:
        return lambda *_: reached.add(site)

    hooks = [module.register_forward_hook(note(site)) for site, module in attachment.modules.items()]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, inputs: Inputs) -> Outputs:
    """Every float tensor that a model returns, by name; its random numbers are the same every time."""
    device = next(model.parameters()).device
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), preserved_rope(model):
        torch.manual_seed(0)
        output = model(**{name: value.to(device) for name, value in inputs.items()}, **cache)
    return dict(_floats(output, ""))


def _floats(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and bool(output.isfinite().any()):
            yield name or "output", output.cpu().double()
        return
    if isinstance(output, Mapping):
        parts = list(output.items())
    else:
        parts = list(enumerate(output)) if isinstance(output, tuple | list) else []
    for key, part in parts:
        yield from _floats(part, f"{name}.{key}" if name else str(key))


def _difference(found: Tensor | None, adapted: Tensor) -> float:
    """‖found − adapted‖ / ‖adapted‖; non-finite values at the same places count as equal."""
    if found is None or found.shape != adapted.shape:
        return math.inf
    same = (found == adapted) | (found.isnan() & adapted.isnan())
    difference = float(torch.where(same, 0.0, found - adapted).norm())
    size = float(adapted[adapted.isfinite()].norm())
    return difference / max(size, 1e-30) if math.isfinite(difference) else math.inf


def _share(found: Tensor | None, adapted: Tensor, base: Tensor) -> float | None:
    """The share of adapted − base that is in found − base; None if fp32 cannot tell adapted from base."""
    if found is None or found.shape != adapted.shape or base.shape != adapted.shape:
        return None
    finite = adapted.isfinite() & base.isfinite() & found.isfinite()
    change, arrived = (torch.where(finite, x - base, 0.0) for x in (adapted, found))
    size = float(change.square().sum())
    if size <= (MEASURABLE * float(base[finite].norm())) ** 2:
        return None
    return float((arrived * change).sum()) / size


def _too_large(folder: Path) -> str | None:
    """Why the check would need too much memory, if it would."""
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    narrowest = min((dtype.itemsize for dtype in stored_dtypes(folder)), default=4)
    need = sum(files) * 4 // narrowest
    limit = min(SHARDS * max(files), int(MEMORY_SHARE * total_memory(torch.device("cpu"))))
    if need <= limit:
        return None
    return (
        f"the model takes {need / 2**30:.1f} GiB in float32, and the check may take {limit / 2**30:.1f} "
        "(two files of the folder, a quarter of the memory); verify=True (--verify) runs it anyway"
    )
