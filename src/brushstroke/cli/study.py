"""The command `study`: repeats an experiment of the LoRA paper on the user's model and data.

It turns flags into settings of `brushstroke.studies`.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from brushstroke.checks import check_integer, check_new_rows, check_number, check_rates, check_sets
from brushstroke.cli.adapters import load
from brushstroke.cli.console import emit_json, lines, people, print_text, results, say
from brushstroke.cli.early import check_data, say_what_was_read
from brushstroke.cli.options import BaseOptions, Device, Dtype, Use
from brushstroke.cli.progress import LINE_SECONDS, clock
from brushstroke.cli.study_command import study_command
from brushstroke.cli.values import Whole, split
from brushstroke.errors import ConfigError, OutputError, require
from brushstroke.locate import require_base_files
from brushstroke.outputs import RunLock, check_output_folder, output_errors
from brushstroke.study_folder import check_folder, planned_before, require_settings

if TYPE_CHECKING:
    from brushstroke.studies import Material, Progress, Study
    from brushstroke.studies.runner import Estimate

Question = Literal["rank", "seeds", "targets", "delta", "intrinsic", "rounding", "paper"]
QUESTION, RUNS, DATA = Group("Question", sort_key=1), Group("Runs", sort_key=2), Group("Data", sort_key=3)
TITLES = {
    "rank": "What rank is enough?",
    "seeds": "What do seeds share?",
    "targets": "Which matrices should get the parameters?",
    "delta": "How does the update relate to the weights?",
    "intrinsic": "How many dimensions does the task need?",
    "rounding": "What does bfloat16 keep of an adapter?",
    "paper": "The questions of the LoRA paper",
}
STUDIES = {"paper": ["targets", "rank", "seeds", "delta"]}  # names of studies, where it is not the question's
ONLY_FOR = {
    "ranks": ("rank", "delta", "rounding"),
    "steps": ("rounding",),
    "rank": ("seeds", "targets", "intrinsic"),
    "sets": ("targets",),
    "budget": ("targets",),
    "dimensions": ("intrinsic",),
    "targets": ("rank", "seeds", "delta", "intrinsic", "rounding"),
    "scale_rule": ("rank",),
    "alpha": ("rank", "seeds", "targets", "delta", "intrinsic", "rounding"),
    "no_whole": ("rank", "delta"),
    "margin": ("rank", "targets"),
    "other": ("seeds", "paper"),
    "general": ("delta", "paper"),
}


@Parameter(name="*", group=QUESTION)
@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Settings of the question.

    Args:
        targets: The matrices to adapt, separated by commas [default: all-linear].
        ranks: Ranks to compare, separated by commas (rank, delta, rounding).
        rank: One rank (seeds, intrinsic), or the rank of every set instead of a budget (targets).
        alpha: Numerator of the scale, the same for all arms [default: 16].
        scale_rule: The scale: alpha/rank, or alpha/√rank (rank) [default: standard].
        sets: Sets of matrices to compare, separated by commas, with members joined by + (targets), such as
            q_proj,v_proj,q_proj+v_proj,all-linear.
        budget: Number of trained parameters of every set (targets).
        dimensions: Dimensions of the random subspaces, separated by commas (intrinsic).
        steps: Numbers of training steps to compare, separated by commas (rounding) [default: 1,5,20,100].
        no_whole: Leave out full fine-tuning (rank, delta).
        margin: Margin of equality, in nats of test loss per trained token (rank, targets) [default: 0.01].
        tiny: Use a small model, trained first on texts of the Python installation (paper, intrinsic,
            rounding).
        smollm2: Use SmolLM2-135M and labelled addresses, both downloaded (paper).
    """

    targets: str | None = None
    ranks: str | None = None
    rank: Whole = None
    alpha: float | None = None
    scale_rule: Literal["standard", "rslora"] | None = None
    sets: str | None = None
    budget: Whole = None
    dimensions: str | None = None
    steps: str | None = None
    no_whole: Annotated[bool | None, Parameter(negative=())] = None
    margin: float | None = None
    tiny: bool = False
    smollm2: bool = False


