"""Where runs happen: an executor takes an `ArmRunner` and runs, and yields each run with its outcome.

In whatever order the outcomes come, the results of a study are the same.
"""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue

import torch

from brushstroke.errors import TrainingError
from brushstroke.studies.arm_run import ArmRunner, Outcome
from brushstroke.studies.arms import Run
from brushstroke.studies.words import counted

Executor = Callable[[ArmRunner, Sequence[Run]], Iterator[tuple[Run, Outcome]]]


def in_process(arm_runner: ArmRunner, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
    """One run after the other, here."""
    for run in runs:
        yield run, arm_runner.run(run)


def finished_only(arm_runner: ArmRunner, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
    """No run at all: a finished study is read again, and nothing is trained.

    Raises:
        TrainingError: a run is not finished.
    """
    if runs:
        first = runs[0]
        raise TrainingError(
            f"this study has {counted(len(runs), 'unfinished run')}, such as {first.arm.name} at rate "
            f"{first.learning_rate:g} with seed {first.seed}; leave out --reread, and they are run"
        )
    yield from ()


def usable_cores() -> int:
    """The cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processes(count: int) -> Executor:
    """An executor of some processes of one thread each, for models so small that threads do not help.

    Each gets a copy of the arm_runner once, and serves every later call with that arm_runner: a start takes
    seconds. They end with the executor, after an error, and when this process does, even if it is killed.
    A script that uses it keeps its own code under `if __name__ == "__main__":`, as each process imports it.
    """
    pool: ProcessPoolExecutor | None = None
    served: ArmRunner | None = None
    size = 0
    workers: set[BaseProcess] = set()

    def end() -> None:
        """Runs that are under way end too: nobody would keep what they come to."""
        nonlocal pool
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
        pool = None
        workers.clear()

    def execute(arm_runner: ArmRunner, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        nonlocal pool, served, size
        if not runs:
            return
        if pool is None or arm_runner is not served or size < min(count, len(runs)):
            end()
            served, size, spawn = arm_runner, min(count, len(runs)), get_context("spawn")
            copies = spawn.Queue()  # filled by a thread: a process takes its copy when it has started
            copies.cancel_join_thread()
            # As bytes: multiprocessing itself would share the weights' memory, and runs train in place.
            copied = pickle.dumps(arm_runner)
            for _ in range(size):
                copies.put(copied)
            pool = ProcessPoolExecutor(size, spawn, initializer=_enter, initargs=(copies, os.getpid()))
        try:
            before = set(active_children())
            with _interrupts_held():
                waiting = {pool.submit(_run, run): run for run in runs}
                workers.update(set(active_children()) - before)
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


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Inside, Ctrl-C waits. Processes that start inside never hear it (a terminal tells all): we end them."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    resource_tracker.ensure_running()  # which lets signals through when it starts
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


_workshop: ArmRunner | None = None


def _enter(copies: "Queue[bytes]", parent: int) -> None:
    global _workshop
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _workshop = pickle.loads(copies.get())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(run: Run) -> Outcome:
    assert _workshop is not None
    return _workshop.run(run)
