"""Merging a base's folder and an adapter into a folder for plain transformers."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.falcon.modeling_falcon import FalconLinear

from brushstroke.adapter import Adapter, Card, Fingerprint, LoraConfig
from brushstroke.adapter.fingerprint import sample
from brushstroke.base import Base, FolderWeights, load_base
from brushstroke.errors import BaseLoadError, BaseMismatchError, MergeError, OutputError, ShapeError
from brushstroke.layers import attach
from brushstroke.lowrank import LowRank
from brushstroke.merging import export, merge_folder
from brushstroke.merging import stream as merge_stream
from brushstroke.merging import verify as merge_check
from brushstroke.merging.shards import Header
from brushstroke.outputs import replace

EXACT = 1e-5  # relative, fp32: one rounding of each weight
BF16 = 2e-2  # relative: 2⁻⁸ of each weight, seen through all layers
MEMORY_ALLOWANCE = 500 * 2**20


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **sizes, **changes)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def adapter_for(model, targets="all-linear", size=0.3) -> Adapter:
    with attach(model, LoraConfig(rank=3, targets=targets)) as attachment:
        fresh = attachment.adapter()
    generator = torch.Generator().manual_seed(1)
    factors = {
        site: LowRank(
            size * torch.randn(update.shape[0], 3, generator=generator),
            size * torch.randn(3, update.shape[1], generator=generator),
            0.5,
        )
        for site, update in fresh.items()
    }
    return Adapter(factors, fresh.card)


def logits(model) -> torch.Tensor:
    tokens = torch.arange(20)[None] * 5
    with torch.no_grad():
        return model(tokens).logits.float()


def adapted_logits(folder: Path, adapter: Adapter, dtype: str = "float32") -> torch.Tensor:
    base = load_base(folder, dtype=dtype, device="cpu")
    with attach(base, adapter):
        return logits(base.model)


def drift(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_prefix(folder: Path) -> None:
    """As the first GPT-2 checkpoints: tensor keys without "transformer."."""
    file = folder / "model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path) -> Path:
    llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["llama", "llama in shards", "gpt2", "gpt2 without prefix"])
def test_merged_folder_equals_the_adapted_base(tmp_path, kind):
    model = gpt2() if "gpt2" in kind else llama()
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": "20KB"} if "shards" in kind else {}))
    if "without" in kind:
        without_prefix(tmp_path / "base")
    adapter = adapter_for(model)
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = adapted_logits(tmp_path / "base", adapter)
    assert drift(logits(merged), expected) < EXACT
    assert drift(logits(model), expected) > 0.01
    assert report.streamed
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    assert set(report.sites) == set(adapter)
    assert report.survived > 0.999
    assert report.output < EXACT
    assert {type(m) for m in merged.modules()} == {type(m) for m in model.modules()}


def test_names_headers_and_other_files_are_kept_without_a_trace_of_brushstroke(folder, tmp_path):
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_bytes(b"unmerged weights")
    for name in (".git", ".cache", ".hidden"):
        (folder / name).mkdir()
        (folder / name / "HEAD").write_text("hidden")
    (folder / ".env").write_text("hidden")
    (folder / ".gitattributes").write_text("of the hub")
    (folder / "code").symlink_to(folder / "notes")
    before = everything(folder)
    report = merge_folder(folder, adapter_for(llama(), ["layers.0.self_attn.q_proj"]), tmp_path / "out")
    after = everything(tmp_path / "out")
    hidden = {".env", ".gitattributes", ".git/HEAD", ".cache/HEAD", ".hidden/HEAD"}
    assert set(before) - set(after) == {"pytorch_model.bin", *hidden}
    assert report.left_out == (".env", ".hidden", "code", "pytorch_model.bin")
    changed = {name for name in after if after[name] != before[name]}
    assert len(changed) == 1
    (shard,) = changed
    assert Header.read(folder / shard) == Header.read(tmp_path / "out" / shard)
    assert not any(b"brushstroke" in content or b"lora" in content for content in after.values())
    assert everything(folder) == before


def test_bf16_is_rounded_once_and_the_drift_is_reported(tmp_path):
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapter = adapter_for(model)
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for site, update in adapter.items():
        W = model.get_submodule(site).weight.detach().float().mT
        assert torch.equal(merged[f"{site}.weight"], (W + update.dense()).to(torch.bfloat16).mT)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert 0 < report.output < BF16
    assert report.logit_drift is not None
    assert 0 < report.logit_drift < BF16


@pytest.mark.parametrize("shards", [False, True])
def test_a_tied_head_is_untied_openly(tmp_path, shards):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": "20KB"} if shards else {}))
    adapter = adapter_for(model, ["lm_head", "q_proj"])
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "text_config": None}))
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    assert report.untied == (("lm_head", "model.embed_tokens"),)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert drift(logits(merged), adapted_logits(tmp_path / "base", adapter)) < EXACT
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    if shards:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        file = tmp_path / "out" / index["weight_map"]["lm_head.weight"]
        with safe_open(file, framework="pt") as opened:
            assert "lm_head.weight" in opened.keys()  # noqa: SIM118
        sizes = [Header.read(path).bytes() for path in (tmp_path / "out").glob("*.safetensors")]
        assert index["metadata"]["total_size"] == sum(sizes)
    # and merging into what was untied is an ordinary merge
    again = dataclasses.replace(adapter.card, fingerprint=None)
    second = merge_folder(tmp_path / "out", adapter.with_card(again), tmp_path / "twice", verify=False)
    assert second.untied == ()


def test_the_same_adapter_is_not_merged_twice_and_a_foreign_base_is_refused(folder, tmp_path):
    adapter = adapter_for(llama())
    merge_folder(folder, adapter, tmp_path / "once")
    with pytest.raises(BaseMismatchError, match="already merged into the base"):
        merge_folder(tmp_path / "once", adapter, tmp_path / "twice")
    foreign = llama()
    with torch.no_grad():
        for parameter in foreign.parameters():
            parameter.normal_()
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(BaseMismatchError, match="another base"):
        merge_folder(tmp_path / "foreign", adapter, tmp_path / "twice")
    with pytest.raises(ShapeError, match="does not fit"):
        merge_folder(folder, adapter_for(gpt2()), tmp_path / "twice")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "foreign", "once"]
    merge_folder(tmp_path / "foreign", adapter, tmp_path / "allowed", allow_different_base=True)


def test_update_lost_in_rounding_is_refused_and_nothing_is_written(tmp_path):
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match="survives the rounding"):
        merge_folder(
            tmp_path / "base", adapter_for(model, size=1e-4), tmp_path / "a" / "b" / "out", rounding="nearest"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_overflowing_sum_is_refused_and_nothing_is_written(tmp_path):
    model = llama().to(torch.float16)
    site = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(site).weight[0, 0] = 60000.0
    model.save_pretrained(tmp_path / "base")
    large = Adapter({site: LowRank(torch.full((48, 1), 100.0), torch.full((1, 32), 80.0))})
    with pytest.raises(MergeError, match=rf"{site}: .* too large for torch.float16.*--dtype"):
        merge_folder(tmp_path / "base", large, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    merge_folder(tmp_path / "base", large, tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged[f"{site}.weight"][0, 0].item() == 68000.0


def test_custom_forward_is_tested_without_loading_the_model(tmp_path, monkeypatch):
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**sizes))  # its linear layers are of a class of its own
    model.save_pretrained(tmp_path / "base")
    adapter = adapter_for(model)
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    assert report.streamed
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    plain = FalconLinear.forward
    monkeypatch.setattr(FalconLinear, "forward", lambda self, x: 2.0 * plain(self, x))
    with pytest.raises(MergeError, match=r"\(FalconLinear\) has a forward of its own, which does not add"):
        merge_folder(tmp_path / "base", adapter, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_custom_forward_is_tested_with_the_tensors_of_the_files(tmp_path, monkeypatch):
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**sizes, bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.ones_(parameter)
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(FalconLinear, "forward", lambda self, x: x @ self.weight.mT * self.bias)
    report = merge_folder(tmp_path / "base", adapter_for(model), tmp_path / "out", verify=False)
    assert report.streamed
    nn.init.constant_(model.transformer.h[0].self_attention.query_key_value.bias, 2.0)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match=r"\(FalconLinear\) has a forward of its own, which does not add"):
        merge_folder(tmp_path / "base", adapter_for(model), tmp_path / "other", verify=False)


def test_existing_folder_is_refused_and_overwrite_keeps_foreign_files(folder, tmp_path):
    adapter, out = adapter_for(llama()), tmp_path / "out"
    merge_folder(folder, adapter, out)
    first = everything(out)
    (out / "mine").mkdir()
    (out / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        merge_folder(folder, adapter, out)
    shutil.copytree(folder, tmp_path / "single")
    llama().save_pretrained(tmp_path / "whole")
    merge_folder(tmp_path / "whole", adapter, out, overwrite=True)
    assert drift(logits(AutoModelForCausalLM.from_pretrained(out)), adapted_logits(folder, adapter)) < EXACT
    assert (out / "mine" / "notes.txt").read_text() == "mine"
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.glob("model-*"))
    merge_folder(folder, adapter, out, overwrite=True)
    assert {k: v for k, v in everything(out).items() if not k.startswith("mine")} == first
    for bad in (folder, folder / "in", folder.parent):
        with pytest.raises(OutputError):
            merge_folder(folder, adapter, bad, overwrite=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_merge_leaves_no_partial_files(folder, tmp_path, monkeypatch, error):
    adapter, out = adapter_for(llama()), tmp_path / "out"
    merge_folder(folder, adapter, out)
    before, calls = everything(out), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return write(*args, **kwargs)

    write = merge_stream.write_shard
    monkeypatch.setattr(merge_stream, "write_shard", failing)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        merge_folder(folder, adapter, out, overwrite=True)
    calls.clear()
    with pytest.raises(expected):
        merge_folder(folder, adapter, tmp_path / "new")
    assert everything(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


WORK = ".out.partial-0123abcd"  # where a folder `out` is built


@pytest.fixture
def earlier(folder, tmp_path) -> Path:
    """The folder of an earlier merge, with a file of the user's."""
    merge_folder(folder, adapter_for(llama()), tmp_path / "out", verify=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    return tmp_path / "out"


def test_kill_between_the_renames_is_undone_first(folder, earlier):
    before, adapter = everything(earlier), adapter_for(llama())
    work = earlier.with_name(WORK)
    work.mkdir()
    earlier.rename(work / "old")
    earlier.mkdir()  # an empty folder is as none
    shutil.copytree(folder, work / "new")
    with pytest.raises(OutputError, match="is not empty"):
        merge_folder(folder, adapter, earlier, verify=False)
    assert everything(earlier) == before
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["base", "out"]
    work.mkdir()
    earlier.rename(work / "old")
    merge_folder(folder, adapter, earlier, overwrite=True, verify=False)
    assert everything(earlier) == before
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["base", "out"]


def test_kill_after_the_renames_is_cleaned_up_without_loss(folder, earlier):
    before = everything(earlier)
    old = earlier.with_name(WORK) / "old"
    shutil.copytree(earlier, old)
    (earlier / "notes.txt").unlink()  # as if another tool had replaced the folder
    (old / "model-00099-of-00099.safetensors").write_bytes(b"of an earlier merge")
    merge_folder(folder, adapter_for(llama()), earlier, overwrite=True, verify=False)
    assert everything(earlier) == before
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["base", "out"]


def test_partial_folder_of_a_running_merge_is_kept(folder, earlier):
    holding = "import sys; from pathlib import Path; from brushstroke.outputs.lock import lock_shared\n"
    holding += "lock_shared(Path(sys.argv[1])); print(flush=True); input()"
    work = earlier.with_name(WORK)
    (work / "new").mkdir(parents=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holding, work], **pipes) as process:
        process.stdout.readline()
        merge_folder(folder, adapter_for(llama()), earlier, overwrite=True, verify=False)
        assert sorted(p.name for p in earlier.parent.iterdir()) == [WORK, "base", "out"]
        earlier.rename(work / "old")
        with pytest.raises(
            OutputError,
            match=rf"another process is replacing .*{WORK}/old; wait for it, or if it has ended",
        ):
            merge_folder(folder, adapter_for(llama()), earlier, overwrite=True, verify=False)
        process.communicate(b"\n")


