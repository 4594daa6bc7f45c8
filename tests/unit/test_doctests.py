"""The examples in the docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import brushstroke

MODULES = sorted(m.name for m in pkgutil.walk_packages(brushstroke.__path__, "brushstroke."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed


def test_there_are_examples() -> None:
    found = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(bool(test.examples) for tests in found for test in tests) > 20
