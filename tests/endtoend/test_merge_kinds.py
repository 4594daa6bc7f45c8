"""The command `merge` for every kind of model: equal to PEFT's merge, and verified."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from cli_kit import Done

import kinds

EXACT = 1e-5  # relative, fp32: one rounding of each weight, seen through all layers


def peft_adapter(base: Path, folder: Path, targets: list[str], **more: object) -> dict[str, torch.Tensor]:
    """An adapter by PEFT for a base, and the weights that PEFT merges it to."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **more)
    torch.manual_seed(1)
    model = peft.get_peft_model(class_of(base).from_pretrained(base), config)
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}


def class_of(folder: Path) -> type:
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_is_merged_as_peft_does_and_verified(cli, tmp_path, kind):
    base = kinds.saved(kind, tmp_path / "base")
    expected = peft_adapter(base, tmp_path / "adapter", kinds.KINDS[kind][1])
    done: Done = cli("merge", base, tmp_path / "adapter", "--out", tmp_path / "out", "--verify", "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["logit_drift"] < EXACT
    assert report["logit_drift_skipped"] is None  # each adapted module ran
    assert report["compared"]
    assert class_of(tmp_path / "out") is class_of(base)
    merged = class_of(base).from_pretrained(tmp_path / "out").state_dict()
    assert merged.keys() == expected.keys()
    assert max(distance(merged[name], expected[name]) for name in expected) < EXACT
    before = class_of(base).from_pretrained(base).state_dict()
    assert sum(not torch.equal(before[name], merged[name]) for name in merged) >= report["sites"]


OTHERS = sorted(set(kinds.KINDS) - kinds.LANGUAGE)
COMMANDS = ("train", "generate", "chat", "evaluate", "data")
WAYS = ("T5", "BERT", "Llama, classifier", "Whisper")  # to be no language model


@pytest.mark.parametrize(
    ("command", "kind"),
    [("plan", kind) for kind in OTHERS] + [(command, kind) for command in COMMANDS for kind in WAYS],
)
def test_another_kind_than_a_language_model_is_refused_by_its_class(cli, tmp_path, train_rows, command, kind):
    base = kinds.saved(kind, tmp_path / "base")
    words = {"generate": ["a"], "chat": [], "train": [train_rows, "--out", tmp_path / "out"]}
    done = cli(command, base, *words.get(command, [train_rows]))
    assert done.status != 0
    assert f"{base} is a {class_of(base).__name__}, and this needs a causal language model" in done.error
    assert not (tmp_path / "out").exists()


def test_adapter_with_modules_to_save_is_refused_by_name(cli, tmp_path):
    base = kinds.saved("BERT, classifier", tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter", ["query"], task_type="SEQ_CLS")  # which adds the head
    done = cli("merge", base, tmp_path / "adapter", "--out", tmp_path / "out")
    assert done.status == 1
    assert "modules_to_save is ['classifier', 'score']: it holds whole copies" in done.error
    assert "merge_and_unload" in done.error
    assert "leave task_type out" in done.error
    assert not (tmp_path / "out").exists()
