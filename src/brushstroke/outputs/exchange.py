"""Exchanges two folders in one step, if the system and the file system support it.

It has no fallback: the caller renames the folders instead.
"""

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
    errno.EPERM,  # from a sandbox that does not support the call
}
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders; returns False, and changes nothing, if this is not supported here.

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
    """The C library function: renameat2(RENAME_EXCHANGE) on Linux, renamex_np(RENAME_SWAP) on macOS."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            call = library.renamex_np
            return lambda first, second: call(first, second, _RENAME_SWAP)
        call = library.renameat2
    except (OSError, TypeError, AttributeError):
        return None
    return lambda first, second: call(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
