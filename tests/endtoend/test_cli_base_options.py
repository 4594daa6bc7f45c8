"""Options of the base in every command: custom code, and the maximum length of a row."""

import io
import json
from pathlib import Path

import inference_kit
import pytest
from cli_kit import PLAIN, rows, write_base, write_rows

from brushstroke.formats import save

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
TRUST = "--trust-remote-code"


@pytest.fixture(autouse=True)
def _code_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the code that it runs, which is else in the user's home."""
    folder = str(tmp_path_factory.mktemp("code"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, as a class of a folder's own code."""
    folder = write_base(tmp_path_factory.mktemp("own") / "base")
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": OWN}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "modeling_own.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    save(inference_kit.adapter(inference_kit.llama()).with_card(None), folder)
    return folder


def commands(base: Path, data: Path, adapter: Path, out: Path) -> dict[str, list[object]]:
    fast = ["--targets", "q_proj", "--rank", "2", "--max-steps", "1", *PLAIN]
    return {
        "train": ["train", base, data, "--out", out / "run", *fast],
        "plan": ["plan", base, data, *fast],
        "generate": ["generate", base, "a", "--max-new-tokens", "2", *PLAIN],
        "chat": ["chat", base, *PLAIN],
        "evaluate": ["evaluate", base, data, "--no-generate", *PLAIN],
        "merge": ["merge", base, adapter, "--out", out / "merged", "--verify", "--json"],
        "merge, loaded": ["merge", base, adapter, "--out", out / "half", "--dtype", "bfloat16"],
        "spectrum": ["spectrum", adapter, "--base", base],
        "relate": ["relate", adapter, base],
        "intruders": ["intruders", adapter, base],
    }


@pytest.mark.parametrize("command", commands(Path(), Path(), Path(), Path()))
def test_custom_code_runs_only_with_trust_remote_code(cli, own, adapter, tmp_path, monkeypatch, command):
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    data = write_rows(tmp_path / "rows.jsonl", rows(4))
    words = commands(own, data, adapter, tmp_path)[command]
    done = cli(*words)
    assert done.status == 1
    assert f"{own} has its own code for its config" in done.error
    assert TRUST in done.error
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}
    done = cli(*words, TRUST)
    assert done.status == 0, done.err
    if command == "merge":
        assert json.loads(done.out)["logit_drift"] < 1e-5
        assert (tmp_path / "merged" / "modeling_own.py").read_text() == CODE


def test_study_needs_trust_remote_code_for_custom_code(cli, own, tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("vl_convert")
    data = write_rows(tmp_path / "rows.jsonl", rows(24))
    words = ["study", "rank", own, data, "--out", tmp_path / "out", "--ranks", "1,2", "--no-whole"]
    words += ["--targets", "q_proj", "--seeds", "1", "--learning-rates", "0.001,0.01", "--max-steps", "1"]
    done = cli(*words)
    assert done.status == 1
    assert TRUST in done.error
    done = cli(*words, TRUST)
    assert done.status == 0, done.err


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_limit_beyond_the_context_is_refused(cli, tiny, train_rows, tmp_path, command):
    out = ["--out", tmp_path / "out"] if command == "train" else []
    done = cli(command, tiny, train_rows, *out, "--max-length", "257", *PLAIN)
    assert done.status == 2
    assert "(--max-length) is 257, and the model's context has 256 tokens; lower it to 256" in done.error
    assert not (tmp_path / "out").exists()
    assert cli("plan", tiny, train_rows, "--max-length", "256", "--rank", "2", *PLAIN).status == 0


def test_a_base_in_4_bits_in_train_evaluate_generate_and_merge(cli, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden_size=64)
    data = write_rows(tmp_path / "rows.jsonl", rows(6))
    flags = (*PLAIN, "--quantize", "nf4")
    trained = cli("train", base, data, "--out", tmp_path / "run", "--max-steps", "8", *flags)
    assert trained.status == 0, trained.err
    one = json.loads(
        cli("evaluate", base, data, "--adapter", tmp_path / "run", "--no-generate", "--json", *flags).out
    )
    other = cli("evaluate", base, data, "--adapter", tmp_path / "run", "--no-generate", "--json", *PLAIN)
    assert "a quantised form of the one" in other.err
    assert json.loads(other.out)["loss"] != one["loss"]
    assert cli("generate", base, "a", "--max-new-tokens", "2", *flags).status == 0
    assert cli("plan", base, data, *flags).status == 0
    wrong = cli("train", base, data, "--out", tmp_path / "x", *PLAIN, "--quantize", "nf5")
    assert "nf4" in wrong.error
