"""Tokens without an embedding are reported with both sizes before anything runs."""

import json
import re
import warnings
from pathlib import Path

import inference_kit
import pytest
import torch

import brushstroke as bs
from brushstroke.base import VocabularyWarning, embedding_rows, refuse_unknown_tokens
from brushstroke.cli import main
from brushstroke.errors import DataError

PLAIN = ["--device", "cpu", "--dtype", "float32"]
ROWS = 250  # of the embedding; the tokenizer has 259 tokens, its special ones last


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A base whose embedding has too few rows for the special tokens."""
    folder = tmp_path / "base"
    inference_kit.llama(vocab_size=ROWS).save_pretrained(folder)
    inference_kit.tokenizer().save_pretrained(folder)
    return folder


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_vocabulary_warning_names_both_sizes(small: Path) -> None:
    with pytest.warns(VocabularyWarning, match=r"has 259 tokens, and the model's embedding 250 rows"):
        bs.load_base(small, dtype="float32", device="cpu")


@pytest.mark.parametrize("rows", [259, 264, 512])
def test_larger_embedding_gives_no_warning(tmp_path: Path, rows: int) -> None:
    inference_kit.llama(vocab_size=rows).save_pretrained(tmp_path)
    inference_kit.tokenizer().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bs.load_base(tmp_path, dtype="float32", device="cpu")


def test_padding_token_without_embedding_is_not_used(tmp_path: Path) -> None:
    tokenizer = inference_kit.tokenizer()
    inference_kit.llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(VocabularyWarning, match=r"texts with '<\|pad\|>' are refused"):
        base = bs.load_base(tmp_path, dtype="float32", device="cpu")
    assert base.tokenizer.pad_token == "<|im_end|>"
    answers = bs.generate(base, ["a", "a longer prompt"], max_new_tokens=2)
    assert len(answers) == 2


@pytest.mark.parametrize("command", ["train", "plan"])
def test_training_on_such_tokens_is_refused_with_both_numbers(small, tmp_path, capsys, command) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    out = ["--out", str(tmp_path / "out")] if command == "train" else []
    assert main([command, str(small), str(data), *out, *PLAIN]) == 1
    reported = capsys.readouterr().err
    assert "warning: the tokenizer of" in reported
    assert re.search(r"error: row 1 has the token 25\d, and the model's embedding has 250 rows", reported)


def test_texts_without_such_tokens_run(small, tmp_path, capsys) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 4
    data = write(tmp_path / "rows.jsonl", rows)
    words = ["train", str(small), str(data), "--out", str(tmp_path / "out"), *PLAIN, "--max-steps", "1"]
    assert main(words) == 0
    assert "warning: the tokenizer of" in capsys.readouterr().err


def test_vocabulary_check_accepts_any_tokens_and_model() -> None:
    model = inference_kit.llama()
    assert embedding_rows(model) == 264
    refuse_unknown_tokens(model, range(264), "prompt 2")
    for token in (264, -1):
        with pytest.raises(DataError, match=rf"prompt 2 has the token {token}, .* 264 rows \("):
            refuse_unknown_tokens(model, [3, token], "prompt 2")
    assert embedding_rows(torch.nn.Linear(2, 2)) is None
    refuse_unknown_tokens(torch.nn.Linear(2, 2), [10**9], "prompt 2")
