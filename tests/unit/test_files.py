"""Atomic writing of single files and of folders."""

import os
from pathlib import Path

import pytest

from brushstroke.errors import BaseLoadError, OutputError
from brushstroke.files import check_output_folder, output_errors, refuse_existing, write_file, write_folder


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
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


def test_a_folder_gets_its_files_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write_folder(folder, {"x": "1", "last": b"2"}, owned=("x", "old", "last"))
    assert sorted(entry.name for entry in folder.iterdir()) == ["last", "x"]
    (folder / "old").write_text("ours of an earlier time")
    (folder / "notes").write_text("not ours")
    write_folder(folder, {"last": b"3"}, owned=("x", "old", "last"), overwrite=True)
    assert sorted(entry.name for entry in folder.iterdir()) == ["last", "notes"]


def test_an_output_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b", overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "b", tmp_path / "a" / ("x" * 300)):
        with pytest.raises(OutputError, match=r"name a folder|cannot write"):
            check_output_folder(place, overwrite=True)
    with pytest.raises(OutputError, match="holds files already"):
        check_output_folder(tmp_path, overwrite=False)
    check_output_folder(tmp_path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    for place in (tmp_path / "shut", tmp_path / "shut" / "b"):
        with pytest.raises(OutputError, match="Permission denied"):
            check_output_folder(place, overwrite=True)


def test_a_failure_removes_only_the_folders_that_were_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write_folder(tmp_path / "a" / "b", {"no/such/name": "x", "last": "y"}, owned=())
    assert list(tmp_path.iterdir()) == []


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
def test_a_link_that_leads_nowhere_is_no_folder(tmp_path: Path, target: str, overwrite: bool) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    for folder in (tmp_path / "link", tmp_path / "link" / "new"):
        with pytest.raises(
            OutputError, match=r"link is a link to something that is not there; name a folder"
        ):
            refuse_existing(folder, overwrite)


def test_an_oserror_becomes_one_message(tmp_path: Path) -> None:
    with pytest.raises(BaseLoadError, match=r"^the base$"), output_errors(tmp_path):  # an OSError too
        raise BaseLoadError("the base")
    with pytest.raises(OutputError, match="No space left"), output_errors(tmp_path):
        raise OSError(28, "No space left on device")