def test_broken_link_is_kept_and_does_not_block_recovery(folder, earlier):
    for number in range(2):
        (earlier / f"link{number}").symlink_to("/not/there")
    shutil.copytree(earlier, earlier.with_name(WORK) / "old", symlinks=True)
    (earlier / "link1").unlink()
    for _ in range(2):
        merge_folder(folder, adapter_for(llama()), earlier, overwrite=True, verify=False)
        assert [os.readlink(earlier / f"link{number}") for number in range(2)] == ["/not/there"] * 2
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["base", "out"]


def made_meanwhile(monkeypatch, make) -> None:
    """Something happens while the weights are merged."""
    merge_files = merge_stream.merge_files

    def slow(*args):
        report = merge_files(*args)
        make()
        return report

    monkeypatch.setattr(export, "merge_files", slow)


@pytest.mark.parametrize("there", [False, True])
def test_folder_filled_during_a_merge_is_not_replaced(folder, tmp_path, monkeypatch, there):
    out, adapter = tmp_path / "out", adapter_for(llama())
    if there:
        out.mkdir()

    def fill():
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("mine")

    made_meanwhile(monkeypatch, fill)
    with pytest.raises(OutputError, match="is not empty"):
        merge_folder(folder, adapter, out, verify=False)
    shutil.rmtree(out)
    if there:
        out.mkdir()
    with pytest.raises(OutputError, match=r"config\.json is in a folder whose config\.json does not"):
        merge_folder(folder, adapter, out, verify=False, overwrite=True)
    assert everything(out) == {"config.json": b"mine"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_merges_into_one_folder_the_second_to_end_is_refused(folder, tmp_path, monkeypatch, overwrite):
    out, adapter = tmp_path / "out", adapter_for(llama())
    smaller = Adapter({site: 0.5 * update for site, update in adapter.items()})
    merge_folder(folder, smaller, tmp_path / "new", verify=False)
    if overwrite:
        merge_folder(folder, adapter, out, verify=False)

    def other_ends():
        shutil.copytree(tmp_path / "new", tmp_path / "other")
        if overwrite:
            out.rename(tmp_path / "before")
        (tmp_path / "other").rename(out)

    made_meanwhile(monkeypatch, other_ends)
    with pytest.raises(OutputError, match="has replaced it" if overwrite else "is not empty"):
        merge_folder(folder, adapter, out, overwrite=overwrite, verify=False)
    assert everything(out) == everything(tmp_path / "new")


def test_a_users_file_where_the_model_has_a_folder_is_refused_by_name(folder, earlier):
    (earlier / "file").write_text("mine")
    (earlier / "folder").mkdir()
    (earlier / "folder" / "file").write_text("mine")
    before = everything(earlier)
    for name, kinds in (("file", "a file, and a folder"), ("folder", "a folder, and a file")):
        ours = folder / name
        if name == "file":
            ours.mkdir()
            (ours / "inner").write_text("of the base")
        else:
            ours.write_text("of the base")
        with pytest.raises(OutputError, match=rf"out/{name} is {kinds} of that name would replace it"):
            merge_folder(folder, adapter_for(llama()), earlier, overwrite=True, verify=False)
        assert everything(earlier) == before
        shutil.rmtree(ours) if ours.is_dir() else ours.unlink()


@pytest.mark.parametrize("call", ["before", "after"])
@pytest.mark.parametrize("step", ["exchange", "first rename", "second rename"])
def test_interrupt_at_an_exchange_or_a_rename_leaves_a_complete_folder(
    folder, earlier, monkeypatch, call, step
):
    smaller = Adapter({site: 0.5 * update for site, update in adapter_for(llama()).items()})
    merge_folder(folder, smaller, earlier.parent / "new", verify=False)
    before, after = everything(earlier), everything(earlier.parent / "new") | {"notes.txt": b"mine"}
    steps = iter(["exchange"] if step == "exchange" else ["first rename", "second rename"])

    def interrupted(action):
        def run(source, target):
            now = next(steps, None)
            if (now, call) == (step, "before"):
                raise KeyboardInterrupt
            done = action(source, target)
            if now == step:
                raise KeyboardInterrupt
            return done

        return run

    if step == "exchange":
        monkeypatch.setattr(replace, "exchange", interrupted(replace.exchange))
    else:
        monkeypatch.setattr(replace, "exchange", lambda *_: False)
        monkeypatch.setattr(os, "rename", interrupted(os.rename))
    with pytest.raises(KeyboardInterrupt):
        merge_folder(folder, smaller, earlier, overwrite=True, verify=False)
    assert everything(earlier) == (before if call == "before" or step == "first rename" else after)
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["base", "new", "out"]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "LICENSE"]
)
def test_overwriting_a_folder_without_model_is_refused(folder, tmp_path, name):
    (folder / "LICENSE").write_text("free")
    out, adapter = tmp_path / "out", adapter_for(llama())
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for mine in ("mine", '{"my app": 1}', "[" * 100_000):  # JSON too may be anybody's
        (out / name).write_text(mine)
        with pytest.raises(
            OutputError, match=rf"out/{name} is in a folder whose config\.json does not say .* overwritten"
        ):
            merge_folder(folder, adapter, out, overwrite=True, verify=False)
        assert everything(out) == {"notes.txt": b"mine", name: mine.encode()}
    (out / name).unlink()
    merge_folder(folder, adapter, out, overwrite=True, verify=False)
    assert (out / "notes.txt").read_text() == "mine"


