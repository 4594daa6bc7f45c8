"""The whole merged model against the whole adapted one, where there is memory for it.

It writes nothing and judges nothing: it reports a number.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.base import Base, load_base, total_memory, unmoved
from brushstroke.layers import attach

TOKENS = 32
MEMORY_SHARE = 0.25
SHARDS = 2


@dataclass(frozen=True)
class CheckResult:
    """The relative drift of the logits, or why there is none."""

    drift: float | None = None
    skipped: str | None = None


def check_merged(
    source: Base | str, adapter: Adapter, merged: Path, wanted: bool | None = None
) -> CheckResult:
    """‖merged − adapted‖ / ‖adapted‖ of the logits on a fixed row of tokens, both models in fp32 on the CPU.

    The folder is loaded as plain transformers would load it.

    Args:
        source: the base, loaded or as a folder.
        adapter: what was merged into it.
        merged: the folder of the merged model.
        wanted: None runs the check only where it needs little memory.
    """
    if wanted is None and (reason := _too_large(merged)):
        return CheckResult(skipped=reason)
    base = source if isinstance(source, Base) else load_base(source, dtype="float32", device="cpu")
    with attach(base, adapter, allow_different_base=True):  # judged before
        adapted = _logits(base)
    if not isinstance(source, Base):
        del base
        gc.collect()
    dtype = str(source.dtype).removeprefix("torch.") if isinstance(source, Base) else "float32"
    found = _logits(load_base(merged, dtype=dtype, device="cpu"))
    return CheckResult(float((found - adapted).norm() / adapted.norm().clamp_min(1e-30)))


def _logits(base: Base) -> Float[Tensor, "n v"]:
    vocabulary = base.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), unmoved(base.model):
        return base.model(input_ids=tokens.to(base.device), use_cache=False).logits[0].cpu().double()


def _too_large(folder: Path) -> str | None:
    """Why the check would need too much memory, if it would."""
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    stored = _itemsize(folder)
    need = sum(files) * 4 // stored
    limit = min(SHARDS * max(files), int(MEMORY_SHARE * total_memory(torch.device("cpu"))))
    if need <= limit:
        return None
    return (
        f"the model takes {need / 2**30:.1f} GiB in float32, and the check may take {limit / 2**30:.1f} "
        "(two files of the folder, a quarter of the memory); verify=True (--verify) runs it all the same"
    )


def _itemsize(folder: Path) -> int:
    from safetensors import safe_open

    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with safe_open(path, framework="pt") as file:
        names = [file.get_slice(key).get_dtype() for key in file.keys()]  # noqa: SIM118
    return min((sizes.get(name, 4) for name in names), default=4)
