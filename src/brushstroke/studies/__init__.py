"""Runs the LoRA paper's experiments on any model and data: arms, runs, statistics, one report.

Does not implement training or analyses (`training` and `analysis` do). Each question is a module: `targets`,
`rank`, `seeds`, `delta`, `intrinsic`, `rounding`. `run_studies` runs them.
"""

from brushstroke.studies.arm_run import Task
from brushstroke.studies.arms import Arm, Run, rate_grid
from brushstroke.studies.delta import DeltaStudy
from brushstroke.studies.executors import Executor, in_process, processes
from brushstroke.studies.findings import Figure, Finding, Table
from brushstroke.studies.inputs import make_material
from brushstroke.studies.intrinsic import IntrinsicStudy
from brushstroke.studies.page import write_report
from brushstroke.studies.presets import (
    paper_questions,
    smollm2_paper,
    tiny_intrinsic,
    tiny_paper,
    tiny_rounding,
)
from brushstroke.studies.rank import RankStudy
from brushstroke.studies.rounding import RoundingStudy
from brushstroke.studies.runner import Estimate, Grid, Progress
from brushstroke.studies.seeds import SeedsStudy
from brushstroke.studies.study import Material, Report, Study, run_studies
from brushstroke.studies.targets import TargetsStudy

__all__ = [
    "Arm",
    "DeltaStudy",
    "Estimate",
    "Executor",
    "Figure",
    "Finding",
    "Grid",
    "IntrinsicStudy",
    "Material",
    "Progress",
    "RankStudy",
    "Report",
    "RoundingStudy",
    "Run",
    "SeedsStudy",
    "Study",
    "Table",
    "TargetsStudy",
    "Task",
    "in_process",
    "make_material",
    "paper_questions",
    "processes",
    "rate_grid",
    "run_studies",
    "smollm2_paper",
    "tiny_intrinsic",
    "tiny_paper",
    "tiny_rounding",
    "write_report",
]
