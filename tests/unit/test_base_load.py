"""Loading a frozen base: its properties, refusals, and no output."""

import contextlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as hf_logging

from brushstroke.base import Base, choose_device, choose_dtype, load_base, load_tokenizer, quiet_transformers
from brushstroke.errors import BaseLoadError, ConfigError
from brushstroke.samples import model_path

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, llama: Any) -> Path:
    with quiet_transformers():
        llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama of one layer, with a tied head and a tokenizer of bytes, in fp32; the cache is a new one."""
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path / "cache"))
    gguf = pytest.importorskip("gguf")
    words = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]
    file = tmp_path / "gguf" / "tiny.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (len(words), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        **{f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}": (48, 32) for part in ("gate", "up")},
        "blk.0.ffn_down": (32, 48),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def assert_frozen(base: Base) -> None:
    assert not any(module.training for module in base.model.modules())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_loading_a_folder_gives_frozen_saved_weights(folder: Path, llama: nn.Module) -> None:
    base = load_base(folder, dtype="float32", device="cpu")
    assert_frozen(base)
    assert base.tokenizer is None
    assert base.name == str(folder)
    assert not base.quantised
    assert (base.device, base.dtype) == (CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), base.model.parameters(), strict=True))


def test_a_tied_head_stays_tied(tmp_path: Path, tied_llama: Any) -> None:
    with quiet_transformers():
        tied_llama.save_pretrained(tmp_path)
    model: Any = load_base(tmp_path, dtype="bfloat16", device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16


def test_generate_equals_that_of_the_model(folder: Path) -> None:
    base = load_base(folder, device="cpu")
    assert base.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).shape == (1, 5)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    tokenizer = load_base(folder, device="cpu").tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<end>", 1)


def test_loading_is_silent_and_restores_settings(
    folder: Path, gguf_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    load_base(folder, device="cpu")
    load_base(gguf_file, device="cpu")
    assert (hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()) == before
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_becomes_a_plain_model_that_can_be_saved(gguf_file: Path, tmp_path: Path) -> None:
    import gguf

    found = gguf.GGUFReader, vars(gguf).get("get_tensor_name_map")
    base = load_base(gguf_file.parent, dtype="float32", device="cpu")
    assert (gguf.GGUFReader, vars(gguf).get("get_tensor_name_map")) == found
    assert_frozen(base)
    model: Any = base.model
    assert base.quantised
    assert model.brushstroke_quantised
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert base.tokenizer.encode("ab", add_special_tokens=False) == [29]
    with quiet_transformers():
        model.save_pretrained(tmp_path / "plain")
    again: Any = load_base(tmp_path / "plain", dtype="float32", device="cpu")
    assert not again.quantised
    assert torch.equal(
        again.model(torch.ones(1, 3, dtype=torch.long)).logits, model(torch.ones(1, 3).long()).logits
    )


PROBES = ("a b  c", "<end>ab", " x", "The capital of France is 1234!\n\n", "<|im_start|>user\nhi<|im_end|>")


def assert_equal_bases(first: Base, second: Base) -> None:
    weights = [dict(base.model.named_parameters(remove_duplicate=False)) for base in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    buffers = [dict(base.model.named_buffers()) for base in (first, second)]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    models: list[Any] = [first.model, second.model]
    for config in ("config", "generation_config"):
        stored = [getattr(model, config).to_dict() for model in models]
        for one in stored:
            for name in ("_name_or_path", "transformers_version", "architectures", "_from_model_config"):
                one.pop(name, None)
        assert stored[0] == stored[1]
    assert first.quantised == second.quantised
    tokenizers = [first.tokenizer, second.tokenizer]
    assert type(tokenizers[0]) is type(tokenizers[1])
    assert len({len(tokenizer) for tokenizer in tokenizers}) == 1
    for name in ("special_tokens_map", "chat_template", "padding_side", "clean_up_tokenization_spaces"):
        assert getattr(tokenizers[0], name) == getattr(tokenizers[1], name), name
    for text in PROBES:
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text), text
        ids = tokenizers[0].encode(text)
        assert tokenizers[0].decode(ids) == tokenizers[1].decode(ids), text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_is_read_once_and_then_from_the_cache(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    first = load_base(gguf_file, dtype=dtype, device="cpu")
    (kept,) = (tmp_path / "cache" / "gguf").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr("brushstroke.base.gguf_file._header_read_once", refuse_to_read)
        assert_equal_bases(first, load_base(gguf_file, dtype=dtype, device="cpu"))
        assert load_tokenizer(gguf_file)[1] == 64
    weights = kept / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_equal_bases(first, load_base(gguf_file, dtype=dtype, device="cpu"))
    (kept / "tokenizer.json").write_text("{")
    assert load_tokenizer(gguf_file)[1] == 64
    assert_equal_bases(first, load_base(gguf_file, dtype=dtype, device="cpu"))
    assert [path.name for path in (tmp_path / "cache" / "gguf").iterdir()] == [kept.name]
    with monkeypatch.context() as patched:
        patched.setattr("brushstroke.base.gguf_file._header_read_once", refuse_to_read)
        load_base(gguf_file, dtype=dtype, device="cpu")
        gguf_file.write_bytes(gguf_file.read_bytes() + b"\0")
        with pytest.raises(BaseLoadError, match="read again"):
            load_base(gguf_file, dtype=dtype, device="cpu")


def refuse_to_read(*_: object) -> None:
    raise AssertionError("the GGUF file is read again")


def test_a_gguf_file_that_changes_while_it_is_read_is_not_kept(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = iter(["0" * 32, "1" * 32])
    monkeypatch.setattr("brushstroke.base.gguf_cache.key_of", lambda path: next(keys))
    load_base(gguf_file, dtype="float32", device="cpu")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_the_cache_of_gguf_files_is_bounded(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base(gguf_file, dtype="float32", device="cpu")
    (first,) = (tmp_path / "cache" / "gguf").iterdir()
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr("brushstroke.base.gguf_cache.LIMIT", size + 1000)
    load_base(gguf_file, dtype="bfloat16", device="cpu")
    (second,) = (tmp_path / "cache" / "gguf").iterdir()
    assert second.name.endswith("-bfloat16")
    monkeypatch.setattr("brushstroke.base.gguf_cache.LIMIT", 1000)
    load_base(gguf_file, dtype="float32", device="cpu")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == [second]


def test_a_cache_that_cannot_be_written_does_not_stop_the_loading(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path / "file"))
    load_base(gguf_file, dtype="float32", device="cpu")


@pytest.mark.model
@pytest.mark.slow
def test_the_real_gguf_model_is_the_same_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model_path()
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path / "cache"))
    first = load_base(file, dtype="float32", device="cpu")
    monkeypatch.setattr("brushstroke.base.gguf_file._header_read_once", refuse_to_read)
    assert_equal_bases(first, load_base(file, dtype="float32", device="cpu"))


@pytest.mark.model
@pytest.mark.slow
def test_the_real_gguf_model() -> None:
    base = load_base(model_path(), dtype="float32", device="cpu")
    model: Any = base.model
    assert base.quantised
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in base.tokenizer.decode(base.generate(**ids, max_new_tokens=3, do_sample=False)[0])


def refused(name: str | Path) -> str:
    with pytest.raises(BaseLoadError) as caught:
        load_base(name, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_base_is_refused_without_network(tmp_path: Path) -> None:
    assert "no file or folder" in refused(tmp_path / "nothing")
    assert "no file or folder" in refused("./nothing")
    assert "no file or folder" in refused("some/model.gguf")
    assert "empty" in refused("")


def test_an_unreachable_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hub" in refused("nobody/brushstroke-has-no-such-model")


def test_folder_without_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refused(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    assert "unknown kind" in refused(tmp_path / "notes.txt")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(tmp_path / "adapter")
    (tmp_path / "two").mkdir()
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / "two" / name).write_bytes(b"")
    assert "a.gguf, b.gguf" in refused(tmp_path / "two")
    assert "not a GGUF file" in refused(tmp_path / "two" / "a.gguf")


def test_a_damaged_model_is_refused(folder: Path, gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:300])
    assert "tiny.gguf" in refused(gguf_file)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    assert str(folder) in refused(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(folder)


def test_missing_weight_is_refused_not_initialised(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder)


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(folder)


def test_the_rule_for_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_features(machine: str, **features: bool) -> torch.dtype:
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        return choose_dtype("auto", CPU)[0]

    assert with_features("x86_64", avx512_bf16=True) == torch.bfloat16
    assert with_features("x86_64", amx_bf16=True) == torch.bfloat16
    assert with_features("x86_64", avx2=True) == torch.float32
    assert with_features("aarch64", bf16=True) == torch.bfloat16
    assert with_features("aarch64", neon=True) == torch.float32
    assert choose_dtype("float16", CPU) == (torch.float16, "asked for")
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        choose_dtype("bfloat", CPU)


def test_the_rule_for_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device(CPU) == CPU
    with pytest.raises(ConfigError, match=re.escape("auto, cpu, cuda, mps")):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not available on this machine"):
            choose_device("cuda")


def test_log_levels_are_restored_after_an_error() -> None:
    level = hf_logging.get_verbosity()
    with contextlib.suppress(RuntimeError), quiet_transformers():
        assert hf_logging.get_verbosity() == logging.ERROR
        raise RuntimeError
    assert hf_logging.get_verbosity() == level
