"""Install hints of errors work: every extra in the code exists and contains the package."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from brushstroke import errors
from brushstroke.errors import MissingPackageError, require

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r'require\(\s*"([\w.]+)",\s*extra="(\w+)"\s*\)')
EXTRA = re.compile(r'extra="(\w+)"')
CALLED = {"vl_convert": "vl-convert-python"}  # a package that another module comes with


def sources() -> dict[str, str]:
    return {str(path): path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")}


def extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project["optional-dependencies"]


def packages(extra: str) -> set[str]:
    found = set()
    for line in extras()[extra]:
        own = re.fullmatch(r"brushstroke\[(\w+)\]", line)
        found |= packages(own[1]) if own else {re.split(r"[<>=\[ ]", line)[0]}
    return found


def test_extras_named_in_code_exist_and_contain_the_imported_packages() -> None:
    named = {pair for text in sources().values() for pair in NAMED.findall(text)}
    assert {extra for _, extra in named} == {"report", "study", "gguf"}
    for name, extra in named:
        module = name.partition(".")[0]
        assert CALLED.get(module, module) in packages(extra), (name, extra)
    everywhere = {extra for text in sources().values() for extra in EXTRA.findall(text)}
    assert everywhere <= extras().keys()


def test_install_hints_name_only_existing_packages_and_extras() -> None:
    documents = {str(path): path.read_text("utf-8") for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md")}
    for name, text in {**sources(), **documents}.items():
        assert not re.search(r"pip install\s+['\"]?brushstroke", text), name
        assert set(re.findall(r"-e '\.\[(\w+)\]'", text)) <= extras().keys(), name


def test_the_command_names_the_packages_of_the_extra() -> None:
    with pytest.raises(MissingPackageError) as refused:
        require("no_such_package_of_anybody", extra="report")
    said = str(refused.value)
    assert said.startswith(
        "this needs the package 'no_such_package_of_anybody', which is not installed; run: "
    )
    command = said.partition("run: ")[2]
    assert command.startswith(f"{sys.executable} -m pip install ")
    for package in packages("report"):
        assert f"{package}>=" in command


def test_the_command_can_be_run() -> None:
    """By pip itself, which finds all of it installed here."""
    pytest.importorskip("altair")
    command = errors.install_command("report")
    done = subprocess.run(f"{command} --dry-run --no-index", shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_without_metadata_the_checkout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", absent)
    assert errors.install_command("gguf").endswith("-m pip install -e '.[gguf]'")


def test_broken_package_is_not_reported_as_missing(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise ImportError('libfoo.so.3 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"which fails \(libfoo\.so\.3 is missing\)"):
        require("broken_package", extra="gguf")