def test_merged_model_contains_the_adapters_chat_template(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "eos_token": "<e>"}))
    adapter = adapter_for(llama())
    same = adapter.with_card(dataclasses.replace(adapter.card, chat_template="old"))
    other = adapter.with_card(dataclasses.replace(adapter.card, chat_template="new"))
    assert not merge_folder(folder, same, tmp_path / "same").chat_template_saved
    assert not (tmp_path / "same" / "chat_template.jinja").exists()
    assert merge_folder(folder, other, tmp_path / "other").chat_template_saved
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == "new"
    assert json.loads((tmp_path / "other" / "tokenizer_config.json").read_text()) == {"eos_token": "<e>"}


def test_invalid_config_error_has_advice_for_the_command_line(folder, tmp_path):
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseLoadError, match=r"cannot build the model.*; fetch it again.*\(in Python: "):
        merge_folder(folder, adapter_for(llama()), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "index"])
def test_damaged_side_file_is_reported_as_a_problem_of_the_base(folder, tmp_path, name, content):
    (folder / "tokenizer_config.json").write_text("{}")
    name = "model.safetensors.index.json" if name == "index" else name
    (folder / name).write_bytes(content)
    adapter = adapter_for(llama())
    adapter = adapter.with_card(dataclasses.replace(adapter.card, chat_template="new"))
    if name == "chat_template.jinja" and content != b"\xff":  # any text may be a template
        assert merge_folder(folder, adapter, tmp_path / "out", verify=False).chat_template_saved
        return
    with pytest.raises(BaseLoadError, match=r"(damaged|the weights in) .*again"):
        merge_folder(folder, adapter, tmp_path / "out", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("form", ["list", "list and file", "files"])
def test_other_templates_of_the_base_stay_except_the_tool_template(folder, tmp_path, form):
    both = {
        "default": "old {{ messages }}",
        "rag": "texts {{ messages }}",
        "tool_use": "tools {{ messages }}",
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}
    if "list" in form:
        settings["chat_template"] = [{"name": n, "template": t} for n, t in both.items()]
    if "file" in form:
        (folder / "chat_template.jinja").write_text(both["default"])
    if form == "files":
        (folder / "additional_chat_templates").mkdir()
        for name in ("rag", "tool_use"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(both[name])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    words = {"type": "WordLevel", "vocab": {"<e>": 0}, "unk_token": "<e>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    adapter = adapter_for(llama())
    same, other = (
        adapter.with_card(dataclasses.replace(adapter.card, chat_template=text))
        for text in (both["default"], "new {{ messages }}")
    )
    assert not merge_folder(folder, same, tmp_path / "same", verify=False).chat_template_saved
    assert merge_folder(folder, other, tmp_path / "other", verify=False).chat_template_saved
    found = AutoTokenizer.from_pretrained(tmp_path / "other").chat_template
    assert found == {"default": "new {{ messages }}", "rag": both["rag"]}


def test_a_base_that_lacks_a_weight_is_refused_without_loading_it(folder, tmp_path):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop("model.norm.weight")
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseLoadError, match=r"1 weights are missing .*model\.norm\.weight"):
        merge_folder(folder, adapter_for(llama()), tmp_path / "out", verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_base_errors_are_not_reported_as_output_errors(folder, tmp_path, monkeypatch):
    def unreadable(*args, **kwargs):
        raise BaseLoadError("cannot load the model")

    monkeypatch.setattr(merge_check, "load_base", unreadable)
    with pytest.raises(BaseLoadError, match=r"^cannot load the model$"):
        merge_folder(folder, adapter_for(llama()), tmp_path / "out", verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_a_folder_that_is_loaded_keeps_its_other_files(tmp_path, form):
    model = llama()
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": "20KB"} if form == "shards" else {}))
    base = tmp_path / "base"
    if form == "bin":
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    (base / "code").mkdir()
    others = {
        "LICENSE": "free",
        "README.md": "a model",
        "code/modeling.py": "#",
        "preprocessor_config.json": "{}",
    }
    for name, text in others.items():
        (base / name).write_text(text)
    (base / "tf_model.h5").write_bytes(b"unmerged")
    (base / ".env").write_text("hidden")
    dtype = "auto" if form == "bin" else "bfloat16"
    report = merge_folder(base, adapter_for(model), tmp_path / "out", dtype=dtype)
    assert not report.streamed
    assert report.left_out == (".env", "tf_model.h5")
    weights = {"model.safetensors"}
    out = everything(tmp_path / "out")
    assert set(out) == {*others, *weights, "config.json", "generation_config.json"}
    assert {name: out[name].decode() for name in others} == others
    stored = json.loads(out["config.json"])["dtype"]
    assert stored == ("float32" if form == "bin" else "bfloat16")


def test_no_space_for_a_model_that_is_loaded(folder, tmp_path):
    adapter = adapter_for(llama())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(OutputError, match=r"cannot write .*out: .*; raise the limit for the size"):
            merge_folder(folder, adapter, tmp_path / "out", dtype="bfloat16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_loaded_base_is_merged_in_memory(folder, tmp_path):
    base, adapter = load_base(folder, dtype="float32", device="cpu"), adapter_for(llama())
    report = merge_folder(base, adapter, tmp_path / "out", verify=True)
    assert not report.streamed
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert drift(logits(merged), adapted_logits(folder, adapter)) < EXACT
    with pytest.raises(MergeError, match="save_pretrained"):
        merge_folder(Base(torch.nn.Linear(2, 2)), adapter, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folder_without_safetensors_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_readable", lambda *_: None)
    adapter = adapter_for(llama().to(torch.bfloat16))
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    report = merge_folder(tmp_path / "half", adapter, tmp_path / "out", verify=False)
    assert not report.streamed
    assert report.logit_drift_skipped == "not asked for"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


MEASURED = """
import sys
from brushstroke.merging import merge_folder
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_merge_folder import adapter_on_meta
report = merge_folder(sys.argv[2], adapter_on_meta(sys.argv[2]), sys.argv[3])
assert report.logit_drift_skipped
# Not getrusage: a child's maximum begins with what its parent held.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(report.seconds, int(status["VmHWM"].split()[0]) * 1024)
"""


def adapter_on_meta(folder: str) -> Adapter:
    """An adapter with a fingerprint for a folder, made without loading its weights."""
    weights, generator = FolderWeights(folder), torch.Generator().manual_seed(0)
    updates = {
        site.path: LowRank(
            torch.randn(site.d, 4, generator=generator), torch.randn(4, site.h, generator=generator), 0.01
        )
        for site in weights.sites()
        if site.path != "lm_head"
    }
    samples = {path: sample(weights[path]) for path in updates}
    fingerprint = Fingerprint({path: update.shape for path, update in updates.items()}, samples)
    return Adapter(updates, Card(fingerprint=fingerprint))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from /proc")
def test_merging_eight_shards_needs_no_more_than_two_of_them(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=12,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {
        name: torch.randn(p.shape).mul_(0.02).to(torch.bfloat16) for name, p in model.named_parameters()
    }
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(8)]
    sizes = [0] * 8
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        smallest = sizes.index(min(sizes))
        shards[smallest][name] = tensor
        sizes[smallest] += tensor.nbytes
    folder, weight_map = tmp_path / "base", {}
    folder.mkdir()
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-00008.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(Path(__file__).parent), str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, peak = map(float, done.stdout.split())
    print(f"eight shards of {max(sizes) / 2**20:.0f} MiB: {seconds:.1f} s, peak {peak / 2**20:.0f} MiB")
    assert peak <= 2 * max(sizes) + MEMORY_ALLOWANCE


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_requested_dtype_is_written_to_the_config(folder, tmp_path, keys):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "bfloat16")))
    adapter = adapter_for(llama())
    report = merge_folder(folder, adapter, tmp_path / "asked", dtype="float32", verify=False)
    assert report.streamed
    written = json.loads((tmp_path / "asked" / "config.json").read_text())
    assert written == config | dict.fromkeys(keys or ("dtype",), "float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "asked").dtype == torch.float32
    merge_folder(folder, adapter, tmp_path / "auto", verify=False)
    assert (tmp_path / "auto" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
