"""A format that brushstroke does not know, registered by one function."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import brushstroke as bs
import toys
from brushstroke.adapter import Adapter
from brushstroke.cli.app import main
from brushstroke.errors import AdapterFileError
from brushstroke.formats import Format, register_format
from brushstroke.lowrank import LowRank


def load_toy(path: Path) -> Adapter:
    """One .npz file: SITE.U, SITE.V and SITE.scale of each site."""
    with np.load(path) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays}
    sites = {name.rpartition(".")[0] for name in found}
    if not all(f"{site}.{part}" in found for site in sites for part in ("U", "V", "scale")):
        raise AdapterFileError(f"{path} lacks arrays")
    return Adapter({s: LowRank(found[f"{s}.U"], found[f"{s}.V"], found[f"{s}.scale"].item()) for s in sites})


@pytest.fixture
def toy_format() -> Iterator[None]:
    undo = register_format(Format("toy", lambda path: path.suffix == ".npz", load_toy))
    yield
    undo()


@pytest.fixture
def adapter(llama: torch.nn.Module) -> Adapter:
    return toys.random_adapter(llama)


@pytest.fixture
def file(tmp_path: Path, adapter: Adapter) -> Path:
    arrays = {
        f"{site}.{name}": np.asarray(value)
        for site, update in adapter.items()
        if isinstance(update, LowRank)
        for name, value in (("U", update.U), ("V", update.V), ("scale", update.scale))
    }
    np.savez(tmp_path / "toy.npz", **arrays)
    return tmp_path / "toy.npz"


@pytest.mark.usefixtures("toy_format")
def test_load_reads_a_registered_format(file: Path, adapter: Adapter) -> None:
    found = bs.load(file)
    assert set(found) == set(adapter)
    assert all(torch.equal(found[site].dense(), adapter[site].dense()) for site in adapter)


@pytest.mark.usefixtures("toy_format")
def test_commands_read_a_registered_format(
    file: Path, adapter: Adapter, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bs.save(adapter, tmp_path / "peft")
    found = []
    for place in (file, tmp_path / "peft"):
        assert main(["spectrum", str(place), "--json"]) == 0
        sites = json.loads(capsys.readouterr().out)["adapters"][0]["sites"]
        found.append({row["site"]: row for row in sites})
    assert found[0] == found[1]


def test_an_installed_package_can_declare_a_format(file: Path, adapter: Adapter, tmp_path: Path) -> None:
    """In a new process, as a user's command line is."""
    package = tmp_path / "site" / "toy_format-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[brushstroke.formats]\ntoy = toy_format:FORMAT\n")
    (package.parent / "toy_format.py").write_text(
        "from pathlib import Path\nimport numpy as np\nimport torch\n"
        "from brushstroke.adapter import Adapter\n"
        "from brushstroke.errors import AdapterFileError\n"
        "from brushstroke.formats import Format\n"
        f"from brushstroke.lowrank import LowRank\n\n{inspect.getsource(load_toy)}\n"
        "FORMAT = Format('toy', lambda path: path.suffix == '.npz', load_toy)\n"
    )
    paths = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "brushstroke", "spectrum", str(file), "--json"]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["adapters"][0]["sites"]) == len(adapter)
    (package.parent / "toy_format.py").unlink()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "the format 'toy' of the package toy-format cannot be loaded (No module named" in done.stderr


@pytest.mark.usefixtures("toy_format")
def test_a_damaged_file_is_one_message(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(file, **{"fc.U": np.zeros((2, 1))})
    assert main(["spectrum", str(file)]) == 1
    assert "lacks arrays" in capsys.readouterr().err


def test_the_format_is_unknown_before_and_after(file: Path) -> None:
    with pytest.raises(AdapterFileError, match="is a file; an adapter is a folder"):
        bs.load(file)


def test_the_example_in_the_docs_reads_its_format(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    arrays = {"a.b.U": np.ones((6, 2), np.float32), "a.b.V": np.ones((2, 4), np.float32)}
    np.savez(tmp_path / "adapter.npz", **arrays)
    names: dict[str, Any] = {}
    exec(block, names)
    try:
        assert bs.load(tmp_path / "adapter.npz")["a.b"].delta_norm() == pytest.approx(2 * 24**0.5)
    finally:
        names["undo"]()
    with pytest.raises(AdapterFileError):
        bs.load(tmp_path / "adapter.npz")
