"""`train` and `plan` through Python: files, resuming, evaluations, refusals."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import inference_kit
import pytest
import torch
from safetensors.torch import load_file, save_file

import brushstroke as bs
from brushstroke.errors import ConfigError, DataError, NonFiniteError, OutputError, ResumeError
from brushstroke.formats.peft import UnfinishedRunWarning
from brushstroke.outputs import lock, open_folder
from brushstroke.training import PlanWarning, loop
from brushstroke.training.checkpoint import sealed
from toys import random_adapter, tiny_gpt2, tiny_llama
from training_kit import examples

CONFIG = bs.TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2, checkpoint_every=2)
LORA = bs.LoraConfig(rank=4)


def base() -> bs.Base:
    return bs.Base(tiny_llama(), None, "tiny")


class Stop(Exception):
    """Stands for a crash."""


def test_a_run_writes_its_files_and_totals(tmp_path: Path) -> None:
    data = examples(10)
    result = bs.train(base(), data, LORA, CONFIG, out=tmp_path / "run", eval_data=examples(4, seed=1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert summary["steps"] == 6
    for name in ("real_tokens", "trained_tokens", "computed_tokens"):
        assert summary[name] == sum(line[name] for line in lines)
    assert summary["real_tokens"] == 2 * sum(len(example) for example in data)  # every example once an epoch
    assert summary["final_loss"] == lines[-1]["loss"]
    assert summary["mean_loss"] == pytest.approx(sum(line["loss"] for line in lines) / 6)
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-2 * (1 - i / 6) for i in range(6)])
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert summary["eval_loss_before"] == evaluations[0]["loss"]
    assert summary["eval_loss"] == evaluations[-1]["loss"]
    assert not evaluations[0]["best"]
    assert not summary["stopped_early"]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    loaded = bs.load(tmp_path / "run")
    assert all(torch.equal(loaded[site].U, result.adapter[site].U) for site in result.adapter)  # type: ignore[attr-defined]
    assert loaded.card is not None
    assert loaded.card.training["steps"] == 6


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_killed_run_resumes_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    data, held_out = examples(10), examples(4, seed=1)
    whole = bs.train(base(), data, LORA, CONFIG, out=tmp_path / "whole", eval_data=held_out)

    def crash(event: object) -> None:
        if event.step == stop_at:  # type: ignore[attr-defined]
            raise Stop

    with pytest.raises(Stop):
        bs.train(base(), data, LORA, CONFIG, out=tmp_path / "cut", eval_data=held_out, on_step=crash)
    before = (tmp_path / "cut" / "metrics.jsonl").read_bytes().splitlines()
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    again = bs.train(base(), data, LORA, CONFIG, out=tmp_path / "cut", eval_data=held_out, resume=True)
    assert again.resumed_from == (stop_at - 1) // 2 * 2  # the crash came before its step was kept
    after = (tmp_path / "cut" / "metrics.jsonl").read_bytes().splitlines()
    assert after[: again.resumed_from] == before[: again.resumed_from]
    assert len(after) == 6
    same = "adapter_model.safetensors"
    assert (tmp_path / "cut" / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()
    assert again.summary["real_tokens"] == whole.summary["real_tokens"]
    assert again.summary["mean_loss"] == whole.summary["mean_loss"]


def test_resuming_with_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    def crash(event: object) -> None:
        if event.step == 3:  # type: ignore[attr-defined]
            raise Stop

    with pytest.raises(Stop):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, on_step=crash)
    other = bs.TrainConfig(epochs=2, batch_size=4, learning_rate=2e-2, checkpoint_every=2)
    with pytest.raises(ResumeError, match=r"learning_rate: now 0.02, then 0.01"):
        bs.train(base(), examples(10), LORA, other, out=tmp_path, resume=True)
    with pytest.raises(ResumeError, match="another data"):
        bs.train(base(), examples(10, seed=5), LORA, CONFIG, out=tmp_path, resume=True)
    with pytest.raises(ResumeError, match="rank: now 2, then 4"):
        bs.train(base(), examples(10), bs.LoraConfig(rank=2), CONFIG, out=tmp_path, resume=True)
    with pytest.raises(ResumeError, match=r"\(dropout: now 0.5, then 0.0\)"):
        bs.train(base(), examples(10), bs.LoraConfig(rank=4, dropout=0.5), CONFIG, out=tmp_path, resume=True)
    other_base = base()
    other_base.model.get_submodule("model.embed_tokens").weight.data.mul_(1.1)  # type: ignore[operator, union-attr]
    with pytest.raises(ResumeError, match=r"\(the base model changed\)"):
        bs.train(other_base, examples(10), LORA, CONFIG, out=tmp_path, resume=True)
    half = bs.Base(tiny_llama(dtype=torch.bfloat16), None, "tiny")
    with pytest.raises(ResumeError, match=r"\(dtype: now 'bfloat16', then 'float32'\)"):
        bs.train(half, examples(10), LORA, CONFIG, out=tmp_path, resume=True)
    assert bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True).resumed_from == 2


def test_resuming_with_the_same_rows_in_other_tokens_is_refused(tmp_path: Path) -> None:
    def crash(event: object) -> None:
        if event.step == 3:  # type: ignore[attr-defined]
            raise Stop

    rows = [{"prompt": f"Split {n} Oak", "completion": f"{n}"} for n in range(10)]
    first, other = inference_kit.base(), inference_kit.base(template=inference_kit.OTHER_TEMPLATE)
    with pytest.raises(Stop):
        bs.train(first, rows, LORA, CONFIG, out=tmp_path, eval_data=rows[:2], on_step=crash)
    caught = r"\(the tokenised data changed; the tokenised evaluation data changed\)"
    with pytest.raises(ResumeError, match=caught):
        bs.train(other, rows, LORA, CONFIG, out=tmp_path, eval_data=rows[:2], resume=True)
    again = bs.train(first, rows, LORA, CONFIG, out=tmp_path, eval_data=rows[:2], resume=True)
    assert again.resumed_from == 2


def test_a_finished_run_of_an_earlier_version_is_named_as_one(tmp_path: Path) -> None:
    bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path)
    summary = json.loads((tmp_path / "run.json").read_text())
    del summary["settings"]["tokens"]
    (tmp_path / "run.json").write_text(json.dumps(summary))
    with pytest.raises(
        ResumeError,
        match=r"another version of brushstroke, which did not record the tokenised data.*; continue",
    ):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path)
    stamp = (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns
    again = bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert again.resumed_from == 6
    assert again.summary["final_loss"] == first.summary["final_loss"]


def test_a_folder_with_files_is_refused_and_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        bs.train(base(), examples(4), LORA, CONFIG, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    bs.train(base(), examples(4), LORA, CONFIG, out=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "my project"),
        ("metrics.jsonl", '{"step": 1, "accuracy": 0.5}\n'),
        ("run.json", '{"steps": 3}'),
        ("eval.jsonl", "[1, 2, 3]\n"),
        ("adapter_config.json", '{"adapter": "another kind"}'),
    ],
)
@pytest.mark.parametrize("beside", [(), ("checkpoints/step-100/model.pt", "checkpoints/best-model/w.pt")])
def test_files_of_another_program_are_never_replaced(
    tmp_path: Path, name: str, content: str, beside: tuple[str, ...]
) -> None:
    for path in (name, *beside):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    for flag in ("overwrite", "resume"):
        with pytest.raises(OutputError, match=rf"{name} was not written by brushstroke|--overwrite"):
            bs.train(base(), examples(4), LORA, CONFIG, out=tmp_path, **{flag: True})  # type: ignore[arg-type]
    assert {(tmp_path / path).read_text() for path in (name, *beside)} == {content}
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_files_that_appear_while_a_run_begins_stay(tmp_path: Path, flags: dict[str, bool]) -> None:
    out, mine = tmp_path / "out", {"README.md": "my notes", "metrics.jsonl": "my,own,csv\n"}

    def appear(*_: object) -> None:
        out.mkdir()
        for name, text in mine.items():
            (out / name).write_text(text)

    with pytest.raises(OutputError, match=r"--overwrite|was not written by brushstroke"):
        bs.train(base(), examples(4), LORA, CONFIG, out=out, on_plan=appear, **flags)  # type: ignore[arg-type]
    assert {path.name: path.read_text() for path in out.iterdir()} == mine


def test_second_run_in_a_locked_folder_is_refused(tmp_path: Path) -> None:
    whole = bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path / "whole")

    def second(event: object) -> None:
        step = event.step  # type: ignore[attr-defined]
        if step in (1, 3):
            with pytest.raises(OutputError, match="another run is writing"):
                bs.train(base(), examples(4), LORA, CONFIG, out=out, overwrite=step == 1, resume=step == 3)

    def during_plan(*_: object) -> None:
        bs.train(base(), examples(10), LORA, CONFIG, out=out, on_step=second)

    out = tmp_path / "out"
    with pytest.raises(
        OutputError, match="holds a finished run of 6 steps"
    ):  # it began before the other one wrote
        bs.train(base(), examples(4), LORA, CONFIG, out=out, on_plan=during_plan)
    same = "adapter_model.safetensors"
    assert (out / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert whole.summary["steps"] == 6


def test_user_folders_among_checkpoints_are_kept(tmp_path: Path) -> None:
    mine = [tmp_path / "checkpoints" / name / "w.pt" for name in ("step-100", "best-model", "step-00000002x")]
    for file in mine:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    data = {"eval_data": examples(4, seed=1)}
    bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True, **data)  # type: ignore[arg-type]
    bs.train(base(), examples(10, seed=2), LORA, CONFIG, out=tmp_path, overwrite=True, **data)  # type: ignore[arg-type]
    assert all(file.read_text() == "mine" for file in mine)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best-model", "step-00000002x", "step-00000004", "step-00000006", "step-100"]


def test_non_finite_base_and_too_high_rate_give_different_errors(tmp_path: Path) -> None:
    broken = base()
    broken.model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0, 0] = float("nan")  # type: ignore[union-attr]
    with (
        pytest.warns(PlanWarning, match="could not verify that packing is exact"),
        pytest.raises(NonFiniteError, match=r"step 1; .*the base's weights may be the cause"),
    ):
        bs.train(broken, examples(4), LORA, CONFIG, out=tmp_path / "run")


def test_plan_warnings_become_python_warnings_without_on_plan() -> None:
    made = base()
    made.model.get_submodule("model.layers.1.mlp").forward = lambda x: x
    with pytest.warns(PlanWarning, match=r"text does not run through model.layers.1.mlp.gate_proj") as caught:
        bs.train(made, examples(4), LORA, CONFIG)
    assert len(caught) == 1
    plans: list[bs.Plan] = []
    bs.train(made, examples(4), LORA, CONFIG, on_plan=lambda plan, _: plans.append(plan))
    assert "model.layers.1.mlp.gate_proj" in plans[0].warnings[0]


def test_the_best_adapter_is_kept_across_a_crash(tmp_path: Path) -> None:
    config = bs.TrainConfig(
        max_steps=12, batch_size=4, learning_rate=0.3, schedule="constant", eval_every=1, keep_best=True,
        checkpoint_every=3,
    )  # fmt: skip
    held_out = examples(6, seed=1)
    whole = bs.train(base(), examples(10), LORA, config, out=tmp_path / "whole", eval_data=held_out)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "eval.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["step"]]
    assert losses.index(min(losses)) < 11, "the run must get worse again, or this shows nothing"
    with bs.Training(tiny_llama(), whole.adapter) as run:
        assert run.loss(held_out).loss == pytest.approx(min(losses), rel=1e-6)

    def crash(event: object) -> None:
        if event.step == 11:  # type: ignore[attr-defined]
            raise Stop

    with pytest.raises(Stop):
        bs.train(base(), examples(10), LORA, config, out=tmp_path / "cut", eval_data=held_out, on_step=crash)
    bs.train(base(), examples(10), LORA, config, out=tmp_path / "cut", eval_data=held_out, resume=True)
    same = "adapter_model.safetensors"
    assert (tmp_path / "cut" / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()


def test_resume_skips_a_damaged_checkpoint_and_keeps_the_best_adapter(tmp_path: Path) -> None:
    config = bs.TrainConfig(
        max_steps=9, batch_size=4, learning_rate=1e-2, eval_every=1, keep_best=True, checkpoint_every=3
    )
    held_out, same = examples(6, seed=1), "adapter_model.safetensors"
    bs.train(base(), examples(10), LORA, config, out=tmp_path / "whole", eval_data=held_out)

    def crash(event: object) -> None:
        if event.step == 8:  # type: ignore[attr-defined]
            raise Stop

    cut = tmp_path / "cut"
    with pytest.raises(Stop):
        bs.train(base(), examples(10), LORA, config, out=cut, eval_data=held_out, on_step=crash)
    (cut / "checkpoints" / "step-00000006" / "state.json").write_text("{")
    with pytest.raises(ResumeError, match="remove it"):
        bs.train(base(), examples(10), LORA, config, out=cut, eval_data=held_out, resume=True)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    shutil.copytree(cut, tmp_path / "bare")
    for name in (same, "adapter_config.json"):
        file = cut / "checkpoints" / "best-00000003" / name
        whole = file.read_bytes()
        changed = whole[:-1] + bytes([whole[-1] ^ 1]) if name == same else whole.replace(b"16", b"17", 1)
        file.write_bytes(changed)
        with pytest.raises(
            ResumeError, match=r"the checksums of .*best-00000003 do not match; remove that checkpoint"
        ):
            bs.train(base(), examples(10), LORA, config, out=cut, eval_data=held_out, resume=True)
        file.write_bytes(whole)
    again = bs.train(base(), examples(10), LORA, config, out=cut, eval_data=held_out, resume=True)
    assert again.resumed_from == 3
    assert (cut / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()
    shutil.rmtree(tmp_path / "bare" / "checkpoints" / "best-00000003")
    with pytest.raises(ResumeError, match=r"step-00000003 needs the best adapter.*start over"):
        bs.train(base(), examples(10), LORA, config, out=tmp_path / "bare", eval_data=held_out, resume=True)


def test_repeated_evaluation_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = loop._evaluate

    def stop(session: bs.Training, *arguments: Any) -> Any:
        if session.steps:
            raise KeyboardInterrupt
        return evaluate(session, *arguments)

    def crash(event: object) -> None:
        if event.step == 5:  # type: ignore[attr-defined]
            raise Stop

    config = bs.TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2)
    data = {"out": tmp_path, "eval_data": examples(4, seed=1)}
    with monkeypatch.context() as patched:
        patched.setattr("brushstroke.training.loop._evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            bs.train(base(), examples(10), LORA, config, **data)  # type: ignore[arg-type]
    with pytest.raises(Stop):
        bs.train(base(), examples(10), LORA, config, resume=True, on_step=crash, **data)  # type: ignore[arg-type]
    assert bs.train(base(), examples(10), LORA, config, resume=True, **data).resumed_from == 3  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]


def test_a_second_interrupt_waits_for_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from brushstroke.training import folder

    save_session = folder.save_session

    def interrupted_again(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save_session(*arguments)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)

    def stop(event: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(folder, "save_session", interrupted_again)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"checkpoint saved at .*step-00000001"):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, on_step=stop)
    assert (tmp_path / "checkpoints" / "step-00000001" / "state.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_in_the_first_step_reports_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = bs.Training.optim_step

    def interrupted(session: bs.Training, *arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(session, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bs.Training, "optim_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"checkpoint saved at .*step-00000001"):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path)


def test_continuing_an_adapter_starts_at_its_loss(tmp_path: Path) -> None:
    first = bs.train(base(), examples(10), LORA, CONFIG)
    seen = []
    bs.train(
        base(), examples(10), None, CONFIG, start=first.adapter, on_step=lambda event: seen.append(event.loss)
    )
    with bs.Training(tiny_llama(), first.adapter) as run:
        assert run.adapter()["lm_head" if False else next(iter(first.adapter))].rank == 4  # type: ignore[attr-defined]
    assert seen[0] < 0.9 * first.summary["mean_loss"] or seen[0] < first.summary["final_loss"] * 1.5


def test_plan_predicts_the_run() -> None:
    model = base()
    plan = bs.plan(model, examples(10), LORA, CONFIG)
    result = bs.train(model, examples(10), LORA, CONFIG)
    assert plan.steps == result.summary["steps"]
    assert 2 * plan.real_tokens == result.summary["real_tokens"]
    assert plan.shared_tokens > 0
    assert plan.parameters == result.adapter.parameters
    assert plan.matches == {"all-linear": 14}
    assert plan.layout == "packed"
    assert json.loads(json.dumps(plan.as_dict()))["micro_tokens"] == plan.micro_tokens


def test_the_memory_of_a_plan_is_that_of_its_largest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peak_memory", "resident_memory"):  # this process has been larger before
        monkeypatch.setattr(sys.modules["brushstroke.training.plan"], name, lambda device: 0)
    short, long = (bs.Example((5,) * n, (0.0,) + (1.0,) * (n - 1)) for n in (8, 100))
    config = bs.TrainConfig(batch_size=1, max_steps=1)
    mixed, alone, without = (
        bs.plan(base(), rows, LORA, config).memory_bytes for rows in ([short] * 20 + [long], [long], [short])
    )
    assert mixed == alone > without


def test_small_sites_of_a_group_get_the_largest_rank_that_fits() -> None:
    plan = bs.plan(base(), examples(4), bs.LoraConfig(rank=20), CONFIG)
    assert plan.capped == {f"model.layers.{i}.self_attn.{n}_proj": 20 for i in (0, 1) for n in "kv"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("batch_size", 0),
        ("epochs", 0),
        ("micro_tokens", "many"),
        ("schedule", "linaer"),
    ],
)
def test_invalid_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        bs.TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_two_runs_are_identical() -> None:
    a, b = (bs.train(base(), examples(10), LORA, CONFIG).adapter for _ in range(2))
    assert all(torch.equal(a[site].V, b[site].V) for site in a)  # type: ignore[attr-defined]


def test_gpt2_trains_too() -> None:
    result = bs.train(bs.Base(tiny_gpt2(), None, "gpt2"), examples(10), LORA, CONFIG)
    assert result.adapter.card is not None
    assert result.adapter.card.conv1d


def test_leftovers_of_a_killed_write_do_not_block_resume(tmp_path: Path) -> None:
    held_out = examples(6, seed=1)
    config = bs.TrainConfig(max_steps=6, batch_size=4, learning_rate=1e-2, eval_every=2, keep_best=True)
    (tmp_path / ".adapter_config.json.partial-0123abcd").write_text("half")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "real_tokens": 40}\n')
    (tmp_path / "checkpoints" / ".best-00000002.partial-0123abcd" / "new").mkdir(parents=True)
    result = bs.train(base(), examples(10), LORA, config, out=tmp_path, eval_data=held_out, resume=True)
    assert result.resumed_from == 0
    assert not list(tmp_path.rglob("*.partial-*"))
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_interrupted_evaluation_is_repeated_on_resume(tmp_path: Path) -> None:
    def stop(event: object) -> None:
        raise KeyboardInterrupt

    held_out = examples(4, seed=1)
    with pytest.raises(KeyboardInterrupt):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path / "cut", eval_data=held_out, on_step=stop)
    for name, resume in (("cut", True), ("whole", False)):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path / name, eval_data=held_out, resume=resume)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "eval.jsonl").read_text().splitlines()]
        for name in ("cut", "whole")
    ]
    assert losses[0] == losses[1]


def test_lora_config_with_an_adapter_to_continue_is_refused() -> None:
    first = bs.train(base(), examples(10), LORA, CONFIG)
    with pytest.raises(ConfigError, match="keeps its own rank"):
        bs.train(base(), examples(10), bs.LoraConfig(rank=2), CONFIG, start=first.adapter)


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ResumeError, match=r"run.json cannot be read"):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "checkpoints" / "step-00000006" / "state.json").write_text("[]")
    with pytest.raises(ResumeError, match=r"state\.json is incomplete"):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after its fifth step: checkpoints of steps 2 and 4, an evaluation of step 3."""

    def crash(event: object) -> None:
        if event.step == 5:  # type: ignore[attr-defined]
            raise Stop

    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Stop):
        bs.train(base(), examples(10), LORA, CONFIG, out=out, eval_data=examples(4, seed=1), on_step=crash)
    return out


