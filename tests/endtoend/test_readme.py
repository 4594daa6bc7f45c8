"""The README's code runs: Python in this process, `brushstroke` lines as commands, `make` targets exist.

In `make sweep` on the real model, and each command in a process; in `make test` on a small random model.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_kit import Done, write_base

import brushstroke as bs
from brushstroke import samples
from sampling import WHOLE

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).with_name("brushstroke")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)
PYTHON = [text for language, text in BLOCKS if language == "python"]
LINES = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("brushstroke ")]
TARGETS = [line.split()[1] for line in LINES if line.startswith("make ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the README takes for granted: the base, two files of rows, an adapter for people."""
    folder = tmp_path_factory.mktemp("readme")
    if WHOLE:
        base = bs.load_base(samples.model_path(), dtype="float32")
        base.model.save_pretrained(folder / "base")
        base.tokenizer.save_pretrained(folder / "base")
    else:
        write_base(folder / "base", max_position_embeddings=4096)
    rows = samples.read_task("addresses", samples.labelled_file("addresses"))
    samples.write_rows(rows.training[:12], folder / "addresses.jsonl")
    samples.write_rows(rows.heldout[:3], folder / "heldout.jsonl")
    fresh = bs.load_base(folder / "base", dtype="float32")
    with bs.attach(fresh, bs.LoraConfig(rank=2), trainable=True) as attachment:
        with torch.no_grad():
            for name, factor in attachment.named_parameters():
                if name.endswith("V"):
                    factor.normal_(std=1e-3)
        bs.save(attachment.adapter(), folder / "out" / "people")
    return folder


def local(text: str) -> str:
    """The same code with a folder in place of the hub id."""
    alone = ("nn.Sequential", "brushstroke show", "brushstroke spectrum", "brushstroke compare")
    assert HUB_ID in text or any(word in text for word in alone)
    return text.replace(HUB_ID, "base")


def test_there_is_code_of_every_kind():
    assert len(PYTHON) >= 2
    shown = {command.split()[1] for command in COMMANDS}
    analysis = {"spectrum", "compare", "relate", "intruders"}
    commands = {"plan", "data", "train", "generate", "chat", "evaluate", "show", "merge", "study"}
    assert shown == commands | analysis
    assert {"demo", "test"} <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installed_script_runs():
    done = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == bs.__version__


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_python_blocks(workplace, monkeypatch, block):
    monkeypatch.chdir(workplace)
    names: dict[str, object] = {}
    exec(compile(local(PYTHON[block]), f"README.md, Python block {block + 1}", "exec"), names)
    if "answers" in names:
        assert [answer.adapter for answer in names["answers"]] == ["addresses", "people", None]


# A study is many runs: here each is a step long.
SHORT = (
    "--ranks",
    "1",
    "--targets",
    "q_proj",
    "--max-steps",
    "1",
    "--seeds",
    "1",
    "--learning-rates",
    "1e-4,1e-3",
)


def in_a_process(*words):
    done = subprocess.run(
        [SCRIPT, *words],
        env={**os.environ, "PYTHONWARNINGS": "default"},
        input="Hello!\n",
        capture_output=True,
        text=True,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.sweep
def test_commands_in_their_order(workplace, monkeypatch, cli):
    monkeypatch.chdir(workplace)
    for command in COMMANDS:
        words = shlex.split(local(command))[1:]
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n"))
        done = (in_a_process if WHOLE else cli)(*words, *(SHORT if words[0] == "study" else ()))
        assert done.status == 0, f"{command}\n{done.out}\n{done.err}"
        assert "Traceback" not in done.err
    assert (workplace / "out" / "merged" / "config.json").is_file()
    assert json.loads((workplace / "out" / "streets" / "run.json").read_text("utf-8"))["steps"] > 0
