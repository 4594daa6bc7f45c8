"""Warnings of brushstroke are printed, whatever their class; those of other packages are not."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

from brushstroke.base import VocabularyWarning
from brushstroke.cli.console import show_library_warnings

BODY = """
import warnings

def say(message, category=UserWarning, stacklevel=1):
    warnings.warn(message, category, stacklevel=stacklevel)

def call(function, *rest):
    function(*rest)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a module of any name, with functions that warn and call."""

    def make(name: str):
        file = tmp_path / f"{name.replace('.', '_')}.py"
        file.write_text(BODY)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        return made

    return make


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]):
    """What reaches the terminal of what a function warns of."""

    def run(function, *words: object) -> list[str]:
        capsys.readouterr()
        with show_library_warnings():
            function(*words)
        return capsys.readouterr().err.splitlines()

    return run


KINDS = (UserWarning, RuntimeWarning, FutureWarning, DeprecationWarning, VocabularyWarning)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stacklevel", [1, 2, 3])
def test_brushstroke_warnings_are_shown_for_every_class_and_stacklevel(module, shown, kind, stacklevel):
    ours, theirs = module("brushstroke.made_up"), module("somebody.else")
    lines = shown(theirs.call, ours.say, "a\n  b", kind, stacklevel)
    assert lines == ["warning: a b"]


@pytest.mark.parametrize("name", ["transformers.made_up", "torch.made_up", "brushstrokes", "__main__"])
@pytest.mark.parametrize("stacklevel", [1, 2])
def test_warnings_of_other_packages_are_not_shown(module, shown, name, stacklevel):
    ours, theirs = module("brushstroke.made_up"), module(name)
    assert shown(ours.call, theirs.say, "nothing to you", UserWarning, stacklevel) == []


def test_torch_warning_about_unusable_gpu_is_shown(module, shown):
    assert shown(module("torch.cuda.made_up").say, "the driver is too old") == [
        "warning: the driver is too old"
    ]


def test_warning_classes_of_brushstroke_are_shown_from_everywhere(module, shown):
    assert shown(module("somebody.else").say, "x", VocabularyWarning) == ["warning: x"]


def test_failing_compiler_is_a_warning(shown, monkeypatch):
    import torch

    from brushstroke.packed import compiled

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "pays", lambda _: True)
    monkeypatch.setattr(compiled, "_fails", False)
    kernel = compiled.CompiledFunction(torch.relu)
    monkeypatch.setattr(kernel, "_compiled", broken)
    (line,) = shown(kernel, torch.ones(2))
    assert line.startswith("warning: torch.compile does not work here (no compiler)")


def test_warning_filters_are_restored():
    before = warnings.filters[:], warnings.showwarning
    with show_library_warnings():
        pass
    assert (warnings.filters[:], warnings.showwarning) == before
