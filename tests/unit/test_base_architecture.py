"""A folder is loaded as the class that its config names, and its files must match this class."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kinds
import toys
from brushstroke.base import Base, FolderWeights, load_base, load_tokenizer, require_base
from brushstroke.errors import BaseLoadError, ConfigError

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture(autouse=True)
def _code_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the code that it runs, which is else in the user's home."""
    folder = str(tmp_path_factory.mktemp("code"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    stored = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))
    return folder


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Add tensors, or take out those that are None."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})
    return folder


def with_own_code(folder: Path) -> Path:
    (folder / "modeling_own.py").write_text(OWN_CODE)
    return edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=OWN)


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(BaseLoadError) as caught:
        load_base(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_config_names_the_class(tmp_path: Path, kind: str) -> None:
    model = kinds.made(kind)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype="float32", device="cpu")
    assert type(base.model) is type(model)
    assert type(FolderWeights(tmp_path).model) is type(model)
    loaded = base.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    if kind in kinds.LANGUAGE:
        require_base(base)
        return
    with pytest.raises(ConfigError, match=f"is a {type(model).__name__}, and this needs a causal language"):
        require_base(base)
    with pytest.raises(ConfigError, match=f"is a {type(model).__name__}, and this needs a causal language"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("architectures", [None, [], ["SomethingForCausalLM"], ["Trainer"]])
def test_without_a_known_class_it_is_a_causal_language_model(tmp_path: Path, architectures: Any) -> None:
    toys.tiny_llama().save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=architectures)
    assert type(load_base(tmp_path, device="cpu").model) is transformers.LlamaForCausalLM
    assert type(FolderWeights(tmp_path).model) is transformers.LlamaForCausalLM
    assert load_tokenizer(tmp_path) == (None, 128)


def test_the_class_of_a_text_model_takes_the_texts_part_of_a_config(tmp_path: Path) -> None:
    kinds.saved("CLIP", tmp_path)
    for name in ("CLIPTextModel", "CLIPVisionModel"):
        edit_config(tmp_path, architectures=[name])
        assert type(load_base(tmp_path, device="cpu").model).__name__ == name
        assert type(FolderWeights(tmp_path).model).__name__ == name


def test_custom_module_is_accepted() -> None:
    require_base(Base(torch.nn.Linear(2, 2)))  # whether it predicts tokens, only running it shows


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]])
def test_classifier_named_as_language_model_is_refused(
    tmp_path: Path, tied: bool, architectures: Any
) -> None:
    config = transformers.LlamaConfig(num_labels=3, tie_word_embeddings=tied, **kinds.DECODER)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=architectures)
    said = refused(tmp_path)
    assert ("score.weight" if tied else "lm_head.weight") in said
    assert "LlamaForCausalLM" in said
    if architectures is None:
        assert "names no class that transformers knows (architectures: none)" in said
    elif tied:
        assert "its files contain 1 weights that this class does not have" in said


@pytest.mark.parametrize("architectures", [None, ["SentenceTransformer"], "Trainer"])
def test_unknown_class_error_points_to_config_and_refetches_nothing(
    tmp_path: Path, architectures: Any
) -> None:
    kinds.saved("BERT, classifier", tmp_path)
    edit_config(tmp_path, architectures=architectures)
    said = refused(tmp_path)
    assert "names no class that transformers knows" in said
    assert "under architectures" in said
    assert "fetch it again" not in said


def test_a_class_given_as_a_plain_string_is_that_class(tmp_path: Path) -> None:
    kinds.saved("BERT, classifier", tmp_path)
    edit_config(tmp_path, architectures="BertForSequenceClassification")
    assert type(load_base(tmp_path, device="cpu").model) is transformers.BertForSequenceClassification
    FolderWeights(tmp_path).check_complete()


@pytest.mark.parametrize("change", ["surplus", "shape", "layer", "missing"])
def test_headers_refuse_the_same_folders_as_loading(tmp_path: Path, change: str) -> None:
    toys.tiny_llama().save_pretrained(tmp_path)
    if change == "surplus":
        edit_tensors(tmp_path, {"score.weight": torch.ones(3, 32)})
    elif change == "shape":
        edit_tensors(tmp_path, {"model.norm.weight": torch.ones(5)})
    else:
        edit_config(tmp_path, num_hidden_layers=1 if change == "layer" else 3)
    with pytest.raises(BaseLoadError) as by_headers:
        FolderWeights(tmp_path).check_complete()
    assert str(by_headers.value) == refused(tmp_path)
    assert "torch.Size" not in str(by_headers.value)
    if change == "shape":
        assert "model.norm.weight: (5) in the files, (32) by the config" in str(by_headers.value)


def test_extra_layers_and_biases_are_refused_in_every_class(tmp_path: Path) -> None:
    kinds.saved("BERT, classifier", tmp_path / "layers")
    assert "bert.encoder.layer.1." in refused(edit_config(tmp_path / "layers", num_hidden_layers=1))
    kinds.saved("BERT, embeddings", tmp_path / "bare")
    edit_config(tmp_path / "bare", num_hidden_layers=1)
    assert "encoder.layer.1." in refused(tmp_path / "bare")
    toys.tiny_llama().save_pretrained(tmp_path / "bias")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert name in refused(edit_tensors(tmp_path / "bias", {name: torch.ones(32)}))


