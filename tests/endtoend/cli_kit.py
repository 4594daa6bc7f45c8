"""A tiny base, rows to train on, and functions that run the command line in this or another process."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import inference_kit
import torch

# As many threads as this process, so that both compute the same bits.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
PLAIN = ("--device", "cpu", "--dtype", "float32")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error message; there must be only one, and no traceback."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err
        assert sum(line.startswith("error: ") for line in lines) == 1, self.err
        assert lines[-1].startswith("error: "), self.err
        return lines[-1].removeprefix("error: ")


def write_base(folder: Path, **changes: int) -> Path:
    inference_kit.llama(**changes).save_pretrained(folder)
    inference_kit.tokenizer().save_pretrained(folder)
    return folder


def rows(count: int = 12, street: str = "Oak") -> list[dict[str, Any]]:
    """Short questions with one JSON object as the answer."""
    return [
        {"prompt": f"Split {n} {street} St", "completion": json.dumps({"n": str(n)})} for n in range(count)
    ]


def write_rows(file: Path, given: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in given), "utf-8")
    return file


def start(*words: object) -> "subprocess.Popen[str]":
    """Run the command in a separate process and process group, as from a shell."""
    command = [sys.executable, "-c", "import sys; from brushstroke.cli import main; sys.exit(main())"]
    return subprocess.Popen(
        [*command, *map(str, words)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
