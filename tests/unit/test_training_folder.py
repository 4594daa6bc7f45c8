"""The output folder of a run: its own files are replaced, others kept, and killed runs can continue."""

import errno
import json
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest

import brushstroke as bs
from brushstroke.errors import ConfigError, OutputError
from brushstroke.formats import ADAPTER_FILES
from brushstroke.formats.peft import UnfinishedRunWarning
from brushstroke.outputs import lock, replace
from brushstroke.outputs.lock import LOCKS
from brushstroke.training.checkpoint import FORMAT, load_session, save_session, sealed
from brushstroke.training.folder import RunFolder
from toys import random_adapter, tiny_llama

METRIC = '{"step": 1, "loss": 2.5, "real_tokens": 40}\n'
EVALUATION = '{"step": 1, "loss": 2.5, "trained_tokens": 4}\n'
SUMMARY = '{"settings": {}, "versions": {}, "steps": 4}\n'
CARD = '{"format": 1, "base_name": "tiny", "lora": {}}\n'
PEFT = '{"peft_type": "LORA"}\n'


def state(step: int, best_step: int = 0) -> str:
    extra = {"totals": {"best_step": best_step}}
    fields = {"format": FORMAT, "steps": step, "micro_tokens": 64, "learning_rate": 0.1, "extra": extra}
    return json.dumps(sealed(fields))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


STEP = "checkpoints/step-00000002"
BEST = "checkpoints/best-00000002"
RUN_OF_OURS = {
    "metrics.jsonl": METRIC,
    "eval.jsonl": EVALUATION,
    "run.json": SUMMARY,
    "brushstroke.json": CARD,
    "adapter_config.json": PEFT,
    "adapter_model.safetensors": "weights",
    "chat_template.jinja": "template",
    "README.md": "card",
    f"{STEP}/state.json": state(2),
    f"{STEP}/state.safetensors": "tensors",
    f"{BEST}/adapter_model.safetensors": "weights",
    f"{BEST}/brushstroke.json": CARD,
    f"{BEST}/README.md": "card",
}
ADAPTER_OF_OURS = {name: RUN_OF_OURS[name] for name in ADAPTER_FILES}


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize(
    "files",
    [
        {"metrics.jsonl": "a,b\n", "README.md": "mine"},
        {"metrics.jsonl": "", "README.md": "mine"},
        {"eval.jsonl": "not JSON"},
        {"run.json": ""},
        {"README.md": "mine", "metrics.jsonl": METRIC},
        {"README.md": "mine", f"{STEP}/state.json": state(2)},
        {"adapter_config.json": PEFT, "adapter_model.safetensors": "theirs", "README.md": "theirs"},
        {"adapter_config.json": PEFT, "adapter_model.safetensors": "theirs"},
        {"adapter_model.safetensors": "theirs", "run.json": '{"name": "theirs"}'},
        {f"{STEP}/state.json": '{"epoch": 3}'},
        {f"{STEP}/state.json": ""},
        {f"{STEP}/state.json": '{"epoch": 3}', "metrics.jsonl": METRIC},
        {f"{STEP}/state.safetensors": "theirs"},
        {f"{BEST}/README.md": "theirs"},
        {"README.md/page.txt": "mine", **{k: v for k, v in RUN_OF_OURS.items() if k != "README.md"}},
        {"checkpoints": "a file", "brushstroke.json": CARD, "adapter_model.safetensors": "weights"},
    ],
)
def test_overwrite_and_resume_refuse_foreign_files(tmp_path: Path, files: dict[str, str], flag: str) -> None:
    write(tmp_path, files)
    if flag == "resume" and "run.json" in files and "settings" in files["run.json"]:
        (tmp_path / "adapter_model.safetensors").unlink()  # a finished run is not begun again
        files = contents(tmp_path)
    with pytest.raises(OutputError, match=r"was not written by brushstroke|--overwrite"):
        RunFolder(tmp_path, **{flag: True}).open(0)  # type: ignore[arg-type]
    assert contents(tmp_path) == files


