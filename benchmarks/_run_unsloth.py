"""One run of Unsloth by `_run_trainer.py`; Unsloth changes other libraries, so it must be imported first."""

import runpy
from pathlib import Path

import unsloth  # noqa: F401

runpy.run_path(str(Path(__file__).with_name("_run_trainer.py")), run_name="__main__")
