"""Fixtures of the command line's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_kit import Done, rows, write_base, write_rows

from brushstroke.cli import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command in this process."""

    def run(*words: object) -> Done:
        capsys.readouterr()
        status = main([str(word) for word in words])
        reported = capsys.readouterr()
        return Done(status, reported.out, reported.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of one token for each byte."""
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def train_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", rows())