@Parameter(name="*", group=RUNS)
@dataclass(frozen=True, kw_only=True)
class StudyRunOptions:
    """Settings of the runs, and their number.

    Args:
        seeds: Number of seeds of every arm [default: 3; 5 for rounding and with --tiny].
        learning_rates: Learning rates to choose from on the validation data, or to compare (rounding),
            separated by commas [default: four around the default of train; 1e-5,1e-4,1e-3 for rounding].
        epochs: Passes over the data in every run [default: 1].
        max_steps: Optimiser steps of every run, instead of --epochs.
        batch_size: Examples per optimiser step [default: 8].
        budget_minutes: Plan only runs that fit into this time, and list those left out.
        workers: Number of simultaneous runs, each in a process with one thread; for small models
            [default: 1; one per core with --tiny and --smollm2].
        overwrite: Remove the finished runs in --out and start over.
        reread: Analyse the finished runs in --out again with this version; train nothing.
    """

    seeds: Whole = None
    learning_rates: str | None = None
    epochs: float | None = None
    max_steps: Whole = None
    batch_size: Whole = None
    budget_minutes: float | None = None
    workers: Whole = None
    overwrite: bool = False
    reread: bool = False


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class StudyDataOptions:
    """The data on which runs are measured.

    Args:
        validation: Data for choosing learning rates [default: a tenth of DATA].
        test: Data for the numbers of the report [default: another tenth of DATA].
        other: Data of another task, as a control (seeds, paper).
        general: General text, on which divergence from the base is measured (delta, paper).
        prompt: Name of the column with the prompts [default: prompt].
        completion: Name of the column with the completions [default: completion].
        use: Use the chosen answers of preference data, or the texts of data with text and label.
        max_length: Longest example in tokens [default: the model's context].
    """

    validation: str | None = None
    test: str | None = None
    other: str | None = None
    general: str | None = None
    prompt: str | None = None
    completion: str | None = None
    use: Use = None
    max_length: Whole = None


