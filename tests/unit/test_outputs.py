"""Files and folders that appear whole, and readers that see one version of a folder."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from brushstroke.errors import BaseLoadError, OutputError
from brushstroke.outputs import (
    clear_leftovers,
    lock,
    open_folder,
    output_errors,
    read_unreplaced,
    refuse_existing,
    remove_own,
    replace,
    replace_files,
    replace_folder,
    write_file,
    write_files,
)


def test_a_file_is_replaced_completely(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_file(file, "ä")
    write_file(file, b"two")
    assert file.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "a.json", "x")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputError, match=r"a\.json"):
        write_file(tmp_path / "a.json", "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


OWNED = ("x", "old", "last")


@pytest.mark.parametrize("put", [write_files, replace_files])
def test_a_folder_gets_its_files_and_nothing_else(tmp_path: Path, put: Callable[..., None]) -> None:
    folder = tmp_path / "a" / "b"
    put(folder, {"x": "1", "last": b"2"}, last="last", owned=OWNED)
    assert sorted(entry.name for entry in folder.iterdir()) == ["last", "x"]
    (folder / "old").write_text("ours of an earlier time")
    (folder / "notes").write_text("not ours")
    (folder / "inner").mkdir()
    (folder / "inner" / "x").write_text("not ours")
    folder.chmod(0o770)
    put(folder, {"last": b"3"}, last="last", owned=OWNED)
    left = sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))
    assert left == ["inner", "inner/x", "last", "notes"]
    assert (folder / "last").read_bytes() == b"3"
    assert folder.stat().st_mode & 0o777 == 0o770
    assert [entry.name for entry in folder.parent.iterdir()] == ["b"]
    remove_own(folder, OWNED)
    assert sorted(entry.name for entry in folder.iterdir()) == ["inner", "notes"]


@pytest.mark.parametrize("put", [write_files, replace_files])
def test_a_failure_removes_only_the_folders_that_were_made(tmp_path: Path, put: Callable[..., None]) -> None:
    with pytest.raises(OutputError):
        put(tmp_path / "a" / "b", {"no/such/name": "x", "last": "y"}, last="last", owned=())
    assert list(tmp_path.iterdir()) == []


def test_the_marker_is_removed_first_and_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {"last": "1", "x": "1"}, last="last")
    seen, replace = [], os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((tmp_path / "last").exists())
        replace(source, target)
        seen.append((tmp_path / "last").exists())

    monkeypatch.setattr(os, "replace", watched)
    write_files(tmp_path, {"last": "2", "x": "2", "y": "2"}, last="last")
    assert seen == [False] * 5 + [True]


def test_files_that_are_replaced_one_by_one_wait_for_readers(tmp_path: Path) -> None:
    write_files(tmp_path, {"x": "1", "last": "1"}, last="last")
    with open_folder(tmp_path), pytest.raises(OutputError, match="another run is writing"):
        write_files(tmp_path, {"x": "2", "last": "2"}, last="last")
    assert sorted((entry.name, entry.read_text()) for entry in tmp_path.iterdir()) == [
        ("last", "1"),
        ("x", "1"),
    ]


def test_a_run_that_waited_in_vain_for_a_reader_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    run = lock.RunLock(tmp_path)
    run.take()
    with open_folder(tmp_path), pytest.raises(OutputError, match="is reading it"), lock.unread(tmp_path):
        pass
    with pytest.raises(OutputError, match="another run is writing"):
        lock.RunLock(tmp_path).take()
    run.release()
    lock.RunLock(tmp_path).take()


def test_a_run_has_locked_the_folder_that_replaces_its_own_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    folder, run, swap = tmp_path / "a", lock.RunLock(tmp_path / "a"), replace._swap

    def swap_and_try(*folders: Path) -> None:
        refused()
        swap(*folders)
        refused()

    def refused() -> None:
        with pytest.raises(OutputError, match="another run is writing"):
            lock.RunLock(folder).take()

    monkeypatch.setattr(replace, "_swap", swap_and_try)
    run.take()
    for number in "12":
        before = folder.stat().st_ino
        replace_files(folder, {"x": number, "last": number}, last="last", owned=OWNED)
        assert folder.stat().st_ino != before
        refused()
        run.require_place()
    run.release()
    lock.RunLock(folder).take()


def test_a_run_does_not_write_to_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    folder, run = tmp_path / "a", lock.RunLock(tmp_path / "a")
    run.take()
    folder.rename(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(OutputError, match=r"a is no longer the folder of this run: .* with --resume"):
            run.require_place()
        folder.mkdir(exist_ok=True)
    run.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "moved"]


def test_a_fork_does_not_hold_the_lock_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    run = lock.RunLock(tmp_path)
    run.take()
    lock.refuse_other_process(tmp_path)
    child = os.fork()
    if not child:
        try:
            lock.refuse_other_process(tmp_path)
        except OutputError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_folder_that_is_moved_while_a_run_waits_for_its_lock_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    folder, run = tmp_path / "a", lock.RunLock(tmp_path / "a")
    run.take()
    monkeypatch.setattr(lock.time, "sleep", lambda _: folder.rename(tmp_path / "moved"))
    monkeypatch.setattr(lock, "PATIENCE", 0.01)
    monkeypatch.setattr(lock.time, "monotonic", iter((0.0, 0.0, 1.0)).__next__)
    with pytest.raises(OutputError, match=r"a was moved, removed or replaced while .* repeat the command"):
        lock.RunLock(folder).refuse_other()


def test_the_process_of_a_run_writes_to_its_folder_also_where_that_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    monkeypatch.chdir(tmp_path)
    run = lock.RunLock(tmp_path)
    run.take()
    for number in "12":
        replace_files(tmp_path, {"last": number}, last="last", owned=OWNED)
    assert (tmp_path / "last").read_text() == "2"
    run.require_place()
    with pytest.raises(OutputError, match="another run is writing"):
        lock.RunLock(tmp_path).take()
    run.release()


def test_a_run_that_ends_does_not_wait_for_readers_of_a_folder_without_a_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    run = lock.RunLock(tmp_path)
    run.take()
    (tmp_path / "x").write_text("1")
    with open_folder(tmp_path):
        replace_files(tmp_path, {"last": "1"}, last="last", owned=OWNED)
    assert (tmp_path / "last").read_text() == "1"
    run.release()


def test_next_write_removes_leftovers_but_not_files_being_written(tmp_path: Path) -> None:
    left, busy, other = (tmp_path / f".{name}.partial-0123abcd" for name in ("a.txt", "b.txt", "c.txt"))
    for file in (left, busy, other):
        file.write_text("half")
    handle = lock.lock_shared(busy)
    for name in ("a.txt", "b.txt"):
        write_file(tmp_path / name, "whole")
    os.close(handle)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [busy.name, other.name, "a.txt", "b.txt"]
    )


def test_a_folder_in_use_stays_until_the_next_write(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    replace_files(folder, {"x": "1", "last": "1"}, last="last", owned=OWNED)
    with open_folder(folder) as opened:
        for number in "23":
            replace_files(folder, {"x": number, "last": number}, last="last", owned=OWNED)
            clear_leftovers(folder, OWNED.__contains__)
        assert (opened / "x").read_bytes() == b"1"
        assert {entry.name for entry in opened.iterdir()} == {"x", "last"}
        assert len(list(tmp_path.iterdir())) == 2
    assert (folder / "x").read_text() == "3"
    clear_leftovers(folder, OWNED.__contains__)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_reader_whose_folder_was_replaced_before_its_lock_opens_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, share = tmp_path / "a", lock._share
    replace_files(folder, {"last": "1"}, last="last", owned=OWNED)

    def raced(handle: int) -> None:
        monkeypatch.setattr(lock, "_share", share)
        replace_files(folder, {"last": "2"}, last="last", owned=OWNED)
        share(handle)

    monkeypatch.setattr(lock, "_share", raced)
    with open_folder(folder) as opened:
        assert (opened / "last").read_bytes() == b"2"


def test_a_read_is_repeated_if_the_folder_was_replaced(tmp_path: Path) -> None:
    folder, calls = tmp_path / "a", []
    replace_files(folder, {"x": "1", "last": "1"}, last="last", owned=OWNED)

    def read() -> tuple[str, str]:
        first = (folder / "x").read_text()
        calls.append(first)
        if len(calls) < 3:
            number = str(len(calls) + 1)
            replace_files(folder, {"x": number, "last": number}, last="last", owned=OWNED)
        if len(calls) == 1:
            raise ValueError("of a mixture")
        return first, (folder / "last").read_text()

    assert read_unreplaced(folder, read) == ("3", "3")
    with pytest.raises(ZeroDivisionError):
        read_unreplaced(folder, lambda: 1 / 0)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "free disk space"),
        (errno.EACCES, "change its permissions"),
        (errno.EPERM, "change its permissions"),
        (errno.EROFS, "not mounted read-only"),
        (errno.ENAMETOOLONG, "a shorter name"),
        (errno.EISDIR, "check the path"),
    ],
)
def test_the_advice_of_an_error_fits_its_cause(tmp_path: Path, number: int, advice: str) -> None:
    with pytest.raises(OutputError) as caught, output_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path}: {os.strerror(number)}; ")
    assert advice in message
    assert ("space" in message) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_the_advice_also_fits_an_error_number_in_the_text(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free disk space"), output_errors(tmp_path):
        raise OSError("Error while serializing: I/O error: No space left on device (os error 28)")


def write_and_fail(file: Path, error: BaseException) -> None:
    file.write_text("2")
    raise error


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_files(folder, {"x": "1"}, last="x")
    full, stopped = OSError(28, "No space left on device"), KeyboardInterrupt()
    for error, expected in ((full, OutputError), (stopped, KeyboardInterrupt)):
        with pytest.raises(expected), replace_folder(folder, OWNED.__contains__) as new:
            write_and_fail(new / "x", error)
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "b" / "c", OWNED.__contains__):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (folder / "x").read_text() == "1"


@pytest.mark.parametrize("linked", [True, False])
def test_folders_keep_mode_owner_times_and_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    folder, owners = tmp_path / "a", dict[str, list[tuple[int, int]]]()
    replace_files(folder, {"last": "1"}, last="last", owned=OWNED)
    (folder / "mine" / "inner").mkdir(parents=True)
    (folder / "mine" / "inner" / "secret").write_text("mine")
    for name, mode in (("mine/inner/secret", 0o640), ("mine/inner", 0o500), ("mine", 0o700), (".", 0o2750)):
        with suppress(OSError, AttributeError):  # a system or file system without attributes
            os.setxattr(folder / name, "user.note", name.encode())
        os.utime(folder / name, (1e9, 1e9 + len(name)))
        (folder / name).chmod(mode)

    def facts(name: str) -> tuple[object, ...]:
        status = (folder / name).stat()
        names = os.listxattr(folder / name) if hasattr(os, "listxattr") else []
        return status.st_mode, status.st_mtime, {key: os.getxattr(folder / name, key) for key in names}

    def chown(path: Path, owner: int, group: int, *, follow_symlinks: bool) -> None:
        owners.setdefault(path.name, []).append((owner, group))

    def not_permitted(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chown", chown)
    if not linked:
        monkeypatch.setattr(os, "link", not_permitted)
    before = {name: facts(name) for name in (".", "mine", "mine/inner", "mine/inner/secret")}
    for number in "23":
        replace_files(folder, {"last": number}, last="last", owned=OWNED)
        after = {name: facts(name) for name in before}
        assert after["."][::2] == before["."][::2]
        assert {**after, ".": before["."]} == before
    assert folder.stat().st_mtime > 1.5e9  # its files are new
    assert owners.keys() == {"new", "mine", "inner"} | (set() if linked else {"secret"}) | {"a"}
    assert set(owners["inner"]) == {(-1, folder.stat().st_gid), (folder.stat().st_uid, -1)}
    monkeypatch.setattr(os, "chown", not_permitted)
    replace_files(folder, {"last": "4"}, last="last", owned=OWNED)
    assert facts("mine/inner") == before["mine/inner"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_private_folder_is_private_while_it_is_built(tmp_path: Path) -> None:
    write_files(tmp_path / "a", {"last": "1"}, last="last")
    (tmp_path / "a").chmod(0o700)
    with replace_folder(tmp_path / "a", OWNED.__contains__) as new:
        assert new.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("reason", ["is a mount point", "cannot be read"])
def test_a_folder_whose_subfolder_cannot_be_moved_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    folder = tmp_path / "a"
    inner = folder / "mine" / "data"
    write_files(folder, {"x": "1", "last": "1"}, last="last")
    inner.mkdir(parents=True)
    (inner / "big").write_text("mine")
    place = folder.stat().st_ino, inner.stat().st_ino
    before = sorted(tmp_path.rglob("*"))

    def stop() -> None:
        if reason == "is a mount point":
            monkeypatch.setattr(os.path, "ismount", lambda path: path == inner)
        else:
            monkeypatch.setattr(os, "access", lambda path, mode: path != inner)

    def replace() -> None:
        with replace_folder(folder, OWNED.__contains__, check=lambda: pytest.fail("too late")) as new:
            begun.append(new)
            (new / "last").write_text("2")
            stop()

    begun: list[Path] = []
    for _ in range(2):  # found when the work ends, and when it begins
        with pytest.raises(OutputError, match=rf"data {reason}, so .*a cannot be replaced; move or unmount"):
            replace()
        assert (folder / "last").read_text() == "1"
        assert sorted(tmp_path.rglob("*")) == before
    assert len(begun) == 1
    replace_files(folder, {"last": "3"}, last="last", owned=OWNED)
    assert (folder / "last").read_text() == "3"
    assert (folder.stat().st_ino, inner.stat().st_ino) == place
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path.name != "x"]


def test_without_locks_a_writer_removes_its_own_old_folder_and_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EBADF, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    left = tmp_path / ".a.partial-0123abcd"
    (left / "new").mkdir(parents=True)
    for number in "12":
        clear_leftovers(tmp_path / "a", OWNED.__contains__)
        replace_files(tmp_path / "a", {"last": number}, last="last", owned=OWNED)
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "a"]
    with lock.unread(tmp_path / "a"), open_folder(tmp_path / "a") as opened:
        assert (opened / "last").read_bytes() == b"2"


def test_an_existing_folder_is_refused_unless_empty(tmp_path: Path) -> None:
    refuse_existing(tmp_path, False)
    refuse_existing(tmp_path / "new", False)
    (tmp_path / "file").write_text("x")
    refuse_existing(tmp_path, True)
    with pytest.raises(OutputError, match="overwrite"):
        refuse_existing(tmp_path, False)
    with pytest.raises(OutputError, match="is a file"):
        refuse_existing(tmp_path / "file", True)
    with pytest.raises(OutputError, match=r"file is a file; name a folder"):
        refuse_existing(tmp_path / "file" / "new", True)


@pytest.mark.parametrize("target", ["gone", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_broken_link_is_not_a_folder(tmp_path: Path, target: str, overwrite: bool) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    for folder in (tmp_path / "link", tmp_path / "link" / "new"):
        with pytest.raises(OutputError, match=r"link is a broken link; name a folder"):
            refuse_existing(folder, overwrite)


def test_an_oserror_becomes_one_message(tmp_path: Path) -> None:
    with pytest.raises(BaseLoadError, match=r"^the base$"), output_errors(tmp_path):  # an OSError too
        raise BaseLoadError("the base")
    with pytest.raises(OutputError, match="No space left"), output_errors(tmp_path):
        raise OSError(28, "No space left on device")
