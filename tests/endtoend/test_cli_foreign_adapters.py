"""Adapters written by other tools, on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference_kit
import pytest
import torch
from cli_kit import PLAIN, rows, write_rows
from safetensors.torch import load_file, save_file

from brushstroke import save

EMBED = "base_model.model.model.embed_tokens.weight"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny base whose file holds copies of its embeddings and its head."""
    made = save(inference_kit.adapter(inference_kit.llama()), tmp_path / "made")
    weights = load_file(tiny / "model.safetensors")
    copies = {
        f"base_model.model.{name}": weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    edit(made, lambda tensors: tensors.update(copies))
    return made


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_copies_of_the_base_are_named_and_dropped_where_they_equal_it(
    cli: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path
) -> None:
    shown = cli("show", folder)
    (line,) = [line for line in shown.out.splitlines() if line.startswith("  copies")]
    assert "lm_head.weight, model.embed_tokens.weight: will be compared with the base" in line
    assert json.loads(cli("show", folder, "--json").out)["copies"] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
    spectrum = cli("spectrum", folder)
    assert spectrum.err.count("made contains copies of lm_head.weight, model.embed_tokens.weight") == 1
    words = ("--max-new-tokens", "4", *PLAIN)
    data = write_rows(tmp_path / "rows.jsonl", rows(2))
    for command in (
        ("generate", tiny, "Hi", "--adapter", folder, *words),
        ("evaluate", tiny, data, "--adapter", folder, *words),
        ("merge", tiny, folder, "--out", tmp_path / "merged"),
        ("train", tiny, data, "--from", folder, "--out", tmp_path / "run", "--max-steps", "1", *PLAIN),
    ):
        done = cli(*command)
        assert done.status == 0, done.err
        assert "embed_tokens" not in done.err
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora_" not in key])
    one = cli("generate", tiny, "Hi", "--adapter", folder, *words).out
    assert cli("generate", tmp_path / "merged", "Hi", *words).out == one
    assert "embed_tokens" not in cli("show", folder).out


def test_a_changed_embedding_is_refused_by_every_command(
    cli: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path
) -> None:
    edit(folder, lambda tensors: tensors[EMBED][7, 3].add_(0.01))
    data = write_rows(tmp_path / "rows.jsonl", rows(2))
    for command in (
        ("generate", tiny, "Hi", "--adapter", folder, *PLAIN),
        ("evaluate", tiny, data, "--adapter", folder, *PLAIN),
        ("merge", tiny, folder, "--out", tmp_path / "merged"),
        ("train", tiny, data, "--from", folder, "--out", tmp_path / "run", "--max-steps", "1", *PLAIN),
    ):
        assert "model.embed_tokens.weight: 1 of 264 rows differ" in cli(*command).error
    assert not (tmp_path / "merged").exists()
    allowed = cli("merge", tiny, folder, "--out", tmp_path / "merged", "--allow-different-base")
    assert allowed.status == 0
    assert allowed.err.count("warning: this adapter's file contains weights that differ from the base's") == 1
    assert "they are not used" in allowed.err


def test_keys_with_a_name_give_the_same_answers(cli: Callable[..., Any], tiny: Path, folder: Path) -> None:
    words = ("--max-new-tokens", "4", *PLAIN)
    before = cli("generate", tiny, "Hi", "--adapter", folder, *words).out

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "lora_" in key]:
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    edit(folder, rename)
    assert cli("generate", tiny, "Hi", "--adapter", folder, *words).out == before
