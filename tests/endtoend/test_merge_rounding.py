"""`merge --rounding` on a base in bf16: what survives of small adapters, and the same bytes for a seed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference_kit
import pytest
import torch
from cli_kit import ENVIRONMENT, PLAIN, Done
from safetensors.torch import load_file

import brushstroke as bs
from brushstroke.adapter import Adapter

Cli = Callable[..., Done]
SHARDS = (1, 2, 8)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The tiny base in bf16, in one file or several."""
    folder, model = tmp_path_factory.mktemp("bases"), inference_kit.llama().to(torch.bfloat16)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    for count in SHARDS:
        model.save_pretrained(folder / str(count), max_shard_size=2 * size // (3 * count - 2))
        inference_kit.tokenizer().save_pretrained(folder / str(count))
    return {count: folder / str(count) for count in SHARDS}


@pytest.fixture(scope="module")
def trained(tiny: Path, train_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter after a few steps at a small rate."""
    from brushstroke.cli import main

    out = tmp_path_factory.mktemp("runs") / "early"
    words = ("train", tiny, train_rows, "--out", out, "--max-steps", "5", "--learning-rate", "2e-4", *PLAIN)
    assert main([str(word) for word in words]) == 0
    return out


def scaled(adapter: Path, factor: float, folder: Path) -> Path:
    value = bs.load(adapter)
    bs.save(Adapter({site: factor * update for site, update in value.items()}, value.card), folder)
    return folder


def merged(cli: Cli, base: Path, adapter: Path, out: Path, *flags: object) -> dict[str, Any]:
    done = cli("merge", base, adapter, "--out", out, "--json", *flags)
    assert done.status == 0, done.err
    return json.loads(done.out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_early_adapter_survives_by_default_and_is_refused_with_nearest(
    cli, bases, trained, train_rows, tmp_path
):
    report = merged(cli, bases[1], trained, tmp_path / "auto", "--rows", train_rows)
    assert (report["rounding"], report["rounding_seed"]) == ("auto", 0)
    assert report["stochastic_sites"] == report["sites"] == 14
    assert report["effect"] == pytest.approx(1.0, abs=0.1)
    losses = report["rows"]
    assert losses["rows"] == 12
    assert losses["adapted"] < losses["base"]
    assert losses["kept"] == (losses["base"] - losses["merged"]) / (losses["base"] - losses["adapted"])
    assert losses["kept"] == pytest.approx(1.0, abs=0.1)
    nearest = merged(cli, bases[1], trained, tmp_path / "nearest", "--rounding", "nearest")
    assert nearest["stochastic_sites"] == 0
    assert nearest["survived"] < report["survived"]
    faint = scaled(trained, 0.02, tmp_path / "faint")
    assert merged(cli, bases[1], faint, tmp_path / "faint-auto")["stochastic_sites"] == 14
    refused = cli("merge", bases[1], faint, "--out", tmp_path / "refused", "--rounding", "nearest")
    assert refused.status == 1
    assert "survives the rounding" in refused.error
    assert "--rounding" in refused.error
    assert not (tmp_path / "refused").exists()


def test_losses_are_those_of_evaluate(cli, bases, trained, train_rows, tmp_path):
    out = tmp_path / "out"
    losses = merged(cli, bases[1], trained, out, "--rows", train_rows)["rows"]
    words = (train_rows, *PLAIN, "--json", "--no-generate")
    models = {"base": (bases[1],), "adapted": (bases[1], "--adapter", trained), "merged": (out,)}
    for name, (model, *flags) in models.items():
        found = json.loads(cli("evaluate", model, *words, *flags).out)["loss"]
        assert losses[name] == pytest.approx(found, rel=1e-5)


def test_the_report_for_people_tells_what_survived(cli, bases, trained, train_rows, tmp_path):
    out = tmp_path / "out"
    said = cli("merge", bases[1], trained, "--out", out, "--rows", train_rows, "--rounding-seed", "7").out
    assert "stochastic at 14 of 14 sites, seed 7" in said
    assert "of the adapter's change of the outputs" in said
    assert "adapted," in said
    assert "of the gain (12 rows)" in said
    unverified = cli("merge", bases[1], trained, "--out", out, "--overwrite", "--no-verify").out
    assert "not measured on outputs; what survived is of ΔW only" in unverified
    assert "not asked for" in unverified


def test_full_size_adapters_are_merged_as_with_nearest(cli, bases, trained, tmp_path):
    large = scaled(trained, 3000.0, tmp_path / "large")
    report = merged(cli, bases[1], large, tmp_path / "auto")
    assert report["stochastic_sites"] == 0
    merged(cli, bases[1], large, tmp_path / "nearest", "--rounding", "nearest")
    assert same(tensors(tmp_path / "auto"), tensors(tmp_path / "nearest"))


def test_a_seed_gives_the_same_bytes_for_any_shards_and_threads(cli, bases, trained, tmp_path):
    first: dict[str, torch.Tensor] = {}
    for count, base in bases.items():
        assert len(list(base.glob("*.safetensors"))) >= count
        for threads in (1, 2):
            out = tmp_path / f"{count}-{threads}"
            command = [sys.executable, "-m", "brushstroke", "merge", base, trained, "--out", out]
            environment = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
            command += ["--rounding-seed", "3", "--no-verify"]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            first = first or tensors(out)
            assert same(tensors(out), first)
            assert (out / next(base.glob("*.safetensors")).name).is_file()
    model = bs.merge(bs.load_base(bases[1], dtype="bfloat16"), bs.load(trained), rounding_seed=3).model
    state = {name: x for name, x in model.state_dict().items() if name in first}
    assert same(state, first)  # and in memory
    merged(cli, bases[1], trained, tmp_path / "other", "--rounding-seed", "4")
    assert not same(tensors(tmp_path / "other"), first)


def test_a_stochastic_merge_is_not_merged_again(cli, bases, trained, tmp_path):
    merged(cli, bases[1], trained, tmp_path / "once")
    again = cli("merge", tmp_path / "once", trained, "--out", tmp_path / "twice")
    assert again.status == 1
    assert "already merged into the base" in again.error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rounding", "up"), "--rounding"),
        (("--rounding-seed", "-1"), "the seed of the rounding must be a whole number from 0"),
        (("--rounding-seed", "1.5"), "whole number"),
        (("--rows", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_invalid_flags_are_refused_before_anything_is_written(cli, bases, trained, tmp_path, flags, said):
    done = cli("merge", bases[1], trained, "--out", tmp_path / "out", *flags)
    assert done.status != 0
    assert said in done.error
    assert not (tmp_path / "out").exists()
