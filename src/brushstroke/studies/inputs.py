"""Builds the inputs of a study from the user's model and data: three splits that share no example.

Does not parse files or rows (`data` does).
"""

from collections.abc import Sequence
from typing import Any

import torch

from brushstroke.base import Base, hidden_size
from brushstroke.checks import check_new_rows
from brushstroke.data import Example
from brushstroke.errors import DataError
from brushstroke.studies.arm_run import Task
from brushstroke.studies.arms import OTHER, TASK, rate_grid
from brushstroke.studies.runner import Grid
from brushstroke.studies.study import Material
from brushstroke.studies.words import counted
from brushstroke.training import TrainConfig
from brushstroke.training.config import default_learning_rate
from brushstroke.training.setup import RunRequest, read_data

HELD_OUT_SHARE = 0.1  # share of the rows for validation, and for the test, if no file is given
MOST_HELD_OUT = 256


def make_material(
    base: Base,
    data: Any,
    *,
    validation: Any = None,
    test: Any = None,
    other: Any = None,
    general: Any = None,
    config: TrainConfig | None = None,
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> Material:
    """Read the data of a study.

    Args:
        base: the frozen model.
        data: the training data of the task; anything that `train` accepts.
        validation, test: separate data; if None, a fixed tenth of the rows each, at most 256.
        other: data of another task, the control of `SeedsStudy`; rows that the task also has are removed.
        general: general text, for measuring divergence from the base; rows of the tasks are removed.
        config: the training settings of every run; one epoch by default.
        learning_rates: rates to choose from; by default four around the default of `TrainConfig`.
        seeds: of every arm.
        prompt_column, completion_column: other names for "prompt" and "completion".

    Raises:
        DataError: data cannot be read, there are too few rows to split, or the control has only rows of the
            task.
        ConfigError: settings are invalid.
    """
    config = config or TrainConfig(epochs=1)
    request = RunRequest(config, prompt_column=prompt_column, completion_column=completion_column)

    def read(source: Any) -> tuple[Example, ...]:
        return tuple(read_data(base, source, request))

    found = {
        TASK: _task(
            "the given data", read(data), *(None if x is None else read(x) for x in (validation, test))
        )
    }
    description = {"model": base.name or type(base.model).__name__, "data": _told(found[TASK])}
    used = _tokens(found[TASK])
    if other is not None:
        found[OTHER] = _task("the other data", _new(read(other), used, "the other data"), None, None)
        used |= _tokens(found[OTHER])
        description["other task"] = _told(found[OTHER])
    rates = tuple(learning_rates) or rate_grid(default_learning_rate(hidden_size(base.model)))
    texts = () if general is None else _new(read(general), used, "the general text")[:MOST_HELD_OUT]
    return Material(base, found, config, Grid(rates, tuple(seeds)), texts, description)


def _task(
    name: str,
    examples: tuple[Example, ...],
    validation: tuple[Example, ...] | None,
    test: tuple[Example, ...] | None,
) -> Task:
    named = [{example.tokens for example in given or ()} for given in (validation, test)]
    if shared := named[0] & named[1]:
        raise DataError(
            f"{name}: the validation data and the test data share {counted(len(shared), 'row')}; remove them "
            "from one of the two, because the learning rate must not be chosen on test rows"
        )
    rest = list({e.tokens: e for e in examples if e.tokens not in named[0] | named[1]}.values())
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0)).tolist()
    share = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(rest))))
    missing = (validation is None) + (test is None)
    if len(rest) < missing * share + 1:
        raise DataError(
            f"{name}: too few rows for training, validation and test ({len(rest)} different); give more "
            "rows, or separate files (--validation, --test)"
        )
    parts = {}
    for split, given in (("validation", validation), ("test", test)):
        if given is None:
            chosen, order = order[:share], order[share:]
            given = tuple(rest[index] for index in sorted(chosen))
        parts[split] = given
    train = tuple(rest[index] for index in sorted(order))
    return Task(name, train, parts["validation"], parts["test"], len(examples) - len(rest))


def _tokens(task: Task) -> set[tuple[int, ...]]:
    return {e.tokens for e in (*task.train, *task.validation, *task.test)}


def _new(examples: tuple[Example, ...], used: set[tuple[int, ...]], name: str) -> tuple[Example, ...]:
    """The examples that are in no task.

    Raises:
        DataError: there are none.
    """
    new = tuple(example for example in examples if example.tokens not in used)
    check_new_rows(name, new)
    return new


def _told(task: Task) -> str:
    parts = (len(task.train), len(task.validation), len(task.test))
    text = "{} rows to learn from, {} for validation, {} for the test".format(*parts)
    return text + (f"; {task.repeated} left out that were there twice" if task.repeated else "")