def study(
    question: Question,
    base: str | None = None,
    data: str | None = None,
    *,
    out: Path,
    question_options: QuestionOptions | None = None,
    run_options: StudyRunOptions | None = None,
    data_options: StudyDataOptions | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: bool = False,
    png: bool = False,
    csv: bool = False,
    latex: bool = False,
    json: bool = False,
) -> None:
    """Repeat an experiment of the LoRA paper on a model and data, and write a report.

    To continue an interrupted study, give the same command again; finished runs are not repeated.

    Args:
        question: rank: what rank is enough; seeds: what seeds share; targets: which matrices should get the
            parameters; delta: how ΔW relates to W; intrinsic: how many dimensions; rounding: what
            bfloat16 keeps of an adapter; paper: the first four.
        base: A model folder, a hub id or a .gguf file; not with --tiny or --smollm2.
        data: The data of the task, as for train; not with --tiny or --smollm2.
        out: The folder of the study, for report.html, results.json and all runs.
        dtype: Dtype of the base; auto is float32 here, because bf16 loses small steps when W is trained.
        device: The device to run on.
        trust_remote_code: Run Python code from the base's folder if transformers does not have its class.
        png: Also write the figures as PNG and SVG files.
        csv: Also write the tables as CSV files.
        latex: Also write the tables as LaTeX files.
        json: Print results.json on stdout.
    """
    given, settings, files = (
        question_options or QuestionOptions(),
        run_options or StudyRunOptions(),
        data_options or StudyDataOptions(),
    )
    _refuse_misplaced(question, {**vars(given), **vars(files)})
    asked = _question_settings(given)
    rates = _check_runs(settings)
    if question == "rounding":
        _refuse_lengths(settings)
    out = out.expanduser()
    if settings.reread and settings.overwrite:
        raise ConfigError(
            "give --reread or --overwrite, not both: one keeps the runs, the other removes them"
        )
    seeds = _seeds(question, given, settings)
    preset = "--tiny" if given.tiny else "--smollm2" if given.smollm2 else None
    rows: dict[str, Any] = {}
    if preset is not None:
        chosen = {
            **{name: value for name, value in vars(given).items() if name not in ("tiny", "smollm2")},
            **vars(settings),
            **vars(files),
            "dtype": dtype,
            "device": device,
            "trust_remote_code": trust_remote_code or None,
        }
        _refuse_with_preset(question, preset, base, data, chosen)
    elif base is None or data is None:
        raise ConfigError(f"expected a base and data: brushstroke study {question} BASE DATA --out DIR")
    else:
        require_base_files(base)
    _check_out(out, settings, {"studies": STUDIES.get(question, [question]), "seeds": seeds}, given.tiny)
    if base is not None and data is not None:
        rows = _read(data, files)
    for name in ("altair", "vl_convert"):
        require(name, extra="report")  # before hours of runs, not after
    require("scipy.special", extra="study")
    from brushstroke.cores import usable_cores
    from brushstroke.studies import (
        in_process,
        paper_questions,
        processes,
        run_studies,
        write_report,
    )
    from brushstroke.studies.presets import SMOL_MINUTES

    workers, budget = settings.workers or 1, settings.budget_minutes
    if base is None:
        studies, material = _preset(question, preset, out, seeds, settings.overwrite)
        workers = settings.workers or usable_cores()
        if given.smollm2 and budget is None:
            budget = SMOL_MINUTES
    else:
        single = None if question == "paper" else _study(question, asked)
        fixed: dict[str, Any] = {"epochs": 1.0}
        if question == "rounding":
            from brushstroke.studies import rounding

            assert isinstance(single, rounding.RoundingStudy)
            fixed = single.training
            rates = rates or rounding.RATES
        loading = BaseOptions(
            dtype="float32" if dtype == "auto" else dtype, device=device, trust_remote_code=trust_remote_code
        )
        material = _material(base, rows, rates, seeds, settings, files, loading, fixed)
        if question == "rounding":
            shorten = ("fewer steps (--steps)", "fewer learning rates (--learning-rates)")
            material = replace(material, shorten=shorten)
        studies = paper_questions(material) if single is None else [single]
    execute = processes(workers) if workers > 1 else in_process
    if workers > 1 and material.base.device.type != "cpu":
        raise ConfigError("--workers works only on the CPU; on a GPU, leave it out")
    with _Progress(workers, settings) as progress:
        report = run_studies(
            studies,
            material,
            out,
            overwrite=settings.overwrite,
            budget_minutes=budget,
            reread=settings.reread,
            execute=execute,
            workers=workers,
            on_estimate=progress.estimate,
            on_run=progress.run,
        )
    for note in report.notes:
        say(note)
    plan = report.results.estimate
    kept = plan.budget_minutes
    if kept is None and plan.left_out:  # a plan of an older version, which did not store its budget
        kept = settings.budget_minutes
    command = study_command(sys.argv[1:], kept)
    page = write_report(report, out, title=TITLES[question], command=command, png=png, csv=csv, latex=latex)
    if json:
        emit_json({**report.as_dict(), "command": command})
        return
    console = results()
    for finding in report.findings:
        print_text(console, finding.question)
        print_text(console, f"{finding.answer}\n", indent=2)
    say(f"the report is in {page}")


def _check_runs(settings: StudyRunOptions) -> tuple[float, ...]:
    """The given learning rates; checks the settings of the runs, before torch is loaded."""
    for name in ("seeds", "workers", "max_steps", "batch_size"):
        value = getattr(settings, name)
        if value is not None:
            check_integer(_flag(name), value)
    for name in ("epochs", "budget_minutes"):
        value = getattr(settings, name)
        if value is not None:
            check_number(_flag(name), value, above=0)
    if settings.learning_rates is None:
        return ()
    rates = _numbers("--learning-rates", settings.learning_rates, float)
    check_rates(rates)
    return rates


def _refuse_lengths(settings: StudyRunOptions) -> None:
    for name in ("epochs", "max_steps"):
        if getattr(settings, name) is not None:
            raise ConfigError(f"the length of these runs is set by --steps; leave out {_flag(name)}")


def _seeds(question: str, given: QuestionOptions, settings: StudyRunOptions) -> list[int]:
    usual = 5 if given.tiny or question == "rounding" else 3
    return list(range(usual if settings.seeds is None else settings.seeds))


