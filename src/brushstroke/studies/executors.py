"""Executors: each takes an `ArmRunner` and runs, executes the runs, and yields each run with its outcome.

Do not choose runs (`runner` does). The results of a study do not depend on the order of the outcomes.
"""

import os
import pickle
import signal
import threading
import time
import weakref
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
    """Execute the runs in sequence, in this process."""
    for run in runs:
        yield run, arm_runner.run(run)


def finished_only(arm_runner: ArmRunner, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
    """Execute no run: for reading a finished study again.

    Raises:
        TrainingError: there is an unfinished run.
    """
    if runs:
        first = runs[0]
        raise TrainingError(
            f"this study has {counted(len(runs), 'unfinished run')}, such as {first.arm.name} at rate "
            f"{first.learning_rate:g} with seed {first.seed}; leave out --reread, and they are run"
        )
    yield from ()


def processes(count: int) -> Executor:
    """An executor with several worker processes of one thread each, for models too small for threads.

    Each process gets a copy of the `ArmRunner` once and is reused for later calls with it, because starting a
    process takes seconds. The processes end with the executor, after an error, and when this process ends,
    even if it is killed. A script that uses this executor must guard its code with
    `if __name__ == "__main__":`, because each process imports the script.
    """
    pool: ProcessPoolExecutor | None = None
    served: ArmRunner | None = None
    size = 0
    workers: set[BaseProcess] = set()

    def end() -> None:
        """Stop the pool and terminate its processes, also those with a run in progress."""
        nonlocal pool
        ended, pool = pool, None
        for worker in workers:
            worker.terminate()
        if ended is not None:
            ended.shutdown(wait=True, cancel_futures=True)  # its thread must not outlive the interpreter
        workers.clear()

    def execute(arm_runner: ArmRunner, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        nonlocal pool, served, size
        if not runs:
            return
        if pool is None or arm_runner is not served or size < min(count, len(runs)):
            end()
            served, size, spawn = arm_runner, min(count, len(runs)), get_context("spawn")
            copies = spawn.Queue()  # a thread fills it; each process takes its copy after it has started
            copies.cancel_join_thread()
            # pickled here: multiprocessing would share the memory of the weights, and runs train in place
            copied = pickle.dumps(arm_runner)
            for _ in range(size):
                copies.put(copied)
            pool = ProcessPoolExecutor(size, spawn, initializer=_enter, initargs=(copies, os.getpid()))
        try:
            before = set(active_children())
            with _deferred_interrupts():
                waiting = {pool.submit(_run, run): run for run in runs}
                workers.update(set(active_children()) - before)
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            end()
            raise TrainingError(
                "a worker process of the study ended unexpectedly, probably because memory ran out; run the "
                "command again with fewer processes (--workers 1): it continues with the unfinished runs"
            ) from error
        except BaseException:  # also if the caller stops reading the outcomes
            end()
            raise

    weakref.finalize(execute, end)
    return execute


@contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Context manager: delays Ctrl-C until the end.

    Processes that start inside ignore Ctrl-C, which a terminal sends to all processes; `end` terminates them.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    resource_tracker.ensure_running()  # started before, because its start unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if pending:
        signal.raise_signal(signal.SIGINT)


_arm_runner: ArmRunner | None = None


def _enter(copies: "Queue[bytes]", parent: int) -> None:
    global _arm_runner
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _arm_runner = pickle.loads(copies.get())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(run: Run) -> Outcome:
    assert _arm_runner is not None
    return _arm_runner.run(run)
