"""Chooses device and dtype by fixed rules on the machine's features; reads the total memory of the device.

It loads nothing, measures no times and does not read free memory.
"""

import os
import platform
from pathlib import Path

import torch

from brushstroke.checks import check_choice
from brushstroke.errors import ConfigError, did_you_mean

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "64"}


def limit_kernel_caches() -> None:
    """Limit the kernel caches of oneDNN and of torch's interface to it; each keeps 1,024 kernels by default.

    oneDNN builds a kernel for each number of rows. Packed passes nearly always have a new number, so old
    kernels are useless and cost up to a megabyte each. The limits take effect only before the process's first
    matrix product in oneDNN (bf16, and fp32 with AVX-512). Values that the user has set are kept.
    """
    for name, value in KERNEL_CACHES.items():
        os.environ.setdefault(name, value)


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device of this name; "auto" is a CUDA GPU, otherwise Apple's MPS, otherwise the CPU.

    Raises:
        ConfigError: an unknown name, or a device that this machine does not have.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        known = ("auto", "cpu", "cuda", "mps")
        hint = did_you_mean(str(device), known)
        raise ConfigError(
            f"device must be one of {', '.join(known)} (or cuda:N); got {device!r}{hint}"
        ) from error
    present = {
        "cuda": torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(chosen.type, True):
        raise ConfigError(f"device {device!r} is not available on this machine; use 'cpu' or 'auto'")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the frozen base on a device, and the reason.

    "auto" is bfloat16 on a GPU and on a CPU that multiplies bf16 natively (avx512_bf16, amx_bf16, ARM's
    bf16), float32 on any other CPU: there bf16 arithmetic is emulated and slower.

    Raises:
        ConfigError: an unknown name.

    >>> choose_dtype("float32", torch.device("cpu"))
    (torch.float32, 'asked for')
    """
    if dtype in DTYPES:
        return DTYPES[dtype], "asked for"
    check_choice("dtype", dtype, ("auto", *DTYPES))
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU multiplies bf16 natively"
        return torch.float16, "this GPU is older than native bf16 (compute capability 8.0)"
    if device.type == "mps":
        return torch.bfloat16, "MPS holds bf16"
    if feature := _native_bf16():
        return torch.bfloat16, f"this processor multiplies bf16 natively ({feature})"
    return torch.float32, "this processor has no native bf16"


def _native_bf16() -> str | None:
    features = torch.cpu.get_capabilities()
    names = ("amx_bf16", "avx512_bf16") if platform.machine().lower() in ("x86_64", "amd64") else ("bf16",)
    return next((name for name in names if features.get(name)), None)


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory; on a CPU the machine's, or the container's limit if it is lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_container_limits()])


def _container_limits() -> list[int]:
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return limits