def _check_out(out: Path, settings: StudyRunOptions, identity: dict[str, Any], tiny: bool) -> None:
    """Refuse a folder in which this study cannot run, before anything is read, loaded or trained."""
    check_output_folder(out, overwrite=True)  # what it contains is checked with the study's own names
    if settings.reread and planned_before(out) is None:
        raise OutputError(f"{out} contains no study to read again; leave out --reread to run one there")
    check_folder(out, overwrite=settings.overwrite, with_base=tiny)
    if not settings.overwrite:
        require_settings(out, identity)
    if not settings.reread:
        with output_errors(out):
            RunLock(out).refuse_other()


def _refuse_with_preset(
    question: str, flag: str, base: str | None, data: str | None, settings: dict[str, Any]
) -> None:
    """Refuse settings that a preset fixes."""
    free = ("seeds", "workers", "budget_minutes", "overwrite", "reread")
    given = [("BASE", base), ("DATA", data)]
    surplus = [" and ".join(name for name, value in given if value is not None)]
    surplus += [
        _flag(name)
        for name, value in settings.items()
        if name not in free and value is not None and value != "auto"
    ]
    if named := list(filter(None, surplus)):
        raise ConfigError(
            f"{question} {flag} has its own model, data and settings; leave out {', '.join(named[:6])}"
        )


def _preset(
    question: str, flag: str | None, out: Path, seeds: list[int], overwrite: bool
) -> "tuple[list[Study], Material]":
    from brushstroke.studies import smollm2_paper, tiny_intrinsic, tiny_paper, tiny_rounding

    if flag == "--smollm2":
        return smollm2_paper(seeds=seeds)
    make = {"paper": tiny_paper, "intrinsic": tiny_intrinsic, "rounding": tiny_rounding}[question]
    return make(out, seeds=seeds, overwrite=overwrite, on_base=lambda: say("training a small model first"))


def _question_settings(given: QuestionOptions) -> dict[str, Any]:
    """The settings of the question that are given, checked before torch is loaded."""
    found: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("alpha", "rank", "margin", "scale_rule", "budget")
        if getattr(given, name) is not None
    }
    if given.targets is not None:
        found["targets"] = split(given.targets)
    if given.ranks is not None:
        found["ranks"] = _numbers("--ranks", given.ranks, int)
    if given.dimensions is not None:
        found["dimensions"] = _numbers("--dimensions", given.dimensions, int)
    if given.steps is not None:
        found["steps"] = _numbers("--steps", given.steps, int)
    if given.sets is not None:
        found["sets"] = [tuple(part.split("+")) for part in _parts("--sets", given.sets)]
        check_sets(("+".join(members), members) for members in found["sets"])
    if given.no_whole:
        found["train_whole"] = False
    for rank in (*found.get("ranks", ()), found.get("rank", 1)):
        check_integer("rank", rank)
    for steps in found.get("steps", ()):
        check_integer("--steps", steps)
    for dimension in found.get("dimensions", ()):
        check_integer("dimension", dimension)
    check_integer("--budget", found.get("budget", 1))
    for name in ("margin", "alpha"):
        if name in found:
            check_number(_flag(name), found[name], above=0)
    return found


def _study(question: str, settings: dict[str, Any]) -> "Study":
    from brushstroke import studies
    from brushstroke.studies.arms import matrices_name

    if "sets" in settings:
        names = [matrices_name(targets) for targets in settings["sets"]]
        if len(set(names)) < len(names):  # such as q and q_proj
            names = ["+".join(targets) for targets in settings["sets"]]
        sets = dict(zip(names, settings["sets"], strict=True))
        settings = {**settings, "sets": sets}
    kinds: dict[str, Any] = {
        "rank": studies.RankStudy,
        "seeds": studies.SeedsStudy,
        "targets": studies.TargetsStudy,
        "delta": studies.DeltaStudy,
        "intrinsic": studies.IntrinsicStudy,
        "rounding": studies.RoundingStudy,
    }
    return kinds[question](**settings)


