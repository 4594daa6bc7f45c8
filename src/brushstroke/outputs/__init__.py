"""Writes files and folders atomically, and reads folders that other processes may replace.

It does not interpret the contents of the files, apart from checks of who wrote them.
"""

from brushstroke.outputs.foreign import (
    OwnFiles,
    check_output_folder,
    foreign,
    has_keys,
    read_first,
    refuse_existing,
)
from brushstroke.outputs.lock import RunLock, refuse_other_process
from brushstroke.outputs.read import OpenFolder, open_folder, read_unreplaced
from brushstroke.outputs.replace import (
    clear_leftovers,
    clear_leftovers_in,
    remove_own,
    replace_files,
    replace_folder,
)
from brushstroke.outputs.room import kept_in, make_room, size_of
from brushstroke.outputs.write import (
    PARTIAL,
    output_errors,
    remove_empty,
    remove_files,
    remove_partial_files,
    write_file,
    write_files,
)

__all__ = [
    "PARTIAL",
    "OpenFolder",
    "OwnFiles",
    "RunLock",
    "check_output_folder",
    "clear_leftovers",
    "clear_leftovers_in",
    "foreign",
    "has_keys",
    "kept_in",
    "make_room",
    "open_folder",
    "output_errors",
    "read_first",
    "read_unreplaced",
    "refuse_existing",
    "refuse_other_process",
    "remove_empty",
    "remove_files",
    "remove_own",
    "remove_partial_files",
    "replace_files",
    "replace_folder",
    "size_of",
    "write_file",
    "write_files",
]
