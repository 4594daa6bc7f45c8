"""Writers that are killed at random moments, while a reader loads in a loop: it sees one version, whole.

A save over an adapter, a merge over a folder, a checkpoint, a finished run; once with the system's exchange
of folders, and once where that answers EINVAL. `make sweep` kills 75 times in each of the eight cases,
`make test` a few times, at moments that the seed chooses.
"""

import ctypes
import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import brushstroke as bs
from brushstroke.adapter import Adapter, Card
from brushstroke.errors import AdapterFileError, BaseLoadError, ResumeError
from brushstroke.lowrank import LowRank
from brushstroke.merging import merge_folder
from brushstroke.outputs import clear_leftovers, exchange
from brushstroke.training.checkpoint import load_session, save_session
from brushstroke.training.folder import RunFolder
from sampling import SEED, WHOLE
from toys import tiny_llama

KILLS = 75 if WHOLE else 4
SITES = {f"model.layers.{layer}.self_attn.{name}": 8 for layer in range(2) for name in ("q_proj", "o_proj")}
MISSING = "there is no|No such file"  # what a reader says in the window between two renames


class Case(NamedTuple):
    """What is written where, and how it is read."""

    out: Path
    write: Callable[[int], object]  # a version, of that number
    read: Callable[[], set[int]]  # the numbers of the versions that its parts are of


def version(number: int, width: int) -> Adapter:
    updates = {site: LowRank(torch.full((width, 1), float(number)), torch.ones(1, width)) for site in SITES}
    return Adapter(updates, Card(chat_template=f"version {number}"))


def numbers(adapter: Adapter) -> set[int]:
    assert adapter.card is not None
    reported = int(str(adapter.card.chat_template).split()[-1])
    return {
        reported,
        *(int(value) for update in adapter.values() for value in update.tensors()["U"].flatten()),
    }


def adapter_case(tmp_path: Path) -> Case:
    out = tmp_path / "out" / "adapter"
    return Case(
        out,
        lambda number: bs.save(version(number, 4), out, overwrite=True),
        lambda: numbers(bs.load(out)),
    )


def merge_case(tmp_path: Path) -> Case:
    model = tiny_llama()
    width = model.config.hidden_size
    with torch.no_grad():
        for site in SITES:
            model.get_submodule(site).weight.zero_()
    model.save_pretrained(tmp_path / "base")
    out = tmp_path / "out" / "merged"

    def read() -> set[int]:
        found = bs.load_base(out, device="cpu", dtype="float32").model
        weights = [found.get_submodule(site).weight.mean() for site in SITES]
        return {round(float(weight)) for weight in weights}

    def write(number: int) -> None:
        adapter = version(number, width)
        merge_folder(tmp_path / "base", adapter, out, overwrite=True, verify=False)

    return Case(out, write, read)


def checkpoint_case(tmp_path: Path) -> Case:
    session = bs.Training(tiny_llama(), bs.LoraConfig(rank=2))
    out = tmp_path / "out" / "step-00000001"

    def write(number: int) -> None:
        with torch.no_grad():
            for parameter in session.parameters:
                parameter.fill_(float(number))
        session.steps = number
        save_session(session, out)

    def read() -> set[int]:
        load_session(session, out)
        return {session.steps, *(int(parameter.max()) for parameter in session.parameters)}

    return Case(out, write, read)


def run_case(tmp_path: Path) -> Case:
    out = tmp_path / "out" / "run"
    session = bs.Training(tiny_llama(), bs.LoraConfig(rank=2))

    def write(number: int) -> None:
        with RunFolder(out, overwrite=True) as folder:
            folder.claim()
            folder.open(0)
            folder.record("metrics.jsonl", {"step": 1, "loss": 1.0, "real_tokens": 1})
            session.steps = 1
            save_session(session, folder.checkpoint(1))
            folder.prune(0)
            bs.save(version(number, 4), out, overwrite=True)  # as a callback of the run may do
            folder.record("metrics.jsonl", {"step": 2, "loss": 1.0, "real_tokens": 1})
            folder.finish(version(number, 4), {"steps": 1, "settings": {}, "versions": {}})
            session.steps = 2
            save_session(session, folder.checkpoint(2))

    return Case(out, write, lambda: numbers(bs.load(out)))


CASES = {"save": adapter_case, "merge": merge_case, "checkpoint": checkpoint_case, "run": run_case}


def look(case: Case, way: str) -> int | None:
    """The version that a reader finds; None between two renames."""
    try:
        found = case.read()
    except (AdapterFileError, BaseLoadError, ResumeError) as error:
        if way == "two renames" and re.search(MISSING, str(error)):
            return None
        raise
    (number,) = found
    return number


def forked(action: Callable[[], object]) -> int:
    """The number of a process that does something, and ends with 0 if it went well."""
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return child


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::brushstroke.formats.peft.UnfinishedRunWarning")
@pytest.mark.parametrize("way", ["exchange", "two renames"])
@pytest.mark.parametrize("kind", CASES)
def test_a_killed_writer_leaves_one_version_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    if way == "two renames":
        monkeypatch.setattr(exchange, "_swap", lambda: lambda *_: ctypes.set_errno(errno.EINVAL) or -1)
    chosen = random.Random(f"{SEED} {kind} {way}")
    case = CASES[kind](tmp_path)
    case.write(1)
    began = time.perf_counter()
    case.write(2)
    seconds, known = time.perf_counter() - began, 2
    stop, seen = tmp_path / "stop", tmp_path / "seen"

    def read_on() -> None:
        found: dict[int | None, int] = {}
        while not stop.exists():
            number = look(case, way)
            found[number] = found.get(number, 0) + 1
            time.sleep(0.002)
        seen.write_text(json.dumps(list(found.items())))

    reader = forked(read_on)
    died = 0
    try:
        for number in range(3, 3 + KILLS):
            writer = forked(lambda number=number: case.write(number))
            time.sleep(chosen.uniform(0.0, 1.6 * seconds))
            os.kill(writer, signal.SIGKILL)
            died += os.WIFSIGNALED(os.waitpid(writer, 0)[1])
            left = look(case, way)
            assert left in (known, number) or left is None
            known = left or known
            if left is None:  # the next write puts the old one back before all else
                clear_leftovers(case.out, lambda name: True)
                assert look(case, way) == known
    finally:
        stop.touch()
        ended = os.waitpid(reader, 0)[1]
    assert ended == 0
    case.write(1000)
    assert look(case, way) == 1000
    assert not [path.name for path in (tmp_path / "out").rglob("*") if ".partial-" in path.name]
    counts = dict(json.loads(seen.read_text()))
    print(
        f"{kind}, {way}: {died} of {KILLS} died in {seconds:.3f} s; the reader loaded {sum(counts.values())}"
    )
    assert died
    assert counts.keys() - {None}
