"""Sends the metrics of a run to an experiment tracker, through accelerate.

It keeps nothing itself: the metrics of a run are in its folder.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brushstroke.errors import ConfigError, require
from brushstroke.training.events import EvalEvent, StepEvent

PROJECT = "brushstroke"  # the name of the project, or of the folder of logs
LOGS = "logs"  # folder in the run's folder, for trackers that write files
EXTRA = "track"


class TrackingWarning(UserWarning):
    """A tracker failed; the run goes on without it."""


class Tracking:
    """One run's connection to a tracker; it begins with the first optimiser step.

    Args:
        make: opens the tracker.
        settings: of the run; sent once, by a new run.
        resumed_from: the step of the checkpoint from which the run continues; 0 for a new run.
    """

    def __init__(self, make: Callable[[], Any], settings: Mapping[str, Any], resumed_from: int) -> None:
        self._make, self._settings, self._resumed_from = make, settings, resumed_from
        self._tracker: Any = None
        self._before: EvalEvent | None = None
        self._is_on = True

    def step(self, event: StepEvent) -> None:
        """Send one optimiser step."""
        self._try(self._begin)
        values = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/real_tokens_per_second": event.real_tokens / event.seconds,
            "train/peak_memory_gib": event.peak_memory_bytes / 2**30,
        }
        self._log(values, event.step)

    def evaluation(self, event: EvalEvent) -> None:
        """Send one evaluation; one before the first step is sent with that step."""
        if self._tracker is None and not event.step:
            self._before = event
        else:
            self._try(self._begin)
            self._log({"eval/loss": event.loss}, event.step)

    def close(self) -> None:
        """Finish."""
        if self._tracker is not None:
            self._try(self._tracker.finish)

    def _begin(self) -> None:
        if self._tracker is not None:
            return
        self._tracker = self._make()
        if not self._resumed_from:
            self._tracker.store_init_configuration(_flat(self._settings))
        if self._before is not None:
            self._log({"eval/loss": self._before.loss}, 0)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._tracker.log(values, step=step))

    def _try(self, call: Callable[[], object]) -> None:
        """Call a method of the tracker. Its errors must not end a run, so they become a warning."""
        if not self._is_on:
            return
        try:
            call()
        except Exception as error:
            self._is_on = False
            warnings.warn(
                f"the tracker failed, so the run goes on without it: {type(error).__name__}: {error}",
                TrackingWarning,
                stacklevel=2,
            )


@contextmanager
def tracked(
    make: Callable[[int], Any] | None, settings: Mapping[str, Any], resumed_from: int
) -> Iterator[Tracking | None]:
    """Context manager: the tracking of a run, or None without a tracker.

    Args:
        make: from `find_tracker`.
        settings: of the run.
        resumed_from: the step of the checkpoint from which the run continues; 0 for a new run.
    """
    if make is None:
        yield None
        return
    tracking = Tracking(lambda: make(resumed_from), settings, resumed_from)
    try:
        yield tracking
    finally:
        tracking.close()


def find_tracker(name: str | None, out: str | Path | None) -> Callable[[int], Any] | None:
    """A function that opens a tracker of accelerate, for a run that continues from a step; None without name.

    Args:
        name: such as "tensorboard" or "wandb".
        out: the folder of the run; trackers that write files do so in `logs` in it.

    Raises:
        ConfigError: the name is unknown, its package is not installed, or it writes files and there is no
            folder.
        MissingPackageError: accelerate is not installed.
    """
    if name is None:
        return None
    accelerate = require("accelerate.tracking", extra=EXTRA)
    classes = {str(key): value for key, value in accelerate.LOGGER_TYPE_TO_CLASS.items()}
    installed = sorted(map(str, accelerate.get_available_trackers()))
    if name not in classes:
        raise ConfigError(f"there is no tracker {name!r}; choose one of {', '.join(sorted(classes))}")
    if name not in installed:
        raise ConfigError(
            f"the tracker {name!r} is not installed; install its package (pip install {name}), or choose one "
            f"of those that are: {', '.join(installed) or 'none'}"
        )
    writes_files = classes[name].requires_logging_directory
    if writes_files and out is None:
        raise ConfigError(f"the tracker {name!r} writes files, so the run needs a folder; give out")

    def make(resumed_from: int) -> Any:
        from accelerate import PartialState

        PartialState()  # which process of several this is: only the first one logs
        options: dict[str, Any] = {}
        if name == "tensorboard":  # hide the later steps of an earlier run, or of an interrupted one
            options["purge_step"] = resumed_from + 1 if resumed_from else 0
        places = [str(Path(out).expanduser() / LOGS)] if writes_files and out is not None else []
        tracker = classes[name](PROJECT, *places, **options)
        if hasattr(tracker, "start"):  # accelerate 1.10 opens it at once
            tracker.start()
        return tracker

    return make


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as single values, such as "lora.rank": no other types than numbers and texts, or JSON."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": found for inner, found in _flat(value).items()}
        elif value is not None:
            flat[name] = value if isinstance(value, int | float | str) else json.dumps(value, default=str)
    return flat