LAST = "checkpoints/step-00000004"


def edit_state(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / LAST / "state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / LAST / "state.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def edit_lines(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(b"".join(change((folder / name).read_bytes().splitlines(keepends=True))))

    return edit


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty extra": (LAST, edit_state(extra={})),
    "no extra": (LAST, edit_state(extra=None)),
    "steps that are text": (LAST, edit_state(steps="4")),
    "steps of another checkpoint": (LAST, edit_state(steps=999)),
    "tokens that are text": (LAST, edit_state(micro_tokens="x")),
    "no rate": (LAST, edit_state(learning_rate=None)),
    "another checkpoint's state": (
        LAST,
        lambda k: shutil.copytree(k / "checkpoints/step-00000002", k / LAST, dirs_exist_ok=True),
    ),
    "a state of no run": (
        LAST,
        lambda k: (k / LAST / "state.json").write_text(
            json.dumps(sealed({**json.loads((k / LAST / "state.json").read_text()), "extra": {}}))
        ),
    ),
    "no moments": (LAST, edit_tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith("exp_avg.")])),
    "a wide factor": (LAST, edit_tensors(lambda t: t.update({n: v.double() for n, v in t.items()}))),
    "short moments": (
        LAST,
        edit_tensors(lambda t: t.update({n: v[:1].clone() for n, v in t.items() if "exp_" in n})),
    ),
    "cut tensors": (LAST, lambda k: os.truncate(k / LAST / "state.safetensors", 5000)),
    "no tensors": (LAST, lambda k: (k / LAST / "state.safetensors").unlink()),
    "no metrics": ("metrics.jsonl", lambda k: (k / "metrics.jsonl").unlink()),
    "short metrics": ("metrics.jsonl", edit_lines("metrics.jsonl", lambda lines: lines[:3])),
    "metrics with a gap": ("metrics.jsonl", edit_lines("metrics.jsonl", lambda lines: lines[1:])),
    "metrics that are no text": (
        "metrics.jsonl",
        edit_lines("metrics.jsonl", lambda lines: [*lines[:2], b"\xff\xfe\n", *lines[3:]]),
    ),
    "metrics of lists": ("metrics.jsonl", edit_lines("metrics.jsonl", lambda lines: [lines[0], b"[1]\n"])),
    "no evaluations": ("eval.jsonl", lambda k: (k / "eval.jsonl").unlink()),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_before_anything_is_changed(tmp_path: Path, killed: Path, case: str) -> None:
    where, damage = DAMAGE[case]
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    damage(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=rf"{where} is damaged.* an earlier one, or start over"):
        bs.train(base(), examples(10), LORA, CONFIG, out=out, eval_data=examples(4, seed=1), resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_lines_after_the_last_checkpoint_may_be_anything(tmp_path: Path, killed: Path) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:4]).removesuffix(b"\n") + b"\n\xff\n[1]")
    again = bs.train(
        base(), examples(10), LORA, CONFIG, out=tmp_path, eval_data=examples(4, seed=1), resume=True
    )
    assert again.resumed_from == 4
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:4] == lines[:4]


