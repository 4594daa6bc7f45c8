"""The interface of a study (its arms, and its finding from their results), and `run_studies`.

Does not implement a question (`targets`, `rank`, `seeds`, `delta` and `intrinsic` do). Several studies can
share one folder and one report: an arm that two of them need runs once.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from brushstroke.base import Base
from brushstroke.data import Example
from brushstroke.errors import ConfigError, ResumeError
from brushstroke.sites import Site
from brushstroke.sites.walk import find_sites
from brushstroke.studies.arm_run import ArmRunner, Estimator, Score, Task
from brushstroke.studies.arms import Arm, exact
from brushstroke.studies.executors import Executor, finished_only, in_process
from brushstroke.studies.findings import Finding
from brushstroke.studies.runner import (
    Estimate,
    Grid,
    Progress,
    Results,
    all_finished,
    estimate,
    run_arms,
)
from brushstroke.studies.store import START_OVER, Store, damaged
from brushstroke.study_folder import (
    RUNS,
    STUDY,
    base_before,
    check_folder,
    locked,
    planned_before,
    require_settings,
)
from brushstroke.training import TrainConfig
from brushstroke.training.summary import versions

LEFT_OUT = "because of the time budget (--budget-minutes)"
BY_A_SAMPLE = (
    "The base was compared with that of the runs by the hash of an older version, which contains 64 values "
    "or a few more of each weight: a base that differs in other values is not noticed."
)
USED = (  # settings of a training config that runs use; rates and seeds come from the grid
    *("epochs", "max_steps", "schedule", "warmup", "weight_decay", "clip", "batch_size"),
    *("micro_tokens", "memory", "max_length"),
)


@dataclass(frozen=True)
class Material:
    """The inputs of a study: model, data and training settings.

    Args:
        base: the frozen model.
        tasks: "task", and "other task" if there is a control.
        general: general text, for measuring divergence from the base; may be empty.
        config: training settings of every run; learning rates and seeds come from the grid.
        grid: learning rates and seeds of each arm.
        description: the description of model and data in the report: name → text.
        shorten: what shortens a run or the search for its rate, for the error of a budget that is too small.
    """

    base: Base
    tasks: Mapping[str, Task]
    config: TrainConfig
    grid: Grid
    general: tuple[Example, ...] = ()
    description: Mapping[str, str] = field(default_factory=dict)
    shorten: tuple[str, ...] = ("fewer steps (--max-steps)", "fewer learning rates (--learning-rates)")

    @property
    def sites(self) -> list[Site]:
        """Every adaptable weight of the model."""
        return find_sites(self.base.model)


class Study(Protocol):
    """A question that runs can answer."""

    @property
    def name(self) -> str:
        """The name of the study in settings."""
        ...

    def arms(self, material: Material) -> list[Arm]:
        """The arms that the study needs.

        Raises:
            ConfigError, TargetError: the study is not possible with this model or data.
        """
        ...

    def read(self, results: Results, arm_runner: ArmRunner) -> Finding:
        """The finding from the results."""
        ...


@dataclass(frozen=True)
class Report:
    """A finished study.

    Args:
        findings: an answer to each question.
        results: of all arms.
        settings: model, data and settings.
        seconds: the time of all sessions, each until its last run; reading finished runs adds nothing.
        notes: limitations of all findings.
    """

    findings: tuple[Finding, ...]
    results: Results
    settings: Mapping[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The contents of results.json."""
        return {
            "versions": versions(),
            "settings": self.settings,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "estimate": self.results.estimate.as_dict(),
            "untouched": {name: asdict(score) for name, score in self.results.untouched.items()},
            "arms": {
                name: {
                    "arm": found.arm.as_dict(),
                    "tried": {exact(rate): loss for rate, loss in found.tried.items()},
                    "chosen": found.chosen,
                    "edge": found.edge,
                    "conclusive": found.conclusive,
                    "outcomes": {str(seed): o.as_dict() for seed, o in found.outcomes.items()},
                }
                for name, found in self.results.arms.items()
            },
            "findings": [
                {
                    "question": one.question,
                    "answer": one.answer,
                    "notes": list(one.notes),
                    "data": one.data,
                }
                for one in self.findings
            ],
        }


