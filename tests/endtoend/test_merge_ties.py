"""When a merge unties a head, other weights that were tied to it do not change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import kinds
from brushstroke.adapter import LoraConfig
from brushstroke.base import load_base
from brushstroke.merging import merge, merge_folder
from toys import random_adapter

EXACT = 1e-5
HEADS = {"T5": "lm_head", "BART": "lm_head", "Whisper": "proj_out", "BERT": "cls.predictions.decoder"}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_the_merged_folder_is_the_adapted_model(tmp_path: Path, kind: str, loaded: bool) -> None:
    """BART and T5 tie two more embeddings to the head's weight, BERT a bias to another bias."""
    folder = kinds.saved(kind, tmp_path / "base")
    model = load_base(folder, dtype="float32", device="cpu")
    adapter = random_adapter(model, LoraConfig(rank=3, targets=[HEADS[kind]])).with_card(None)
    report = merge_folder(model if loaded else folder, adapter, tmp_path / "out", verify=True)
    assert report.streamed is not loaded
    assert [site for site, _ in report.untied] == [HEADS[kind]]
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # the embeddings
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    _, reported = type(kinds.made(kind)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not reported["missing_keys"]
    again = merge_folder(tmp_path / "out", adapter, tmp_path / "again", verify=True)
    assert again.logit_drift is not None
    assert again.logit_drift < EXACT
    if kind != "T5":  # whose config ties always; transformers sees that the files hold two weights
        assert again.untied == ()


def test_config_values_derived_from_the_tie_are_kept(tmp_path: Path) -> None:
    """T5 scales its outputs where its config says that the head is tied, or says nothing."""
    folder = kinds.saved("T5", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    silent = {k: v for k, v in config.items() if k not in ("scale_decoder_outputs", "tie_word_embeddings")}
    (folder / "config.json").write_text(json.dumps(silent))
    adapter = random_adapter(kinds.made("T5"), LoraConfig(rank=3, targets=["lm_head"])).with_card(None)
    report = merge_folder(folder, adapter, tmp_path / "out", verify=True)
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").scale_decoder_outputs


def test_shards_get_the_new_tensors_in_their_index(tmp_path: Path) -> None:
    model = kinds.made("BART")
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    adapter = random_adapter(model, LoraConfig(rank=3, targets=["lm_head"])).with_card(None)
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        assert name in load_file(tmp_path / "out" / file)
    assert {"lm_head.weight", "model.encoder.embed_tokens.weight"} <= index.keys()


def test_merging_in_memory_unties_other_weights_and_keeps_the_base() -> None:
    model: Any = kinds.made("BART")
    adapter = random_adapter(model, LoraConfig(rank=3, targets=["lm_head"])).with_card(None)
    made = merge(model, adapter)
    assert model.lm_head.weight is model.model.shared.weight is model.model.encoder.embed_tokens.weight
    assert made.model.encoder.embed_tokens.weight is not made.model.shared.weight
    assert torch.equal(made.model.encoder.embed_tokens.weight, model.model.shared.weight)
    assert not torch.equal(made.lm_head.weight, made.model.shared.weight)