def test_overwrite_replaces_damaged_runs(tmp_path: Path) -> None:
    for damage in ({}, {"metrics.jsonl": '{"st'}, {"eval.jsonl": ""}, {"run.json": '{"set'}):
        write(tmp_path, {**RUN_OF_OURS, **damage, "notes.txt": "mine"})
        folder = RunFolder(tmp_path, overwrite=True)
        folder.open(0)
        folder.record("metrics.jsonl", json.loads(METRIC))
        assert contents(tmp_path) == {**ADAPTER_OF_OURS, "metrics.jsonl": METRIC, "notes.txt": "mine"}


def test_adapter_without_run_is_replaced_only_with_overwrite_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    write(tmp_path, ADAPTER_OF_OURS)
    with pytest.raises(OutputError, match="--overwrite"):
        RunFolder(tmp_path, resume=True)
    assert contents(tmp_path) == ADAPTER_OF_OURS
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.claim()
        folder.open(0)
        assert contents(tmp_path) == ADAPTER_OF_OURS
        before = tmp_path.stat().st_ino
        new = random_adapter(tiny_llama(), bs.LoraConfig(rank=1))
        folder.finish(new, {"steps": 1, "settings": {}, "versions": {}})
        assert tmp_path.stat().st_ino != before  # exchanged in one step
        assert bs.load(tmp_path).keys() == new.keys()
        assert folder.complete
        with pytest.raises(OutputError, match="another run is writing"):  # it has locked the new one
            RunFolder(tmp_path, overwrite=True)
    RunFolder(tmp_path, overwrite=True)


def test_resume_starts_over_if_a_run_with_overwrite_stopped_before_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    write(tmp_path, {**ADAPTER_OF_OURS, "metrics.jsonl": METRIC, "notes.txt": "mine"})
    with RunFolder(tmp_path, resume=True) as folder:
        assert not folder.resuming
        folder.claim()
        folder.open(0)


