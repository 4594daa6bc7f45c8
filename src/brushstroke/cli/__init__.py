"""The command line: parse the flags, call one public function, print the result.

It has no logic of its own. `--help` loads neither torch nor transformers.
"""

from brushstroke.cli.app import main

__all__ = ["main"]