def run_studies(
    studies: Sequence[Study],
    material: Material,
    out: str | Path,
    *,
    overwrite: bool = False,
    reread: bool = False,
    budget_minutes: float | None = None,
    execute: Executor = in_process,
    workers: int = 1,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_run: Callable[[Progress], None] | None = None,
) -> Report:
    """Execute every run that is not finished in the folder, and compute the findings.

    Args:
        studies: the questions.
        material: model and data.
        out: the folder; an interrupted study in it is resumed.
        overwrite: start over.
        reread: read finished runs again, also those of an older version, and execute none.
        budget_minutes: plan only what fits, and report what was left out. A resumed study keeps its plan;
            with more minutes, or None, it continues with what was left out.
        execute: the executor of the runs.
        workers: number of parallel runs of `execute`, for the estimate and the remaining time.
        on_estimate: called before the first run, also if none is left.
        on_run: called after every run.

    Raises:
        ConfigError: a study is not possible with this model or data, or the budget is too small.
        OutputError: the folder contains other files, or a file of the study in it is damaged, or another
            process runs a study in it.
        ResumeError: the folder contains another study, or one of an older version that is to be continued.
        TrainingError: every run diverged.
    """
    folder = Path(out).expanduser()
    check_folder(folder, overwrite=overwrite)
    if reread:
        execute = finished_only
    arms = _all_arms(studies, material)
    inputs = (material.base, material.tasks, material.general, material.config, folder / RUNS)
    arm_runner = ArmRunner(*inputs)
    for arm in arms.values():
        arm_runner.numbers(arm)  # raises errors now instead of after hours
    settings, notes = _settings(studies, material, list(arms.values())), ()
    with nullcontext() if reread else locked(folder):
        known = None if overwrite else planned_before(folder)
        if not overwrite:
            if _has_older_hash(folder, material.base, settings["base"], reread):
                settings["base"], notes = base_before(folder), (BY_A_SAMPLE,)
            require_settings(folder, settings)
        began = time.perf_counter()

        def plan_anew(before: Estimate | None = None) -> Estimate:
            every, grid, shorten = list(arms.values()), material.grid, material.shorten
            return estimate(
                Estimator(*inputs), every, grid, workers, budget_minutes, execute, shorten, before
            )

        if known is None:
            plan = plan_anew()
        else:
            with damaged(folder / STUDY, START_OVER):
                plan = Estimate.from_dict(known, tuple(arms), material.grid.seeds)
            if plan.left_out and not reread and plan.has_less_than(budget_minutes):
                plan = plan_anew(plan)
            else:
                plan = replace(plan, resumed=True)
        store = Store(folder, settings, overwrite=overwrite)
        with damaged(folder / STUDY, START_OVER):
            kept = [arms[name] for name in plan.arms]
        store.keep_note("plan", plan.as_dict())
        margins = _margins(store, studies, is_new=known is None)
        if known is not None:
            plan = replace(plan, finished=all_finished(store, kept, material.grid, plan))
        if on_estimate:
            on_estimate(plan)
        untouched = _untouched(store, material, arm_runner)
        found = run_arms(
            arm_runner,
            store,
            kept,
            material.grid,
            plan,
            execute=execute,
            workers=workers,
            on_run=_keeping_time(store, began, on_run),
        )
        rows = {
            name: tuple(example.trained for example in task.test) for name, task in material.tasks.items()
        }
        results = Results(store, found, untouched, plan, tuple(arms), rows, margins)
        findings = tuple(
            _with_left_out(study.read(results, arm_runner), study.arms(material), results)
            for study in studies
        )
        return Report(findings, results, settings, float(store.note("seconds") or 0.0), notes)