def _read(data: str, files: StudyDataOptions) -> dict[str, Any]:
    """The rows of all data that is given, with their columns checked; it needs no torch."""
    from brushstroke.data import find_columns, read_rows

    named = {"data": data, "validation": files.validation, "test": files.test}
    named |= {"other": files.other, "general": files.general}
    rows = {
        name: None
        if source is None
        else read_rows(source, prompt=files.prompt, completion=files.completion, use=files.use)
        for name, source in named.items()
    }
    for read in filter(None, rows.values()):
        find_columns(read, files.prompt, files.completion)
    say_what_was_read(*rows.values())
    controls = {"other": "the other data", "general": "the general text"}
    used: set[int] = set()
    for name, read in rows.items():
        new = set() if read is None else {hash(repr(row)) for row in read.rows} - used
        if read is not None and name in controls:
            check_new_rows(controls[name], new)
        used |= new
    return rows


def _material(
    base: str,
    rows: dict[str, Any],
    rates: tuple[float, ...],
    seeds: list[int],
    settings: StudyRunOptions,
    files: StudyDataOptions,
    loading: BaseOptions,
    training: dict[str, Any],
) -> "Material":
    from brushstroke.studies import make_material
    from brushstroke.training import TrainConfig

    for name in ("epochs", "max_steps", "batch_size"):
        if getattr(settings, name) is not None:
            training[name] = getattr(settings, name)
    if files.max_length is not None:
        training["max_length"] = files.max_length
    config = TrainConfig(**training)
    check_data(
        base,
        rows.values(),
        prompt_column=files.prompt,
        completion_column=files.completion,
        max_length=files.max_length,
        trust_remote_code=loading.trust_remote_code,
    )
    return make_material(
        load(base, loading),
        **rows,
        config=config,
        learning_rates=rates,
        seeds=seeds,
        prompt_column=files.prompt,
        completion_column=files.completion,
    )


def _refuse_misplaced(question: str, given: dict[str, Any]) -> None:
    for name, places in ONLY_FOR.items():
        if given[name] is not None and question not in places:
            raise ConfigError(
                f"{_flag(name)} is for {' and '.join(places)}, not for {question}; leave it out"
            )
    for name, places in (("tiny", ("paper", "intrinsic", "rounding")), ("smollm2", ("paper",))):
        if given[name] and question not in places:
            raise ConfigError(
                f"--{name} is for {' and '.join(places)}: brushstroke study paper --{name} --out DIR"
            )
    if given["tiny"] and given["smollm2"]:
        raise ConfigError("give --tiny or --smollm2, not both")
    if given["rank"] is not None and given["budget"] is not None:
        raise ConfigError("give --rank or --budget, not both")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parts(flag: str, text: str) -> tuple[str, ...]:
    found = split(text)
    if not found:
        raise ConfigError(f"{flag} is empty; give one or more values separated by commas, or leave it out")
    return found


def _numbers(flag: str, text: str, kind: Any) -> tuple[Any, ...]:
    parts = _parts(flag, text)
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        raise ConfigError(f"{flag} expects numbers separated by commas; got {text!r}") from None


class _Progress:
    """Shows progress: a live line on a terminal, elsewhere lines at intervals."""

    def __init__(self, workers: int, settings: StudyRunOptions) -> None:
        self._workers, self._reread = workers, settings.reread
        self._ignored = "" if settings.budget_minutes is None else "; --budget-minutes is ignored"
        self._console = people()
        self._live: Any = None
        self._last_line = time.monotonic()

    def estimate(self, plan: "Estimate") -> None:
        started = ", plus the start of the processes" if self._workers > 1 else ""
        if not self._reread and not plan.finished:
            say(f"{plan.runs} runs, about {clock(plan.seconds)} on this machine if none is done yet{started}")
        if plan.resumed and not self._reread:
            state = "has all its runs" if plan.finished else "continues with its existing plan"
            say(f"the study {state}{self._ignored}")
        for line in plan.left_out:
            say(f"left out by --budget-minutes{' then' if plan.resumed else ''}: {line}")
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def run(self, event: "Progress") -> None:
        outcome = event.outcome
        loss = "diverged" if outcome.validation is None else f"validation {outcome.validation.loss:.4f}"
        line = (
            f"{event.stage} {event.done}/{event.planned}  {outcome.arm}, rate {outcome.learning_rate:g}, "
            f"seed {outcome.seed}: {loss}  {clock(event.seconds_left)} left"
        )
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text("\n".join(lines(self._console, line))))
        elif event.done == event.planned or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print_text(self._console, line)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