def test_load_says_that_the_run_of_the_folder_has_not_finished(tmp_path: Path) -> None:
    out = bs.save(random_adapter(tiny_llama(), bs.LoraConfig(rank=1)), tmp_path / "out")
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')  # of another program
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bs.load(out)
    (out / "metrics.jsonl").write_text(METRIC)
    with pytest.warns(
        UnfinishedRunWarning, match="has not finished .*, and the adapter there is not its res"
    ):
        bs.load(out)
    (out / "run.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bs.load(out)


def test_load_ignores_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    out = bs.save(random_adapter(tiny_llama(), bs.LoraConfig(rank=1)), tmp_path / "out")
    (out / "metrics.jsonl").mkdir()
    assert bs.load(out).rank == 1


@pytest.mark.parametrize("made_again", [False, True])
def test_a_run_whose_folder_was_removed_stops_and_writes_nothing(tmp_path: Path, made_again: bool) -> None:
    adapter, out = random_adapter(tiny_llama(), bs.LoraConfig(rank=1)), tmp_path / "out"
    with RunFolder(out) as folder:
        folder.claim()
        out.rmdir()
        if made_again:
            write(out, {"notes.txt": "mine"})
        writes = (
            lambda: folder.open(0),
            lambda: folder.record("metrics.jsonl", json.loads(METRIC)),
            lambda: folder.save_best(adapter, 1),
            lambda: folder.finish(adapter, {"steps": 1, "settings": {}, "versions": {}}),
        )
        for action in writes:
            with pytest.raises(OutputError, match="out is no longer the folder of this run"):
                action()
    assert out.exists() == made_again
    assert not made_again or contents(out) == {"notes.txt": "mine"}


def test_a_folder_that_is_removed_during_the_first_check_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(lock.RunLock, "refuse_other", gone)
    with pytest.raises(OutputError, match=r"cannot write .*: No such file"):
        RunFolder(tmp_path)


def test_user_files_among_checkpoints_are_kept(tmp_path: Path) -> None:
    mine = {
        f"{STEP}/notes.txt": "mine",
        f"{STEP}/README.md": "mine",
        f"{BEST}/notes.txt": "mine",
        "checkpoints/best-00000001/notes.txt": "mine",
        "checkpoints/step-00000001/notes.txt": "mine",
        ".partial-download": "mine",
        ".thesis.txt.partial-0123abcd": "mine",
        ".metrics.jsonl.partial-x": "mine",
        ".metrics.jsonl.partial-0123abcd/half.bin": "mine",
        "checkpoints/.thesis.partial-0123abcd/new/half.bin": "mine",
        "checkpoints/.step-00000002.partial-0123abcd/half.bin": "mine",
    }
    ours = {
        ".metrics.jsonl.partial-1123abcd": METRIC,
        ".adapter_config.json.partial-0123abcd": PEFT,
        "checkpoints/.step-00000002.partial-1123abcd/new/state.json": state(2),
        "checkpoints/.best-00000002.partial-1123abcd/new/adapter_config.json": PEFT,
    }
    write(tmp_path, {**mine, **ours, **RUN_OF_OURS})
    folder = RunFolder(tmp_path, overwrite=True)
    folder.open(0)
    folder.prune(0)
    assert contents(tmp_path) == {**mine, **ADAPTER_OF_OURS, "metrics.jsonl": METRIC}
    assert not list((tmp_path / "checkpoints").glob("*.partial-1123abcd"))


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize("linked", ["checkpoints", STEP, BEST, "checkpoints/step-00000003"])
def test_linked_checkpoints_are_refused_before_anything_is_done(
    tmp_path: Path, linked: str, flag: str
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    write(other, RUN_OF_OURS)
    write(out, {"metrics.jsonl": METRIC, **({} if linked == "checkpoints" else {f"{STEP}x/a": "mine"})})
    target = STEP if linked.endswith("3") else linked
    (out / linked).symlink_to(other / target)
    with pytest.raises(OutputError, match="is a link"):
        RunFolder(out, **{flag: True})  # type: ignore[arg-type]
    assert contents(other) == RUN_OF_OURS
    assert (out / "metrics.jsonl").read_text() == METRIC


def test_overwrite_deletes_checkpoints_first_and_replaces_metrics_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is deleted first: as long as there is one, everything that it needs is there."""
    write(tmp_path, {**RUN_OF_OURS, "checkpoints/step-00000004/state.json": state(4)})
    swap, unlink, seen = replace.exchange, Path.unlink, [sorted(contents(tmp_path))]

    def look() -> None:
        now = [name for name in sorted(contents(tmp_path)) if ".partial-" not in name]
        if now != seen[-1]:
            seen.append(now)

    def exchanging(first: Path, second: Path) -> bool:
        done = swap(first, second)
        look()
        return done

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        look()

    monkeypatch.setattr(replace, "exchange", exchanging)
    monkeypatch.setattr(Path, "unlink", unlinking)
    folder = RunFolder(tmp_path, overwrite=True)
    folder.open(0)
    gone = [sorted(set(before) - set(after)) for before, after in pairwise(seen)]
    assert gone[:2] == [
        ["checkpoints/step-00000004/state.json"],
        [f"{STEP}/{n}" for n in ("state.json", "state.safetensors")],
    ]
    assert [name for (name,) in gone[-2:]] == ["eval.jsonl", "run.json"]
    assert seen[-1] == sorted((*ADAPTER_OF_OURS, "metrics.jsonl"))
    old = (tmp_path / "metrics.jsonl").stat().st_ino
    for step in (1, 2):
        folder.record("metrics.jsonl", {"step": step})
    assert (tmp_path / "metrics.jsonl").stat().st_ino != old
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_best_adapters_of_kept_checkpoints_stay(tmp_path: Path) -> None:
    best = {f"checkpoints/best-{step:08d}/brushstroke.json": CARD for step in (1, 2, 4, 5)}
    steps = {f"checkpoints/step-{n:08d}/state.json": state(n, b) for n, b in ((1, 1), (3, 2), (4, 4))}
    write(tmp_path, {"metrics.jsonl": METRIC, **best, **steps})
    RunFolder(tmp_path, resume=True).prune(5)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"best-{n:08d}" for n in (2, 4, 5)] + [f"step-{n:08d}" for n in (3, 4)]


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("at", ["exchange", "first rename", "second rename"])
def test_a_checkpoint_that_is_saved_again_is_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, killed: bool
) -> None:
    write(tmp_path, {"metrics.jsonl": METRIC})
    folder, rename, calls = RunFolder(tmp_path, resume=True), os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        number = 1 if at == "first rename" else 2
        if len(calls) == number or (killed and len(calls) > number):  # nothing is tidied up after a kill
            raise OSError(5, "no more")
        rename(source, target)

    def no_exchange(first: Path, second: Path) -> bool:
        if at == "exchange":
            raise OSError(5, "no more")
        return False

    with bs.Training(tiny_llama(), bs.LoraConfig(rank=2)) as session:
        session.steps = 2
        save_session(session, folder.checkpoint(2))
        write(tmp_path, {f"{STEP}/notes.txt": "mine"})
        with monkeypatch.context() as patched:
            patched.setattr(replace, "exchange", no_exchange)
            patched.setattr(os, "rename", failing)
            with pytest.raises(OSError, match="no more"):
                save_session(session, folder.checkpoint(2))
        again = RunFolder(tmp_path, resume=True)
        assert [path.name for path in again.checkpoints()] == ["step-00000002"]
        load_session(session, again.checkpoint(2))
        save_session(session, again.checkpoint(2))
    inside = sorted(path.name for path in (tmp_path / "checkpoints").rglob("*"))
    assert inside == ["notes.txt", "state.json", "state.safetensors", "step-00000002"]


def test_contradicting_flags_and_invalid_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        RunFolder(tmp_path, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="NUL"):
        RunFolder(f"{tmp_path}/a\0b")


def test_error_names_the_other_process_and_not_this_one(tmp_path: Path, monkeypatch) -> None:
    """A process that was refused shares the lock for a moment, and may be listed last."""
    found = tmp_path.stat()
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    lines = [f"{n}: FLOCK ADVISORY READ {pid} {place} 0 EOF" for n, pid in enumerate((123, os.getpid()))]
    (tmp_path / "locks").write_text("\n".join(lines))
    monkeypatch.setattr(lock, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    with RunFolder(tmp_path, overwrite=True) as early:
        early.claim()
        with pytest.raises(OutputError, match=r"\(process 123\)"):
            RunFolder(tmp_path, overwrite=True)


def test_one_run_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    early, late = RunFolder(out), RunFolder(out)
    with early:
        early.claim()
        early.claim()  # a second time changes nothing
        number = rf" \(process {os.getpid()}\)" if LOCKS.exists() else ""
        reported = rf"another run is writing to .*out, or another process is reading it{number}; wait"
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputError, match=reported):
                RunFolder(out, **flags)
        with pytest.raises(OutputError, match=reported), late:
            late.claim()
        assert (early.claimed, late.claimed) == (True, False)
        assert list(out.iterdir()) == []
        early.record("metrics.jsonl", json.loads(METRIC))
    assert contents(out) == {"metrics.jsonl": METRIC}
    with pytest.raises(OutputError, match="--overwrite"), late:  # judged again, although nobody writes now
        late.claim()
    assert contents(out) == {"metrics.jsonl": METRIC}


def test_killed_run_releases_its_lock_and_empty_folder_is_removed(tmp_path: Path) -> None:
    killed = (
        "import os, sys; from brushstroke.training.folder import RunFolder\n"
        "RunFolder(sys.argv[1]).claim(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path / "out")]).returncode == 9
    assert list((tmp_path / "out").iterdir()) == []
    for out in (tmp_path / "out", tmp_path / "new"):
        with RunFolder(out) as folder:
            folder.claim()
            assert out.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # it was there before


def test_files_written_by_another_run_meanwhile_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=True)
    write(tmp_path, {"metrics.jsonl": METRIC, f"{STEP}/state.json": state(2)})
    with pytest.raises(OutputError, match="another run has written"), folder:
        folder.claim()
    assert set(contents(tmp_path)) == {"metrics.jsonl", f"{STEP}/state.json"}


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_dangling_output_link_is_refused_at_the_start(tmp_path: Path, flags: dict[str, bool]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="is a broken link"):
        RunFolder(tmp_path / "out", **flags)


def test_adapter_to_continue_from_must_not_be_in_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, {**RUN_OF_OURS, "mine/adapter_config.json": PEFT})
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    folder = RunFolder(out, overwrite=True)
    for start in (out, tmp_path / "link", Path("."), Path("../out"), out / BEST, Path(BEST)):
        with pytest.raises(ConfigError, match=r"the start adapter .* is in the output folder.*\(--out\)"):
            folder.refuse_start(start)
    with pytest.raises(ConfigError, match="is in the output folder"):
        RunFolder(tmp_path / "link", overwrite=True).refuse_start(out)
    for start in (tmp_path / "other", out / "mine", tmp_path):
        folder.refuse_start(start)


def test_adapter_is_restored_after_its_replacement_was_killed(tmp_path: Path) -> None:
    out, files = tmp_path / "out", {"adapter_model.safetensors": "whole"}
    write(tmp_path / ".out.partial-0123abcd" / "old", files)
    write(tmp_path / ".out.partial-0123abcd" / "new", {"adapter_config.json": PEFT})
    with pytest.raises(OutputError, match="is not empty"):
        RunFolder(out)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in files.items()}


UNFINISHED = {name: text for name, text in RUN_OF_OURS.items() if name.startswith(("metrics", STEP, BEST))}


@pytest.mark.parametrize(
    ("files", "first", "then", "lost"),
    [
        (
            UNFINISHED | {"checkpoints/step-00000010/state.json": state(10)},
            "continue from its checkpoint of step 10 with --resume",
            "choose another folder",
            "--overwrite (overwrite=True), which removes its checkpoints and metrics",
        ),
        (
            {"checkpoints/.step-00000004.partial-0123abcd/old/state.json": state(4), "metrics.jsonl": METRIC},
            "continue from its checkpoint of step 4 with --resume",
            "choose another folder",
            "--overwrite",
        ),
        (
            {"metrics.jsonl": METRIC},
            "stopped before its first checkpoint",
            "choose another folder",
            "--overwrite (overwrite=True), which removes its metrics",
        ),
        (
            {"metrics.jsonl": METRIC, **ADAPTER_OF_OURS},
            "stopped before its first checkpoint",
            "choose another folder",
            "which removes its metrics and, at the end, replaces the adapter there",
        ),
        (
            RUN_OF_OURS,
            "holds a finished run of 4 steps",
            "choose another folder",
            "--overwrite (overwrite=True), which removes its adapter, checkpoints and metrics",
        ),
        (RUN_OF_OURS | {"run.json": ""}, "holds a finished run;", "choose another folder", "--overwrite"),
    ],
    ids=[
        "unfinished",
        "killed while a checkpoint was replaced",
        "no checkpoint",
        "old adapter",
        "finished",
        "damaged",
    ],
)
def test_repeated_command_error_suggests_resume_first(
    tmp_path: Path, files: dict[str, str], first: str, then: str, lost: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(OutputError) as refused:
        RunFolder(tmp_path)
    said = str(refused.value)
    assert said.index(first) < said.index(then) < said.index(lost)
    returned = {
        name.replace(".step-00000004.partial-0123abcd/old", "step-00000004"): files[name] for name in files
    }
    assert contents(tmp_path) == returned


def test_foreign_folder_is_not_a_run(tmp_path: Path) -> None:
    for files in ({"notes.txt": "mine"}, {"metrics.jsonl": "a,b"}, {f"{STEP}/state.json": '{"epoch": 3}'}):
        write(tmp_path, files)
        with pytest.raises(OutputError, match="is not empty"):
            RunFolder(tmp_path)


@pytest.mark.parametrize("name", ["base", "runs/q", "mine"])
def test_a_run_inside_the_folders_of_a_study_is_refused(tmp_path: Path, name: str) -> None:
    study = tmp_path / "study.json"
    study.write_text(json.dumps({"identity": {"studies": [], "seeds": [], "arms": []}, "notes": {}}))
    if name == "mine":
        RunFolder(tmp_path / name)
    else:
        with pytest.raises(OutputError, match="is inside the study"):
            RunFolder(tmp_path / name)
    study.write_text('{"identity": "mine"}')
    RunFolder(tmp_path / name)