def test_buffers_of_language_models_may_be_in_files(tmp_path: Path) -> None:
    toys.tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 128, 128).tril()
    old = {
        f"transformer.h.{i}.attn.{name}": mask.clone() for i in range(2) for name in ("bias", "masked_bias")
    }
    load_base(edit_tensors(tmp_path / "gpt2", old), device="cpu")
    bare = {
        key.removeprefix("transformer."): x
        for key, x in load_file(tmp_path / "gpt2/model.safetensors").items()
    }
    save_file(bare, tmp_path / "gpt2/model.safetensors", metadata={"format": "pt"})
    load_base(tmp_path / "gpt2", device="cpu")
    neo = transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    )
    transformers.GPTNeoForCausalLM(neo).save_pretrained(tmp_path / "neo")
    old = {f"transformer.h.0.attn.attention.{name}": mask.clone() for name in ("bias", "masked_bias")}
    load_base(edit_tensors(tmp_path / "neo", old), device="cpu")
    llama = toys.tiny_llama(tied=True)
    llama.save_pretrained(tmp_path / "llama")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    head = {"lm_head.weight": llama.lm_head.weight.detach().clone()}  # type: ignore[union-attr]
    load_base(edit_tensors(tmp_path / "llama", {**old, **head}), device="cpu")


def test_multi_token_prediction_layers_need_the_config(
    tmp_path: Path,
) -> None:
    toys.tiny_llama().save_pretrained(tmp_path)
    edit_tensors(tmp_path, {f"model.layers.2.{name}.weight": torch.ones(2) for name in ("eh_proj", "norm")})
    assert "model.layers.2.eh_proj" in refused(tmp_path)
    load_base(edit_config(tmp_path, num_nextn_predict_layers=1), device="cpu")
    edit_tensors(tmp_path, {"model.layers.3.norm.weight": torch.ones(2)})
    assert "model.layers.3.norm" in refused(tmp_path)


def test_encoder_files_may_contain_unused_heads(tmp_path: Path) -> None:
    """As those of bert-base-uncased, which hold two heads and a pooler."""
    whole = transformers.BertForPreTraining(transformers.BertConfig(**kinds.ENCODER))
    for name in ("BertForMaskedLM", "BertForNextSentencePrediction", "BertModel"):
        whole.save_pretrained(tmp_path / name)
        base = load_base(edit_config(tmp_path / name, architectures=[name]), device="cpu")
        assert type(base.model).__name__ == name


def test_recomputable_tensors_may_be_missing(tmp_path: Path) -> None:
    tokens = {"pad_token_id": 119, "decoder_start_token_id": 119, "eos_token_id": 0}
    config = transformers.MarianConfig(**kinds.PAIR, max_position_embeddings=64, **tokens)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)  # without its sinusoidal positions
    assert not any("embed_positions" in name for name in load_file(tmp_path / "model.safetensors"))
    load_base(tmp_path, device="cpu")
    FolderWeights(tmp_path).check_complete()
    edit_tensors(tmp_path, {"model.encoder.layers.0.fc1.bias": None})
    assert "model.encoder.layers.0.fc1.bias" in refused(tmp_path)
    with pytest.raises(BaseLoadError, match="fc1"):
        FolderWeights(tmp_path).check_complete()


def test_custom_code_needs_trust_remote_code(tmp_path: Path) -> None:
    toys.tiny_llama().save_pretrained(tmp_path)
    with_own_code(tmp_path)
    for load in (load_base, load_tokenizer, FolderWeights):
        with pytest.raises(BaseLoadError, match=r"has its own code for its config.*--trust-remote-code"):
            load(tmp_path)
    base = load_base(tmp_path, dtype="float32", device="cpu", trust_remote_code=True)
    assert type(base.model).__name__ == "OwnForCausalLM"
    assert torch.equal(base.model.lm_head.weight, toys.tiny_llama().lm_head.weight)  # type: ignore[union-attr]
    require_base(base)
    assert load_tokenizer(tmp_path, trust_remote_code=True) == (None, 128)
    assert type(FolderWeights(tmp_path, trust_remote_code=True).model).__name__ == "OwnForCausalLM"


def test_custom_class_for_a_known_config_is_refused(tmp_path: Path) -> None:
    """It would be loaded as the causal language model of that config, which it is not."""
    toys.tiny_llama(tied=True).save_pretrained(tmp_path)
    edit_config(
        tmp_path, architectures=["OwnForCausalLM"], auto_map={"AutoModel": "modeling_own.OwnForCausalLM"}
    )
    (tmp_path / "modeling_own.py").write_text(OWN_CODE)
    assert "for OwnForCausalLM (modeling_own.OwnForCausalLM)" in refused(tmp_path)
    loaded = load_base(tmp_path, device="cpu", trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnForCausalLM"
    require_base(loaded)


def test_known_class_runs_no_custom_code(tmp_path: Path) -> None:
    toys.tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text("raise RuntimeError('this must not run')")
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"})
    assert type(load_base(tmp_path, device="cpu").model) is transformers.LlamaForCausalLM


def test_custom_tokenizer_code_is_refused_with_the_same_message(tmp_path: Path) -> None:
    toys.tiny_llama().save_pretrained(tmp_path)
    stored = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tok_own.OwnTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stored))
    edit_config(tmp_path, model_type="llama")
    said = refused(tmp_path)
    assert "has its own code for its tokenizer" in said
    assert "--trust-remote-code" in said


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_without_a_tokenizer_has_none(hub: Path, tmp_path: Path) -> None:
    """transformers makes an empty one up for Whisper."""
    for kind, name in (("ViT", "vit"), ("Whisper", "whisper")):
        folder = kinds.saved(kind, tmp_path / name)
        snapshot = hub / f"models--tiny--{name}" / "snapshots" / ("a" * 40)
        shutil.copytree(folder, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
        base = load_base(f"tiny/{name}", device="cpu")
        assert base.tokenizer is None
        assert type(base.model) is type(kinds.made(kind))
