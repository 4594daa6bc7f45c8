"""Train, save, load, generate and merge on a GPU, through the Python API; skipped without one."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import brushstroke as bs
from brushstroke.inference import Request, SamplingParams, run_requests
from toys import random_adapter, tiny_llama
from training_kit import examples

DEVICE = "cuda"
MERGED = {"float32": 1e-5, "bfloat16": 5e-2}  # of the logits' norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as a folder, with a tokenizer of numbered words."""
    path = tmp_path / "base"
    tiny_llama().save_pretrained(path)
    names = ["<pad>", "<end>", *(f"w{i}" for i in range(2, 64))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_training_to_a_merged_folder(folder: Path, tmp_path: Path, dtype: str) -> None:
    base = bs.load_base(folder, dtype=dtype, device=DEVICE)
    rows = [{"input_ids": list(e.tokens), "labels": list(e.tokens)} for e in examples(16)]
    config = bs.TrainConfig(max_steps=30, learning_rate=2e-2, batch_size=8)
    result = bs.train(base, rows, bs.LoraConfig(rank=8), config, out=tmp_path / "run")
    assert result.summary["final_loss"] < 0.8 * result.summary["mean_loss"]
    assert 0 < result.summary["peak_memory_bytes"] < 2**30

    adapter = bs.load(tmp_path / "run")
    assert all(torch.equal(a.U.cpu(), result.adapter[path].U.cpu()) for path, a in adapter.items())
    tokens = torch.tensor([rows[0]["input_ids"][:9]], device=DEVICE)
    bs.merge_folder(folder, adapter, tmp_path / "merged")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=base.model.dtype).to(DEVICE)
    with torch.no_grad():
        attachment = bs.attach(base, adapter)
        adapted = base.model(tokens).logits
        attachment.detach()
        for merged in (bs.merge(base, adapter).model, folded):
            assert (adapted - merged(tokens).logits).norm() <= MERGED[dtype] * adapted.norm()


def test_a_mixed_batch_answers_as_each_prompt_alone(folder: Path) -> None:
    base = bs.load_base(folder, dtype="float32", device=DEVICE)
    adapters = {name: random_adapter(base.model, seed=i) for i, name in enumerate("ab")}
    begin = tuple(2 + i % 60 for i in range(80))  # long enough to be computed once
    requests = [
        Request(
            begin + (5 + i,) * (1 + i % 3),
            ("a", "b", None)[i % 3],
            stop_token_ids=(7, 20),
            sampling=SamplingParams(max_new_tokens=12),
        )
        for i in range(9)
    ]
    with bs.bank(base, adapters) as bank:
        together = run_requests(base, requests, bank=bank)
        alone = [run_requests(base, [request], bank=bank)[0] for request in requests]
    assert [output.tokens for output in together] == [output.tokens for output in alone]
