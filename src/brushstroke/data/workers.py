"""Runs a function on items in several processes that import neither the user's script nor torch.

It is for work that holds Python's lock, such as rendering chat templates. Function and items are pickled.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from queue import SimpleQueue
from subprocess import PIPE
from typing import Any, TypeVar

from brushstroke.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
_START = "import sys; sys.path[:] = {paths!r}; from brushstroke.data.workers import serve; serve()"
_ALONE = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # each process uses one core


def map_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[Result]:
    """The results of a function for items, in order, computed in processes; few items are in memory at once.

    The processes end with the iterator, and when this process ends, even if it is killed. If they cannot be
    started, or the function cannot be pickled, the results are computed in this process.

    Args:
        function: can be pickled.
        items: read as the processes need them.
        count: of processes.

    Raises:
        DataError: a process ended unexpectedly.
        Exception: what the function raised.
    """
    with ExitStack() as stack:
        processes = _start(function, count, stack)
        if not processes:
            yield from map(function, items)
            return
        threads = stack.enter_context(ThreadPoolExecutor(count))
        stack.callback(lambda: [process.end() for process in processes])  # before it waits for the threads
        free: SimpleQueue[_Process] = SimpleQueue()
        for process in processes:
            free.put(process)
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(threads.submit(_run, free, item))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def serve() -> None:
    """The main function of a process: read the function, then answer items until there are no more."""
    items, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that the function prints may get between the results

    def answer(make: Callable[[], Any]) -> None:
        try:
            found = pickle.dumps((make(), None), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            found = pickle.dumps((None, error))
        results.write(found)
        results.flush()

    with suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):  # the main process has ended
        content = pickle.load(items)
        function: Any = None

        def read() -> None:
            nonlocal function
            function = pickle.loads(content)

        answer(read)
        while True:
            item = pickle.load(items)
            answer(partial(function, item))


def _start(function: Any, count: int, stack: ExitStack) -> list["_Process"]:
    """Processes that have read the function; none if it cannot be pickled, or they cannot be started."""
    processes = []
    try:
        content = pickle.dumps(pickle.dumps(function))
        for _ in range(count):
            processes.append(_Process(content))
            stack.callback(processes[-1].close)
        for process in processes:
            _, error = process.answer()
            if error is not None:
                raise error
    except Exception:  # of the user's tokenizer, or of the system
        return []
    return processes


class _Process:
    """A process that serves the function, and its pipes."""

    def __init__(self, function: bytes) -> None:
        command = [sys.executable or "python", "-c", _START.format(paths=[str(path) for path in sys.path])]
        environment = {**os.environ, **_ALONE}
        self._process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True
        )  # without the terminal's Ctrl-C, on which the main process acts
        self._items: Any = self._process.stdin
        self._results: Any = self._process.stdout
        self._send(function)

    def run(self, item: bytes) -> tuple[Any, Exception | None]:
        """The result of the function for a pickled item, or its error."""
        self._send(item)
        return self.answer()

    def answer(self) -> tuple[Any, Exception | None]:
        """What the process answers next: a result, or an error."""
        return pickle.load(self._results)

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill the process and close the pipes."""
        self.end()
        for pipe in (self._items, self._results):
            with suppress(OSError):
                pipe.close()

    def _send(self, content: bytes) -> None:
        self._items.write(content)
        self._items.flush()


def _run(free: SimpleQueue[_Process], item: Any) -> Any:
    process = free.get()
    try:
        result, error = process.run(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
    except (EOFError, OSError, pickle.UnpicklingError) as ended:
        raise DataError(
            "a process that tokenises the data ended unexpectedly, probably because memory ran out; repeat "
            "the command when more memory is free"
        ) from ended
    finally:
        free.put(process)
    if error is not None:
        raise error
    return result
