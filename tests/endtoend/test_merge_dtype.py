"""The dtype of a merge is that of the tensors in the base's files, whatever its config says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toys
from brushstroke.base import load_base
from brushstroke.errors import BaseLoadError, ConfigError
from brushstroke.formats import save
from brushstroke.merging import merge_folder

NORM = "model.norm.weight"
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def base(folder: Path, stored: torch.dtype, reported: str | None, *, norm: torch.dtype | None = None) -> Path:
    """A Llama in one dtype, or with its norm in another, whose config says a third."""
    toys.tiny_llama().save_pretrained(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(file).items()}
    if norm is not None:
        tensors[NORM] = (1 + 1e-4 * torch.arange(32)).to(norm)  # which no half precision holds
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": reported}))
    return folder


def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save(toys.random_adapter(toys.tiny_llama()).with_card(None), tmp_path / "adapter")
    return tmp_path / "adapter"


def merged(cli: Any, folder: Path | str, adapter: Path, *flags: str) -> tuple[dict[str, torch.Tensor], bool]:
    """The merged tensors, and whether they were made without loading the base."""
    out = adapter.parent / "out"
    done = cli("merge", folder, adapter, "--out", out, "--json", *flags)
    assert done.status == 0, done.err
    tensors = load_file(out / "model.safetensors")
    shutil.rmtree(out)
    return tensors, json.loads(done.out)["streamed"]


def dtypes(tensors: dict[str, torch.Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors.values()}


@pytest.mark.parametrize("reported", ["float32", "bfloat16", None])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtype_follows_files_or_flag_not_the_config(cli, tmp_path, adapter, stored, reported):
    folder = base(tmp_path / "base", FLOATS[stored], reported)
    for asked in ("auto", "float32", "bfloat16"):
        tensors, streamed = merged(cli, folder, adapter, "--dtype", asked)
        assert dtypes(tensors) == {FLOATS[stored if asked == "auto" else asked]}
        assert streamed == (asked in ("auto", stored))


def test_mixed_dtypes_are_kept_or_converted_to_the_given_one(cli, tmp_path, adapter):
    folder = base(tmp_path / "base", torch.bfloat16, "bfloat16", norm=torch.float32)
    before = load_file(folder / "model.safetensors")
    tensors, streamed = merged(cli, folder, adapter)
    assert streamed
    assert {name: x.dtype for name, x in tensors.items()} == {name: x.dtype for name, x in before.items()}
    assert torch.equal(tensors[NORM], before[NORM])
    tensors, streamed = merged(cli, folder, adapter, "--dtype", "bfloat16")
    assert not streamed
    assert dtypes(tensors) == {torch.bfloat16}


@pytest.mark.parametrize("reported", ["float32", "bfloat16"])
def test_loaded_base_keeps_full_precision(cli, tmp_path, adapter, reported):
    folder = pickled(base(tmp_path / "base", torch.bfloat16, reported, norm=torch.float32))
    before = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors, streamed = merged(cli, folder, adapter)
    assert not streamed
    assert dtypes(tensors) == {torch.float32}  # it holds bf16 too
    assert torch.equal(tensors[NORM], before[NORM])
    whole = pickled(base(tmp_path / "whole", torch.bfloat16, reported))
    assert dtypes(merged(cli, whole, adapter)[0]) == {torch.bfloat16}
    both = pickled(base(tmp_path / "both", torch.bfloat16, reported, norm=torch.float16))
    assert dtypes(merged(cli, both, adapter)[0]) == {torch.float32}  # neither holds the other


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_dtype_of_a_hub_base_follows_its_files(cli, tmp_path, adapter, monkeypatch, form):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = base(tmp_path / "hub/models--tiny--half/snapshots" / ("a" * 40), torch.bfloat16, "float32")
    if form == "bin":
        pickled(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    assert dtypes(merged(cli, "tiny/half", adapter)[0]) == {torch.bfloat16}
    assert dtypes(merged(cli, "tiny/half", adapter, "--dtype", "float32")[0]) == {torch.float32}


def test_a_loaded_base_is_in_its_dtype_already(tmp_path):
    folder = base(tmp_path / "base", torch.float32, "float32")
    loaded, adapter = load_base(folder, dtype="float32", device="cpu"), toys.random_adapter(toys.tiny_llama())
    with pytest.raises(ConfigError, match=r"loaded in torch\.float32.*load it in bfloat16, or leave dtype"):
        merge_folder(loaded, adapter, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    merge_folder(loaded, adapter, tmp_path / "out", dtype="float32")


def test_damaged_files_are_named(tmp_path):
    folder = base(tmp_path / "base", torch.float32, "float32")
    adapter = toys.random_adapter(toys.tiny_llama())
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BaseLoadError, match=r"model\.safetensors is damaged"):
        merge_folder(folder, adapter, tmp_path / "out", dtype="bfloat16")
