"""Measures the memory of this process and estimates the memory that a training pass needs.

It does not read the free memory, so that the same command always gives the same passes and the same bits.
"""

import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from brushstroke.base import model_dtype, total_memory

CPU_MICRO_TOKENS = 1024  # matrix products reach full speed at this many rows; more only cost memory
LOW_MICRO_TOKENS = 512
GPU_MICRO_TOKENS = 16384
MIN_MICRO_TOKENS = 128
USABLE = 0.7  # share of the total memory that a run may plan to use
PROCESS_BYTES = 600 * 2**20  # interpreter, torch, transformers, and memory that loading does not return
PROBED_TOKENS = 48  # length of the longer of the two passes that measure the memory per token
WORKSPACE_BYTES = 160 * 2**20  # used by BLAS, autograd and the allocator, measured on a CPU
MODES = ("auto", "low", "fast")


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the process on a CPU, of torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # VmHWM counts this process only; ru_maxrss on Linux starts at the peak of the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory(device: torch.device) -> int:
    """Bytes in use now: by the process on a CPU, by torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory(device)
    return pages * resource.getpagesize()


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run needs, by part.

    Args:
        weights: of the base and the adapter.
        moments: two numbers for every number of the factors.
        gradients: of the factors.
        per_token: of one computed token, from the forward to the backward pass.
        head: the logits that exist at one time.
        process: the process without a model.
        workspace: memory of the libraries during training.
    """

    weights: int
    moments: int
    gradients: int
    per_token: int
    head: int
    process: int
    workspace: int

    def total(self, micro_tokens: int) -> int:
        """Bytes with passes of this many computed tokens; depends only on the model and the config."""
        return self.process + self.weights + self.during(micro_tokens)

    def during(self, micro_tokens: int, several: bool = True) -> int:
        """Bytes that training adds to a process that holds the model.

        If a step is one pass (not `several`), activations are freed while gradients are allocated.
        """
        activations = self.per_token * micro_tokens
        both = activations + self.gradients if several else max(activations, self.gradients)
        return self.moments + self.head + self.workspace + both


def kept_per_token(
    run: Callable[[int], Tensor], parameters: Iterable[Tensor], context: int | None = None
) -> int:
    """Bytes that a forward pass saves for its backward pass, per token of its input.

    Args:
        run: a forward pass of this many tokens; its result is not used.
        parameters: tensors that do not count because they exist anyway.
        context: the largest number of tokens that the model can run.
    """
    longer = max(1, min(PROBED_TOKENS, (context or PROBED_TOKENS + 1) - 1))  # its example has one more token
    probed = (max(1, longer // 3), longer)
    known = {p.untyped_storage().data_ptr() for p in parameters}
    found = []
    for tokens in probed:
        kept: dict[int, int] = {}

        def count(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            result = run(tokens)
        found.append(sum(kept.values()))
        del result
    return max(0, found[1] - found[0]) // max(1, probed[1] - probed[0])


def need_of(
    model: nn.Module, factors: Iterable[Tensor], kept: int, widest: int, logits: int, device: torch.device
) -> MemoryNeed:
    """The memory that training needs.

    Args:
        model: with the adapter in it.
        factors: the trained tensors.
        kept: see `kept_per_token`.
        widest: the width of the widest site; its gradients are added for the backward pass.
        logits: the number of logits in one chunk.
        device: on which it runs.
    """
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    trained = sum(factor.numel() * factor.element_size() for factor in factors)
    size = model_dtype(model).itemsize
    return MemoryNeed(
        weights=sum(weights.values()),
        moments=2 * trained,
        gradients=trained,
        per_token=kept + 4 * widest * size,
        head=logits * max(4, size),
        process=PROCESS_BYTES if device.type == "cpu" else 0,
        workspace=WORKSPACE_BYTES if device.type == "cpu" else 0,
    )


def choose_mode(fast: MemoryNeed, asked: str, device: torch.device) -> tuple[str, str]:
    """ "fast" or "low", and why: low if a full-size pass would not fit into the machine's total memory."""
    if asked != "auto":
        return asked, "asked for"
    largest = CPU_MICRO_TOKENS if device.type == "cpu" else GPU_MICRO_TOKENS
    total = total_memory(device)
    reason = f"{fast.total(largest) / 2**30:.1f} GiB of {total / 2**30:.0f} GiB"
    return ("fast", reason) if fast.total(largest) <= USABLE * total else ("low", reason)


def choose_micro_tokens(need: MemoryNeed, mode: str, device: torch.device) -> tuple[int, str]:
    """The number of computed tokens of one pass that fits into the machine's total memory, and why.

    Returns:
        The number, a multiple of 64, and the reason in one line.
    """
    largest = GPU_MICRO_TOKENS
    if device.type == "cpu":
        largest = LOW_MICRO_TOKENS if mode == "low" else CPU_MICRO_TOKENS
    total = total_memory(device)
    room = USABLE * total - need.total(0)
    fitting = int(room // need.per_token) // 64 * 64 if room > 0 else 0
    if fitting >= largest:
        kind = "memory=low" if mode == "low" else f"the most that speeds a {device.type.upper()} up"
        return largest, f"{kind}; {total / 2**30:.0f} GiB would hold more"
    return max(MIN_MICRO_TOKENS, fitting), f"what {USABLE:.0%} of {total / 2**30:.1f} GiB holds"
