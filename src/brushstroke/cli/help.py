"""The layout of `--help`: flag names are never broken.

The texts are in the docstrings of the commands.
"""

from typing import Any

from cyclopts.help import DefaultFormatter
from cyclopts.help.specs import ColumnSpec, NameRenderer, get_default_parameter_columns

INDENT = 2  # cells by which further lines of names are indented


class HelpFormatter(DefaultFormatter):
    """cyclopts' formatter with a column that is as wide as the longest flag."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """Print one panel."""
        columns = _columns if panel.format == "parameter" else None
        DefaultFormatter(column_specs=columns)(console, options, panel)


def _columns(console: Any, options: Any, entries: Any) -> tuple[ColumnSpec, ...]:
    longest = INDENT + max(len(label) for entry in entries for label in entry.display_labels_with_metavar)
    return tuple(
        _widened(column, longest) if column.header == "Option" else column
        for column in get_default_parameter_columns(console, options, entries)
    )


def _widened(column: ColumnSpec, least: int) -> ColumnSpec:
    width = max(column.max_width or 0, least)
    return column.copy(no_wrap=True, max_width=width, renderer=NameRenderer(max_width=width))
