"""How much memory a process used, and how much a training pass will need.

Nothing here looks at free memory: one command gives the same passes, and the same bits, every time.
"""

import resource
import sys
from dataclasses import dataclass

import torch
from torch import nn

from brushstroke.adapter import Site
from brushstroke.base import total_memory

CPU_MICRO_TOKENS = 1024  # products of this many rows run at full speed; more only costs memory
GPU_MICRO_TOKENS = 16384
MIN_MICRO_TOKENS = 128
USABLE = 0.7  # share of the total memory that a run may plan with
PROCESS_BYTES = 450 * 2**20  # interpreter, torch, transformers


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the process on a CPU, of torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run needs, by part."""

    weights: int
    adapter: int
    per_token: int
    head: int
    process: int

    def total(self, micro_tokens: int) -> int:
        """Bytes with passes of this many computed tokens."""
        return self.weights + self.adapter + self.head + self.process + self.per_token * micro_tokens


def estimate(
    model: nn.Module, sites: list[Site], ranks: dict[str, int], checkpointing: bool, device: torch.device
) -> MemoryEstimate:
    """What training needs, from the shapes of the model and of the sites.

    Every adapted site keeps x·U and a share of its input and output; what lies between the products (norms,
    rotations, activations) keeps about as much again.
    """
    weights = sum(p.numel() * p.element_size() for p in _unique(model))
    factors = sum(ranks[s.path] * (s.d + s.h) for s in sites if s.path in ranks)
    config = getattr(model, "config", None)
    hidden = getattr(config, "hidden_size", None) or max((s.d for s in sites), default=0)
    layers = getattr(config, "num_hidden_layers", None) or 1
    size = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    kept = 1.25 * sum(s.d + s.h for s in sites if not s.is_output) + 6 * hidden * layers
    per_token = kept if not checkpointing else 2 * kept / layers + hidden * layers
    vocabulary = getattr(config, "vocab_size", None) or 0
    return MemoryEstimate(
        weights=weights,
        adapter=4 * 4 * factors,  # factors, gradients, two moments, all fp32
        per_token=int(per_token * size) + 4 * 4 * hidden,
        head=min(3 * 64 * 2**20, 3 * 4 * vocabulary * CPU_MICRO_TOKENS),
        process=PROCESS_BYTES if device.type == "cpu" else 0,
    )


def choose_micro_tokens(need: MemoryEstimate, device: torch.device) -> tuple[int, str]:
    """The computed tokens of one pass that fit the machine's total memory, and why.

    Returns:
        The number, a multiple of 64, and the reason in one line.
    """
    largest = CPU_MICRO_TOKENS if device.type == "cpu" else GPU_MICRO_TOKENS
    total = total_memory(device)
    room = USABLE * total - need.total(0)
    fitting = int(room // need.per_token) // 64 * 64 if room > 0 else 0
    if fitting >= largest:
        return (
            largest,
            f"the most that speeds a {device.type.upper()} up; {total / 2**30:.0f} GiB would hold more",
        )
    chosen = max(MIN_MICRO_TOKENS, fitting)
    return chosen, f"what {USABLE:.0%} of {total / 2**30:.1f} GiB holds"


def _unique(model: nn.Module) -> list[torch.Tensor]:
    return list({id(p): p for p in model.parameters()}.values())
