"""Compares the outputs of the merged model with those of the adapted model, if there is enough memory.

It writes no files and makes no decision: it reports a number.
"""

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

MEMORY_SHARE = 0.25
SHARDS = 2

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class CheckResult:
    """The drift of a merged model's outputs, or why there is none.

    Args:
        drift: ‖merged − adapted‖ / ‖adapted‖ of the output that differs most.
        outputs: the names of the outputs.
        skipped: what was not measured, and why.
    """

    drift: float | None = None
    outputs: tuple[str, ...] = ()
    skipped: str | None = None


def check_merged(
    source: Base | str,
    adapter: Adapter,
    merged: Path,
    wanted: bool | None = None,
    *,
    trust_remote_code: bool = False,
) -> CheckResult:
    """‖merged − adapted‖ / ‖adapted‖ of all float outputs on generated inputs.

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
    base = source if isinstance(source, Base) else load(source, dtype="float32")
    with attach(base, adapter, allow_different_base=True) as attachment:  # checked before
        trials, idle, failure = _try_inputs(base.model, attachment)
    missed = f"{len(idle)} of {len(adapter)} sites, such as {idle[0]}: {failure}" if idle else None
    if not trials:
        return CheckResult(skipped=missed)
    if not isinstance(source, Base):
        del base
        gc.collect()
    dtype = str(source.dtype).removeprefix("torch.") if isinstance(source, Base) else "float32"
    model = load(merged, dtype=dtype).model
    drifts: dict[str, float] = {}
    for inputs, adapted in trials:
        found = _run(model, inputs)
        for name, expected in adapted.items():
            drifts[name] = max(drifts.get(name, 0.0), _difference(found.get(name), expected))
    return CheckResult(max(drifts.values()), tuple(drifts), missed)


def _try_inputs(
    model: nn.Module, attachment: Attachment
) -> tuple[list[tuple[Inputs, Outputs]], list[str], str]:
    """Generated inputs and the outputs of an adapted model, until each of its sites has run.

    Also returns the sites that no input reached, and why.
    """
    trials: list[tuple[Inputs, Outputs]] = []
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
            trials.append((inputs, outputs))
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
        "(two files of the folder, a quarter of the memory); verify=True (--verify) runs it all the same"
    )