def _all_arms(studies: Sequence[Study], material: Material) -> dict[str, Arm]:
    """Name → arm, of all studies.

    Raises:
        ConfigError: two studies have different arms of the same name.
    """
    arms: dict[str, Arm] = {}
    for study in studies:
        for arm in study.arms(material):
            if arms.setdefault(arm.name, arm) != arm:
                raise ConfigError(
                    f"two studies define the arm {arm.name!r} differently; run them in separate folders"
                )
    return arms


def _margins(store: Store, studies: Sequence[Study], *, is_new: bool) -> Mapping[str, float]:
    """Study → margin of equality that was stored before the runs; stores those of a new study."""
    stated = store.note("margins")
    if is_new and stated is None:
        asked = {study.name: getattr(study, "margin", None) for study in studies}
        stated = {name: margin for name, margin in asked.items() if margin is not None}
        store.keep_note("margins", stated)
    return stated or {}


def _untouched(store: Store, material: Material, arm_runner: ArmRunner) -> dict[str, Score]:
    """The scores of the base, measured once for a folder."""
    known = store.note("untouched")
    if known is None:
        measured = {name: asdict(score) for name, score in arm_runner.untouched().items()}
        known = json.loads(json.dumps(measured))
        store.keep_note("untouched", known)
    with damaged(store.folder / STUDY, START_OVER):
        return {name: Score.from_dict(known[name]) for name in (*material.tasks, *known)}


def _keeping_time(
    store: Store, began: float, on_run: Callable[[Progress], None] | None
) -> Callable[[Progress], None]:
    """A callback that stores the time of all sessions after every run."""
    with damaged(store.folder / STUDY, START_OVER):
        spent = float(store.note("seconds") or 0.0)

    def after_run(progress: Progress) -> None:
        store.keep_note("seconds", spent + time.perf_counter() - began)
        if on_run:
            on_run(progress)

    return after_run


def _with_left_out(finding: Finding, arms: Sequence[Arm], results: Results) -> Finding:
    """The finding, with the arms of its study that the time budget left out in the answer."""
    missing = [f'"{arm.name}"' for arm in arms if arm.name not in results.arms]
    if not missing:
        return finding
    if len(missing) == len(arms):
        return replace(finding, answer=f"No arm of this question was run, {LEFT_OUT}.")
    return replace(finding, answer=f"{finding.answer} Not run, {LEFT_OUT}: {', '.join(missing)}.")


def _has_older_hash(folder: Path, base: Base, now: str, reread: bool) -> bool:
    """Whether the study in the folder has the hash of an older version for this base.

    Older versions took 64 values of each weight. Such a study can be read again; its runs are not continued,
    because the versions do not train alike.

    Raises:
        ResumeError: it has, and it is to be continued.
    """
    then = base_before(folder)
    if then is None or then == now or then != _hash_sample(base):
        return False
    if not reread:
        raise ResumeError(
            f"{folder} holds a study of an older version, and this version would not train its runs alike; "
            "read the finished runs again (--reread), or choose another folder"
        )
    return True


def _settings(studies: Sequence[Study], material: Material, arms: Sequence[Arm]) -> dict[str, Any]:
    """The settings that a resumed study must share; the report prints them."""
    hashes = {name: _hash([*t.train, *t.validation, *t.test]) for name, t in material.tasks.items()}
    return {
        "studies": [study.name for study in studies],
        "model": dict(material.description),
        "base": _hash_weights(material.base),
        "dtype": str(material.base.dtype).removeprefix("torch."),
        "data": {**hashes, "general": _hash(material.general)},
        "training": {key: value for key, value in material.config.as_dict().items() if key in USED},
        "learning_rates": list(material.grid.rates),
        "seeds": list(material.grid.seeds),
        "arms": [arm.as_dict() for arm in arms],
    }


def _hash(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.tokens, example.weights)).encode())
    return digest.hexdigest()[:16]


def _hash_sample(base: Base) -> str:
    """The hash of the base in studies of older versions: of 64 values or a few more of each weight."""
    digest = hashlib.sha256()
    for name, weight in base.model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to(torch.float32).cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash_weights(base: Base) -> str:
    """A hash of every weight."""
    digest = hashlib.sha256()
    for name, weight in base.model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
