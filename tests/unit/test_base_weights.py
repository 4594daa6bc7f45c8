"""W (d×h) of every site, from a live model and from files in every common layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import toys
from brushstroke.base import Base, FolderWeights, open_base, quiet_transformers
from brushstroke.errors import BaseLoadError
from brushstroke.sites import ModelWeights


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder, **options)
    return folder


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "model.safetensors"
    tensors = {
        (new + key.removeprefix(old) if key.startswith(old) else key): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def assert_same(folder: Path, model: nn.Module) -> FolderWeights:
    files, live = FolderWeights(folder), ModelWeights(model)
    assert list(files) == list(live)
    assert files.sites() == live.sites()
    assert len(files) == len(files.sites())
    for site in files.sites():
        W = files[site.path]
        assert torch.equal(W, live[site.path])
        assert tuple(W.shape) == site.shape
    return files


def test_live_weights_are_views_of_shape_d_by_h() -> None:
    model = toys.tiny_gpt2()
    weights = ModelWeights(Base(model))
    c_attn: Any = model.get_submodule("transformer.h.0.attn.c_attn")
    W = weights["transformer.h.0.attn.c_attn"]
    assert W.shape == (32, 96)
    assert W.data_ptr() == c_attn.weight.data_ptr()
    assert weights["lm_head"].shape == (32, toys.VOCABULARY)
    assert not W.requires_grad
    assert {site.path: site.tied_to for site in weights.sites()}["lm_head"] == "transformer.wte"
    assert "lm_head" in weights
    with pytest.raises(KeyError, match="did you mean"):
        weights["lm_heat"]


def test_a_packed_weight_is_not_read() -> None:
    net = toys.Mlp()
    net.fc1.weight = nn.Parameter(torch.ones(10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BaseLoadError, match=r"fc1.*packed"):
        ModelWeights(net)["fc1"]


def test_one_file(language_model: nn.Module, tmp_path: Path) -> None:
    assert_same(saved(language_model, tmp_path), language_model)


def test_shards(language_model: nn.Module, tmp_path: Path) -> None:
    files = assert_same(saved(language_model, tmp_path, max_shard_size="20KB"), language_model)
    assert len(files.shards()) > 2
    assert {files.key(site)[0] for site in files} <= set(files.shards())
    file, key = files.key(next(iter(files)))
    assert key in load_file(tmp_path / file)


def test_tied_head_reads_the_embedding(tied_llama: nn.Module, tmp_path: Path) -> None:
    files = assert_same(saved(tied_llama, tmp_path), tied_llama)
    assert files.key("lm_head") == ("model.safetensors", "model.embed_tokens.weight")
    assert files.sites()[-1].tied_to == "model.embed_tokens"


def test_keys_without_the_prefix_of_the_base_model(gpt2: nn.Module, tmp_path: Path) -> None:
    rename(saved(gpt2, tmp_path), "transformer.", "")
    files = assert_same(tmp_path, gpt2)
    assert files.key("transformer.h.0.attn.c_attn")[1] == "h.0.attn.c_attn.weight"


def test_keys_with_a_prefix_that_the_model_lacks(llama: Any, tmp_path: Path) -> None:
    inner = llama.model
    rename(saved(inner, tmp_path), "", "model.")
    assert_same(tmp_path, inner)


def test_site_missing_in_files_is_an_error(llama: nn.Module, tmp_path: Path) -> None:
    rename(saved(llama, tmp_path), "model.layers.1.mlp.up_proj", "model.layers.1.mlp.other")
    files = FolderWeights(tmp_path)
    site = "model.layers.1.mlp.up_proj"
    assert site in files
    for ask in (files.key, files.__getitem__):
        with pytest.raises(BaseLoadError, match=rf"{site}.*whole model"):
            ask(site)


def test_missing_weights_are_reported_if_all_tensors_are_known(
    language_model: nn.Module, tmp_path: Path
) -> None:
    FolderWeights(saved(language_model, tmp_path)).check_complete()
    tensors = load_file(tmp_path / "model.safetensors")
    norm = next(key for key in tensors if "norm" in key or "ln_f" in key)
    moved = tensors.pop(norm)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseLoadError, match=f"1 weights are missing .*{norm}.*; fetch"):
        FolderWeights(tmp_path).check_complete()
    save_file({**tensors, "renamed": moved}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    FolderWeights(tmp_path).check_complete()  # it may be renamed on loading


def test_weight_missing_only_in_the_index_is_found(llama: nn.Module, tmp_path: Path) -> None:
    index = saved(llama, tmp_path, max_shard_size="20KB") / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    del stored["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(stored))
    FolderWeights(tmp_path).check_complete()


def test_a_tied_head_and_other_prefixes_are_complete(tied_llama, gpt2, tmp_path):
    FolderWeights(saved(tied_llama, tmp_path / "tied")).check_complete()
    folder = saved(gpt2, tmp_path / "gpt2")
    FolderWeights(folder).check_complete()
    rename(folder, "transformer.", "")
    FolderWeights(folder).check_complete()


def test_a_tensor_of_another_shape_or_kind(llama: nn.Module, tmp_path: Path) -> None:
    file = saved(llama, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.ones(3, 4)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    files = FolderWeights(tmp_path)
    with pytest.raises(BaseLoadError, match=r"lm_head.*\(64, 32\).*\(3, 4\)"):
        files["lm_head"]
    with pytest.raises(BaseLoadError, match="U8"):
        files["model.layers.0.mlp.up_proj"]


def test_a_folder_that_cannot_be_read(llama: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BaseLoadError, match="safetensors"):
        FolderWeights(tmp_path)
    index = saved(llama, tmp_path, max_shard_size="20KB") / "model.safetensors.index.json"
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    (tmp_path / shard).unlink()
    with pytest.raises(BaseLoadError, match=f"lacks {shard}"):
        FolderWeights(tmp_path)
    index.write_text("{}")
    with pytest.raises(BaseLoadError, match="damaged"):
        FolderWeights(tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BaseLoadError, match="damaged"):
        FolderWeights(tmp_path)


def test_an_index_that_names_files_elsewhere(llama: nn.Module, tmp_path: Path) -> None:
    index = saved(llama, tmp_path / "base", max_shard_size="20KB") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for shard in set(content["weight_map"].values()):
        (tmp_path / shard).write_bytes((tmp_path / "base" / shard).read_bytes())
    content["weight_map"] = {key: f"../{shard}" for key, shard in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(
        BaseLoadError, match=r"lacks \.\./model-.*, which model\.safetensors\.index\.json names"
    ):
        FolderWeights(tmp_path / "base")


def test_a_folder_without_a_config(llama: nn.Module, tmp_path: Path) -> None:
    (saved(llama, tmp_path) / "config.json").unlink()
    with pytest.raises(BaseLoadError, match="config"):
        FolderWeights(tmp_path)


def test_a_plain_folder_is_opened_by_its_files(tmp_path, llama):
    opened = open_base(saved(llama, tmp_path / "plain"))
    assert isinstance(opened, FolderWeights)


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path, llama):
    folder = saved(llama, tmp_path / "whole")
    rename(folder, "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.renamed")
    with pytest.raises(BaseLoadError):  # and these cannot be loaded either: a weight is missing
        open_base(folder)


def test_invalid_base_argument_is_refused(tmp_path):
    with pytest.raises(BaseLoadError, match="none"):
        open_base(tmp_path / "none")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(BaseLoadError, match="adapter"):
        open_base(tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["cut", "empty", "moved"])
def test_shards_are_complete_and_match_the_index(llama: nn.Module, tmp_path: Path, damage: str) -> None:
    """Also one that no adapted weight is in: a merge copies it."""
    folder = saved(llama, tmp_path, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.embed_tokens.weight"]
    if damage == "moved":
        other = next(file for file in content["weight_map"].values() if file != shard)
        content["weight_map"]["model.embed_tokens.weight"] = shard = other
        index.write_text(json.dumps(content))
    else:
        data = (folder / shard).read_bytes()
        (folder / shard).write_bytes(data[:-1] if damage == "cut" else b"")
    with pytest.raises(BaseLoadError, match=f"{shard} (is damaged|lacks 'model.embed_tokens.weight')"):
        FolderWeights(folder)


@pytest.mark.parametrize("weight_map", [[], None, "model.safetensors"])
def test_invalid_index_is_refused(llama: nn.Module, tmp_path: Path, weight_map: object) -> None:
    folder = saved(llama, tmp_path, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BaseLoadError, match="are damaged"):
        FolderWeights(folder)
