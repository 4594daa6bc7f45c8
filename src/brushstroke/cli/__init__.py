"""The command line: parse, call one public function, print.

It holds no logic of its own, and `--help` loads neither torch nor transformers.
"""

from brushstroke.cli.app import main

__all__ = ["main"]
