"""The complete demo with very short training: the files that it writes, and those that it reuses.

In `make sweep` on the real model; in `make test` on a small random one.
"""

import dataclasses
import functools
import importlib
import json
from pathlib import Path

import pytest
from cli_kit import write_base

import brushstroke as bs
from brushstroke import samples
from sampling import WHOLE

DEMO = Path(__file__).parents[2] / "examples" / "demo"
NAMES = ("addresses", "people", "companies")
# As of SmolLM2-135M, an adapter of rank 8 takes less than a twentieth of its bytes.
SMALL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "max_position_embeddings": 4096,
}
SITES = 210 if WHOLE else 14
SCORES = {"valid_json", "field_f1", "exact_match", "rows"}

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.sweep, pytest.mark.xdist_group("demo")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if not WHOLE:
            small = write_base(tmp_path_factory.mktemp("model") / "small", **SMALL)
            patch.setattr(samples, "model_path", lambda: small)
        patch.syspath_prepend(str(DEMO))
        patch.setattr(bs, "load_base", functools.cache(bs.load_base))
        yield importlib.import_module("demo")


@pytest.fixture(scope="module")
def form(demo):
    return dataclasses.replace(
        demo.settings.QUICK,
        name="tiny",
        rows=dict.fromkeys(NAMES, 4),
        batch_size=2,
        held_out=2,
        base_rows=1,
        compared=2,
        timed=3,
    )


@pytest.fixture(scope="module")
def finished(demo, form, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo-out"
    return out, demo.run(form, out)


def test_results_have_exactly_the_named_keys(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text("utf-8")) == results
    assert set(results) == {"base", "adapters", "merged", "switch_ms", "base_bytes"}
    assert set(results["base"]) == SCORES
    assert tuple(results["adapters"]) == NAMES
    for name, found in results["adapters"].items():
        assert set(found) == SCORES | {"real_tokens", "seconds", "adapter_bytes", "peak_memory_bytes"}
        file = out / "adapters" / name / "adapter_model.safetensors"
        assert found["adapter_bytes"] == file.stat().st_size < results["base_bytes"] / 20
    assert set(results["merged"]) == {"same_tokens", "latency_ratio"}
    assert results["merged"]["same_tokens"] is True
    assert 0 < results["switch_ms"] < 1


def test_demo_writes_its_files(finished, form):
    out, _ = finished
    assert {entry.name for entry in out.iterdir()} == {"adapters", "heldout", "report.html", "results.json"}
    for name in NAMES:
        rows = [
            json.loads(line) for line in (out / "heldout" / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        assert len(rows) == form.held_out
        assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
        assert len(bs.load(out / "adapters" / name)) == SITES


def test_the_page_is_self_contained(finished):
    out, _ = finished
    document = (out / "report.html").read_text("utf-8")
    assert "http" not in document
    assert document.count("<svg") == 2
    for word in ("Before and after", "untouched base", "Switching", "Merging", "addresses", "companies"):
        assert word in document


def test_a_second_run_reuses_the_adapters_and_other_settings_do_not(
    demo, finished, form, capsys, monkeypatch
):
    out, before = finished
    monkeypatch.setattr(demo.settings, "NAMES", ("addresses",))
    record = out / "adapters" / "addresses" / "run.json"
    written = record.stat().st_mtime_ns
    results = demo.run(form, out)
    assert "Reused" in capsys.readouterr().out
    assert record.stat().st_mtime_ns == written
    assert results["adapters"]["addresses"]["seconds"] == before["adapters"]["addresses"]["seconds"]
    demo.run(dataclasses.replace(form, learning_rate=1e-3), out)
    assert "Reused" not in capsys.readouterr().out
    assert record.stat().st_mtime_ns != written
