"""Where runs happen. An executor is one function: it takes a workshop and runs, and yields what they came to.

In whatever order the outcomes come, the results of a study are the same.
"""

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from brushstroke.errors import TrainingError
from brushstroke.studies.arms import Run
from brushstroke.studies.workshop import Outcome, Workshop

Executor = Callable[[Workshop, Sequence[Run]], Iterator[tuple[Run, Outcome]]]


def in_process(workshop: Workshop, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
    """One run after the other, here."""
    for run in runs:
        yield run, workshop.run(run)


def usable_cores() -> int:
    """The cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processes(count: int) -> Executor:
    """An executor of some processes of one thread each, for models so small that threads do not help.

    Each gets a copy of the workshop once, and serves every later call with that workshop: a start takes
    seconds. They end with the executor, after an error, and when this process does, even if it is killed.
    """
    pool: ProcessPoolExecutor | None = None
    served: Workshop | None = None
    size = 0

    def end() -> None:
        nonlocal pool
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        pool = None

    def execute(workshop: Workshop, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        nonlocal pool, served, size
        if not runs:
            return
        if pool is None or workshop is not served or size < min(count, len(runs)):
            end()
            # As bytes: multiprocessing itself would share the weights' memory, and runs train in place.
            copied = pickle.dumps(workshop)
            served, size = workshop, min(count, len(runs))
            pool = ProcessPoolExecutor(
                size, get_context("spawn"), initializer=_enter, initargs=(copied, os.getpid())
            )
        try:
            waiting = {pool.submit(_run, run): run for run in runs}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            end()
            raise TrainingError(
                "a process of the study ended by itself, most likely for want of memory; start it again with "
                "fewer processes (--workers 1): it goes on with what is not finished"
            ) from error
        except BaseException:  # also when nobody asks for the rest
            end()
            raise

    return execute


_workshop: Workshop | None = None


def _enter(copied: bytes, parent: int) -> None:
    global _workshop
    torch.set_num_threads(1)
    _workshop = pickle.loads(copied)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(run: Run) -> Outcome:
    assert _workshop is not None
    return _workshop.run(run)
