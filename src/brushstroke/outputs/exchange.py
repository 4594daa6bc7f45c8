"""Swapping two folders in one step, where the system and the file system can."""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_UNAVAILABLE = {
    errno.ENOSYS,
    errno.EINVAL,
    errno.EXDEV,
    errno.EBUSY,
    errno.ENOTSUP,
    errno.EPERM,  # of a sandbox that does not know the call
}
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders; False where that cannot be had here, and nothing was done.

    Raises:
        OSError: they cannot be swapped for another reason.
    """
    swap = _swap()
    if swap is None:
        return False
    if swap(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNAVAILABLE:
        return False
    raise OSError(number, os.strerror(number), str(second))


@functools.cache
def _swap() -> Callable[[bytes, bytes], int] | None:
    """The call of the C library: renameat2(RENAME_EXCHANGE) of Linux, renamex_np(RENAME_SWAP) of macOS."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            call = library.renamex_np
            return lambda first, second: call(first, second, _RENAME_SWAP)
        call = library.renameat2
    except (OSError, TypeError, AttributeError):
        return None
    return lambda first, second: call(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