def test_a_checkpoint_of_another_version_is_named_as_one(tmp_path: Path, killed: Path) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    edit_state(format=1)(tmp_path)
    with pytest.raises(
        ResumeError, match="has format 1; this version reads 3: continue with the version that"
    ):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True)


def test_a_checkpoint_with_the_old_order_of_the_data_is_refused_by_name(tmp_path: Path, killed: Path) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    edit_state(format=2)(tmp_path)
    why = r"has format 2 \(its data order and dropout come from another random generator\); .* start over"
    with pytest.raises(ResumeError, match=why):
        bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path, resume=True)


def test_a_run_without_a_folder_makes_the_same_adapter(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, keep_best=True, eval_every=2)
    made = [
        bs.train(base(), examples(10), LORA, config, out=out, eval_data=examples(4, seed=1))
        for out in (None, tmp_path)
    ]
    assert [result.resumed_from for result in made] == [0, 0]
    one, other = (result.adapter for result in made)
    assert all(torch.equal(one[site].V, other[site].V) for site in one)  # type: ignore[attr-defined]


def test_an_interrupt_without_a_folder_keeps_nothing() -> None:
    def stop(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        bs.train(base(), examples(10), LORA, CONFIG, on_step=stop)
    assert str(caught.value) == ""


def test_factors_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    config = bs.TrainConfig(max_steps=4, batch_size=4, learning_rate=3e38, clip=0, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        bs.train(base(), examples(10), LORA, config, out=tmp_path)
    for file in tmp_path.rglob("state.safetensors"):
        assert all(t.isfinite().all() for k, t in load_file(file).items() if k.startswith("factor."))


def test_tokens_outside_of_the_vocabulary_are_named() -> None:
    row = {"input_ids": [1, 2, 99999], "labels": [-100, 2, 99999]}
    with pytest.raises(DataError, match=r"row 1 has the token 99999, .* has \d+ rows"):
        bs.train(base(), [row], LORA, CONFIG)


def test_a_run_may_save_over_its_own_folder_before_it_ends(tmp_path: Path) -> None:
    other = random_adapter(tiny_llama(), LORA)
    run = tmp_path / "run"

    def save_once(event: Any) -> None:
        if event.step == 2:
            bs.save(other, run, overwrite=True)

    found = bs.train(base(), examples(10), LORA, CONFIG, out=run, on_step=save_once)
    stored = bs.load(run)
    assert all(torch.equal(stored[site].U, found.adapter[site].U) for site in found.adapter)  # type: ignore[attr-defined]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_run_ends_early_after_evaluations_that_are_no_better(tmp_path: Path) -> None:
    settings = {
        "max_steps": 12,
        "batch_size": 4,
        "learning_rate": 0.3,
        "schedule": "constant",
        "eval_every": 1,
    }
    held_out, seen = examples(6, seed=1), []
    config = bs.TrainConfig(**settings, patience=2, checkpoint_every=1)  # type: ignore[arg-type]
    data = {"out": tmp_path, "eval_data": held_out}
    result = bs.train(base(), examples(10), LORA, config, **data, on_eval=seen.append)  # type: ignore[arg-type]
    losses = [event.loss for event in seen if event.step]
    assert result.summary["stopped_early"]
    assert result.summary["steps"] == len(losses) < 12
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2
    again = bs.train(base(), examples(10), LORA, config, **data, resume=True)  # type: ignore[arg-type]
    assert again.summary == result.summary
    kept = sorted((tmp_path / "checkpoints").iterdir())
    shutil.copytree(kept[-1].parent, tmp_path / "cut" / "checkpoints")
    for name in ("metrics.jsonl", "eval.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / "cut" / name)
    resumed = bs.train(
        base(), examples(10), LORA, config, out=tmp_path / "cut", eval_data=held_out, resume=True
    )
    assert resumed.summary["steps"] == result.summary["steps"]


def test_a_share_of_the_rows_is_held_out_for_the_evaluations() -> None:
    rows = [{"input_ids": list(e.tokens), "labels": list(e.tokens)} for e in examples(12)]
    one = bs.TrainConfig(max_steps=1)
    result = bs.train(base(), rows, LORA, one, eval_data=0.25)
    assert result.summary["examples"] == 9
    again = bs.train(base(), rows, LORA, one, eval_data=0.25)
    assert again.summary["eval_loss"] == result.summary["eval_loss"]
    with pytest.raises(DataError, match="above 0 and below 1"):
        bs.train(base(), rows, LORA, one, eval_data=1.5)


def test_patience_needs_evaluation_data() -> None:
    with pytest.raises(ConfigError, match=r"patience \(--patience\) needs evaluation data"):
        bs.train(base(), examples(4), LORA, bs.TrainConfig(max_steps=1, patience=2))


def test_a_run_keeps_its_folder_if_an_adapter_is_saved_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    out, refused = tmp_path / "out", []
    first = bs.train(base(), examples(10), LORA, CONFIG, out=out)

    def interfere(event: Any) -> None:
        if event.step in (2, 6):
            bs.save(first.adapter, out, overwrite=True)
        if event.step == 3:
            with pytest.raises(OutputError, match="another run is writing"):
                bs.train(base(), examples(10), LORA, CONFIG, out=out, overwrite=True)
            refused.append(event.step)

    bs.train(base(), examples(10, seed=5), LORA, CONFIG, out=out, overwrite=True, on_step=interfere)
    assert refused == [3]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_run_is_refused_right_after_an_adapter_is_saved_into_the_folder_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    out, refused = tmp_path / "out", []
    first = bs.train(base(), examples(10), LORA, CONFIG, out=out)

    def save_and_begin(event: Any) -> None:
        if event.step == 2:
            bs.save(first.adapter, out, overwrite=True)
            for flags in ({}, {"overwrite": True}, {"resume": True}):
                with pytest.raises(OutputError, match="another run is writing"):
                    bs.train(base(), examples(10), LORA, CONFIG, out=out, **flags)  # type: ignore[arg-type]
                refused.append(flags)

    bs.train(base(), examples(10, seed=5), LORA, CONFIG, out=out, overwrite=True, on_step=save_and_begin)
    assert len(refused) == 3
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_reader_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, readers = tmp_path / "out", ExitStack()
    first = bs.train(base(), examples(10), LORA, CONFIG, out=out)

    def save_and_read(event: Any) -> None:
        monkeypatch.setattr(lock, "PATIENCE", 0.0)
        if event.step == 2:
            bs.save(first.adapter, out, overwrite=True)
        readers.enter_context(open_folder(out))

    with readers:
        result = bs.train(
            base(), examples(10, seed=5), LORA, CONFIG, out=out, overwrite=True, on_step=save_and_read
        )
    assert result.summary["steps"] == 6


def test_another_process_does_not_save_into_the_folder_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    out, ended = tmp_path / "out", []
    first = bs.train(base(), examples(10), LORA, CONFIG, out=out)

    def save_elsewhere(event: Any) -> None:
        child = os.fork() if event.step == 2 else None
        if child == 0:
            try:
                bs.save(first.adapter, out, overwrite=True)
            except OutputError as error:
                os._exit(7 if "another run is writing" in str(error) else 1)
            os._exit(0)
        if child:
            ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    bs.train(base(), examples(10, seed=5), LORA, CONFIG, out=out, overwrite=True, on_step=save_elsewhere)
    assert ended == [7]
    bs.save(first.adapter, out, overwrite=True)


def test_a_run_stops_if_its_folder_is_moved_and_another_has_its_path(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def move(event: Any) -> None:
        if event.step == 3:
            out.rename(tmp_path / "moved")
            out.mkdir()
            (out / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match="out is no longer the folder of this run"):
        bs.train(base(), examples(10), LORA, CONFIG, out=out, on_step=move)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    out.joinpath("notes.txt").unlink()
    (tmp_path / "moved").rename(out)
    assert bs.train(base(), examples(10), LORA, CONFIG, out=out, resume=True).summary["steps"] == 6


def test_the_old_adapter_stays_until_a_run_with_overwrite_has_finished(tmp_path: Path) -> None:
    bs.train(base(), examples(10), LORA, CONFIG, out=tmp_path)
    old = bs.load(tmp_path)
    seen = []

    def look(event: Any) -> None:
        with pytest.warns(UnfinishedRunWarning):
            seen.append(bs.load(tmp_path))
        if event.step == 3:
            raise KeyboardInterrupt

    other = examples(10, seed=5)
    with pytest.raises(KeyboardInterrupt):
        bs.train(base(), other, LORA, CONFIG, out=tmp_path, overwrite=True, on_step=look)
    new = bs.train(base(), other, LORA, CONFIG, out=tmp_path, resume=True)
    assert new.resumed_from == 3
    assert [torch.equal(found[site].U, old[site].U) for found in seen for site in old] == [True] * 3 * len(
        old
    )  # type: ignore[attr-defined]
    stored = bs.load(tmp_path)
    assert all(torch.equal(stored[site].U, new.adapter[site].U) for site in stored)  # type: ignore[attr-defined]
    assert not torch.equal(*(next(iter(found.values())).U for found in (stored, old)))  # type: ignore[attr-defined]


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def of_steps(steps: int, **settings: Any) -> bs.TrainConfig:
    return bs.TrainConfig(max_steps=steps, batch_size=4, learning_rate=0.1, **settings)  # type: ignore[arg-type]


def test_a_finished_run_goes_on_with_its_optimiser(tmp_path: Path) -> None:
    data, constant = examples(10), {"schedule": "constant", "warmup": 2}
    whole = bs.train(base(), data, LORA, of_steps(9, **constant), out=tmp_path / "whole")
    out, plans = tmp_path / "parts", []
    bs.train(base(), data, LORA, of_steps(4, **constant), out=out)
    result = bs.train(
        base(),
        data,
        LORA,
        of_steps(9, **constant),
        out=out,
        resume=True,
        on_plan=lambda plan, _: plans.append(plan),
    )
    assert result.resumed_from == 4
    assert (
        "the finished run goes on from step 4 to step 9; the learning rate stays constant" in plans[0].notes
    )
    for site, update in whole.adapter.items():
        assert torch.equal(update.U, result.adapter[site].U)  # type: ignore[attr-defined]
    assert rates(out) == rates(tmp_path / "whole")
    assert result.summary["steps"] == 9
    again = bs.train(base(), data, LORA, of_steps(9, **constant), out=out, resume=True)
    assert again.resumed_from == 9
    with pytest.raises(ResumeError, match="max_steps: now 5, then 9"):
        bs.train(base(), data, LORA, of_steps(5, **constant), out=out, resume=True)
    with pytest.raises(ResumeError, match="schedule"):
        bs.train(base(), data, LORA, of_steps(12), out=out, resume=True)


def test_other_schedules_decay_again_over_the_added_steps(tmp_path: Path) -> None:
    data, out = examples(10), tmp_path / "run"
    first = bs.train(base(), data, LORA, of_steps(4, warmup=2), out=out)

    def stop(event: Any) -> None:
        if event.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bs.train(base(), data, LORA, of_steps(8, warmup=2), out=out, resume=True, on_step=stop)
    with pytest.warns(UnfinishedRunWarning):
        stored = bs.load(out)
    assert all(torch.equal(stored[site].U, first.adapter[site].U) for site in stored)  # type: ignore[attr-defined]
    result = bs.train(base(), data, LORA, of_steps(8, warmup=2), out=out, resume=True)
    assert (result.resumed_from, result.summary["steps"]) == (6, 8)
    assert rates(out)[4:] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    other = tmp_path / "other"
    bs.train(base(), data, LORA, of_steps(4, warmup=2), out=other)
    whole = bs.train(base(), data, LORA, of_steps(8, warmup=2), out=other, resume=True)
    assert all(torch.equal(whole.adapter[site].U, result.adapter[site].U) for site in whole.adapter)  # type: ignore[attr-defined]


def test_a_constant_rate_keeps_its_warm_up_where_it_goes_on(tmp_path: Path) -> None:
    config: dict[str, Any] = {"schedule": "constant", "warmup": 6}
    with pytest.warns(PlanWarning, match="never reaches"):
        bs.train(base(), examples(10), LORA, of_steps(4, **config), out=tmp_path)
    bs.train(base(), examples(10), LORA, of_steps(8, **config), out=tmp_path, resume=True)
    assert rates(tmp_path) == pytest.approx([0.1 * min(1.0, step / 6) for step in range(8)])


def test_a_run_that_stopped_early_is_complete(tmp_path: Path) -> None:
    data = {"out": tmp_path, "eval_data": examples(6, seed=1)}
    config = of_steps(12, schedule="constant", eval_every=1, patience=1)
    first = bs.train(base(), examples(10), LORA, config, **data)  # type: ignore[arg-type]
    assert first.summary["steps"] < 12
    again = bs.train(base(), examples(10), LORA, config, resume=True, **data)  # type: ignore[arg-type]
    assert again.resumed_from == first.summary["steps"]
    other = of_steps(12, schedule="constant", eval_every=1, patience=1, epochs=9)
    with pytest.raises(ResumeError, match="epochs: now 9"):
        bs.train(base(), examples(10), LORA, other, resume=True, **data)  # type: ignore[arg-type]


def test_a_finished_run_without_its_last_checkpoint_cannot_go_on(tmp_path: Path) -> None:
    bs.train(base(), examples(10), LORA, of_steps(4), out=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ResumeError, match="no checkpoint of its last step 4"):
        bs.train(base(), examples(10), LORA, of_steps(8), out=tmp_path, resume=True)
    assert bs.load(tmp_path)
