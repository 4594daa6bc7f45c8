"""`track=` of `train`: TensorBoard's files, read back by TensorBoard itself."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import brushstroke as bs
from brushstroke.errors import ConfigError
from brushstroke.training.tracking import TrackingWarning
from toys import tiny_llama
from training_kit import examples

CONFIG = bs.TrainConfig(max_steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2, eval_every=3)


class Stop(Exception):
    """Stands for a crash."""


def run(out: Path | None, config: bs.TrainConfig = CONFIG, **options: Any) -> bs.TrainResult:
    base = bs.Base(tiny_llama(), None, "tiny")
    return bs.train(
        base, examples(10), bs.LoraConfig(rank=4), config, out=out, eval_data=examples(4, seed=7), **options
    )


def logged(out: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each curve, as TensorBoard shows them."""
    found = EventAccumulator(str(out / "logs" / "brushstroke")).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def written(path: Path, name: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_tensorboard_shows_what_the_run_wrote(tmp_path: Path) -> None:
    run(tmp_path, track="tensorboard")
    curves = logged(tmp_path)
    assert curves["train/loss"] == written(tmp_path / "metrics.jsonl", "loss")
    assert curves["train/learning_rate"] == written(tmp_path / "metrics.jsonl", "learning_rate")
    assert curves["eval/loss"] == written(tmp_path / "eval.jsonl", "loss")
    assert [step for step, _ in curves["eval/loss"]] == [0, 3, 6]
    assert curves.keys() == {
        *("train/loss", "train/learning_rate", "train/real_tokens_per_second", "train/peak_memory_gib"),
        "eval/loss",
    }
    (stored,) = (tmp_path / "logs").rglob("hparams.yml")
    assert "lora.rank: 4" in stored.read_text()


def test_a_resumed_or_repeated_run_shows_each_step_once(tmp_path: Path) -> None:
    def crash(event: Any) -> None:
        if event.step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, track="tensorboard", on_step=crash)
    assert len(logged(tmp_path)["train/loss"]) == 5
    run(tmp_path, track="tensorboard", resume=True)  # from step 4
    assert logged(tmp_path)["train/loss"] == written(tmp_path / "metrics.jsonl", "loss")
    longer = dataclasses.replace(CONFIG, max_steps=8)
    run(tmp_path, longer, track="tensorboard", resume=True)
    assert logged(tmp_path)["train/loss"] == written(tmp_path / "metrics.jsonl", "loss")
    run(tmp_path, dataclasses.replace(CONFIG, seed=1, max_steps=2), track="tensorboard", overwrite=True)
    curves = logged(tmp_path)
    assert curves["train/loss"] == written(tmp_path / "metrics.jsonl", "loss")
    assert [step for step, _ in curves["eval/loss"]] == [0, 2]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))  # leftovers


def test_tracking_changes_nothing_and_is_off_by_default(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", track="tensorboard")
    assert not (tmp_path / "a" / "logs").exists()
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_wrong_trackers_are_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no tracker 'tensorbored'; choose one of aim, "):
        run(tmp_path / "x", track="tensorbored")
    with pytest.raises(ConfigError, match="needs a folder; give out"):
        run(None, track="tensorboard")
    with pytest.raises(
        ConfigError, match=r"'dvclive' is not installed; .*pip install dvclive.*: tensorboard"
    ):
        run(tmp_path / "x", track="dvclive")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(accelerate_tracking.TensorBoardTracker, method, fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(tmp_path, track="tensorboard").summary["steps"] == 6
    told = [str(w.message) for w in caught if w.category is TrackingWarning]
    assert told == ["the tracker failed, so the run goes on without it: OSError: no connection"]
