"""Runs of `train`: files, totals, and killed runs that resume to the same bits."""

import json
import signal
import subprocess
import sys
import time

import pytest
from cli_kit import ENVIRONMENT, PLAIN, files_in, lines_of, rows, start, write_rows

from brushstroke.cli import main

ADAPTER = {
    "adapter_model.safetensors",
    "adapter_config.json",
    "brushstroke.json",
    "chat_template.jinja",
    "README.md",
}
TOTALS = {
    "real_tokens",
    "trained_tokens",
    "computed_tokens",
    "steps",
    "seconds",
    "real_tokens_per_second",
    "peak_memory_bytes",
    "final_loss",
    "mean_loss",
    "dtype",
}
# Long enough to be caught in the middle, also on a fast machine.
LONG_RUN = (
    *PLAIN,
    "--rank",
    "4",
    "--max-steps",
    "120",
    "--checkpoint-every",
    "10",
    "--learning-rate",
    "1e-2",
)
CAUGHT_AT = 25  # steps


@pytest.fixture(scope="module")
def whole_run(tiny, train_rows, tmp_path_factory):
    """The long run, not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", str(tiny), str(train_rows), "--out", str(out), *LONG_RUN]) == 0
    return out


def catch(process, out, at):
    """Wait until a run has done some steps."""
    for _ in range(2400):
        if process.poll() is not None:
            pytest.fail(f"the run ended before it was caught: {process.communicate()}")
        if (out / "metrics.jsonl").is_file() and len((out / "metrics.jsonl").read_bytes().splitlines()) >= at:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail("the run did not begin")


def assert_same_run(out, whole):
    """All but the clock is equal."""
    for name in ADAPTER - {"README.md", "brushstroke.json"}:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    clockwork = {"seconds", "peak_memory_bytes"}
    steps, expected = lines_of(out / "metrics.jsonl"), lines_of(whole / "metrics.jsonl")
    assert [{k: line[k] for k in line if k not in clockwork} for line in steps] == [
        {k: line[k] for k in line if k not in clockwork} for line in expected
    ]


def test_train_writes_its_files_and_totals(cli, tiny, train_rows, tmp_path):
    out = tmp_path / "out"
    flags = ("--epochs", "2", "--batch-size", "4", "--eval", train_rows, "--checkpoint-every", "2", "--json")
    done = cli("train", tiny, train_rows, "--out", out, *PLAIN, *flags)
    assert done.status == 0, done.err
    files = {"metrics.jsonl", "eval.jsonl", "run.json", *ADAPTER}
    assert {name for name in files_in(out) if not name.startswith("checkpoints/")} == files
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    summary = json.loads((out / "run.json").read_text("utf-8"))
    assert json.loads(done.out) == summary
    assert set(summary) >= TOTALS
    assert summary["steps"] == 6
    assert summary["dtype"] == "float32"
    steps = lines_of(out / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    fields = {
        "step",
        "loss",
        "real_tokens",
        "trained_tokens",
        "seconds",
        "learning_rate",
        "peak_memory_bytes",
    }
    assert all(set(line) >= fields for line in steps)
    assert summary["real_tokens"] == sum(line["real_tokens"] for line in steps)
    assert [line["step"] for line in lines_of(out / "eval.jsonl")] == [0, 3, 6]
    assert "evaluation before the first step: loss" in done.err
    assert (
        f"evaluation loss: {summary['eval_loss_before']:.4f} before, {summary['eval_loss']:.4f} after"
        in done.err
    )


def test_a_share_of_the_data_is_held_out_for_the_evaluation(cli, tiny, train_rows, tmp_path, monkeypatch):
    flags = ("--max-steps", "2", "--eval", "25%", "--patience", "1", "--json")
    done = cli("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, *flags)
    assert done.status == 0, done.err
    assert "rows are held out for evaluation (seed 0)" in done.err
    assert json.loads(done.out)["eval_loss_before"] > 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.1").write_text("not rows")
    done = cli("train", tiny, train_rows, "--out", tmp_path / "other", *PLAIN, "--eval", "0.1")
    assert done.status == 1
    assert "--eval 0.1 is a file here, and is read as one" in done.err


def test_the_plan_comes_before_the_first_step(cli, tiny, train_rows, tmp_path):
    done = cli("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--max-steps", "2")
    plan, _, after = done.err.partition("\nstep 1/2 ")
    for expected in (
        "all-linear: 14 sites",
        "lm_head",
        "trainable parameters",
        "memory",
        "steps of 8 examples",
        "micro-tokens",
        "products",
        "shared prefixes",
        "the default for this width",
        "float32 (asked for)",
        "packed",
        "<|im_end|>",
    ):
        assert expected in plan, expected
    assert "step 2/2 " in after
    assert "done: 2 steps" in after
    assert done.out == ""


def test_plan_command_prints_the_same_plan_and_writes_nothing(cli, tiny, train_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (*PLAIN, "--targets", "q_proj,mlp", "--rank-pattern", "q_proj=2", "--learning-rate", "1e-3")
    done = cli("plan", tiny, train_rows, *flags)
    assert done.status == 0
    assert "q_proj: 2 sites; mlp: 6 sites" in done.out
    assert "0.001 (asked for)" in done.out
    reported = json.loads(cli("plan", tiny, train_rows, *flags, "--json").out)
    assert reported["matches"] == {"q_proj": 2, "mlp": 6}
    assert reported["examples"] == 12
    assert reported["dtype_reason"] == "asked for"
    assert not files_in(tmp_path)


def test_two_runs_are_identical(cli, tiny, train_rows, tmp_path):
    for name in ("one", "two"):
        flags = ("--max-steps", "4", "--dropout", "0.1", "--seed", "5")
        assert cli("train", tiny, train_rows, "--out", tmp_path / name, *PLAIN, *flags).status == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_killed_run_command_resumes_to_the_same_bits(cli, tiny, train_rows, tmp_path, whole_run):
    out = tmp_path / "out"
    process = start("train", tiny, train_rows, "--out", out, *LONG_RUN)
    catch(process, out, CAUGHT_AT)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "adapter_model.safetensors").exists()
    before = (out / "metrics.jsonl").read_bytes().splitlines()
    kept = max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))
    assert kept >= 20
    again = cli("train", tiny, train_rows, "--out", out, *LONG_RUN, "--resume")
    assert again.status == 0, again.err
    assert f"continuing from the checkpoint of step {kept}" in again.err
    assert (out / "metrics.jsonl").read_bytes().splitlines()[:kept] == before[:kept]
    assert_same_run(out, whole_run)


def test_interrupted_run_keeps_a_checkpoint_and_resumes(cli, tiny, train_rows, tmp_path, whole_run):
    out = tmp_path / "out"
    process = start("train", tiny, train_rows, "--out", out, *LONG_RUN)
    catch(process, out, CAUGHT_AT)
    process.send_signal(signal.SIGINT)
    reported, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert reported == ""
    assert "Traceback" not in err
    steps = len(lines_of(out / "metrics.jsonl"))
    kept = out / "checkpoints" / f"step-{steps:08d}"
    assert err.splitlines()[-1] == f"interrupted; checkpoint saved at {kept}; continue with --resume"
    assert kept.is_dir()
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    same = cli("train", tiny, train_rows, "--out", out, *LONG_RUN)
    assert same.status == 1
    assert f"continue from its checkpoint of step {steps} with --resume" in same.error
    assert same.error.index("--resume") < same.error.index("--overwrite")
    assert "loading" not in same.err
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before
    again = cli("train", tiny, train_rows, "--out", out, *LONG_RUN, "--resume")
    assert again.status == 0, again.err
    assert_same_run(out, whole_run)
    finished = cli("train", tiny, train_rows, "--out", out, *LONG_RUN)
    assert "holds a finished run of 120 steps" in finished.error
    assert "go on with --resume and a larger --max-steps" in finished.error
    flags = ["122" if flag == "120" else flag for flag in LONG_RUN]
    longer = cli("train", tiny, train_rows, "--out", out, *flags, "--resume", "--json")
    assert longer.status == 0, longer.err
    assert "the finished run goes on from step 120 to step 122" in " ".join(longer.err.split())
    assert json.loads(longer.out)["steps"] == 122


def test_more_interrupts_lose_nothing(tiny, train_rows, tmp_path):
    out = tmp_path / "out"
    process = start("train", tiny, train_rows, "--out", out, *LONG_RUN)
    catch(process, out, 9)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = out / "checkpoints" / f"step-{len(lines_of(out / 'metrics.jsonl')):08d}"
    assert err.splitlines()[-1] == f"interrupted; checkpoint saved at {kept}; continue with --resume"
    assert (kept / "state.json").is_file()


def test_repeated_interrupts_while_the_base_loads_print_one_line(tiny, train_rows, tmp_path):
    process = start("train", tiny, train_rows, "--out", tmp_path / "out", *LONG_RUN)
    assert process.stderr.readline().startswith("loading")
    for _ in range(40):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines() == ["interrupted"]
    assert not (tmp_path / "out").exists()


def test_resume_reports_the_state_of_the_folder(cli, tiny, train_rows, tmp_path):
    words = ("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--max-steps", "2", "--resume")
    first = cli(*words)
    assert first.status == 0
    assert "there is no checkpoint" in first.err
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    second = cli(*words)
    assert second.status == 0
    assert "already complete" in second.err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")} == before
    other = cli(*words, "--rank", "2")
    assert other.status == 1
    assert "rank: now 2, then 8" in other.error
    more = cli("train", tiny, write_rows(tmp_path / "b.jsonl", rows(3)), *words[3:])
    assert more.status == 1
    assert "another data" in more.error


def test_config_file_uses_flag_names_and_command_line_takes_precedence(cli, tiny, train_rows, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {tiny}\ndata: {train_rows}\nout: {tmp_path / 'a'}\neval: {train_rows}\n"
        "rank: 2\nlearning_rate: 1e-3\nmax-steps: 9\ntargets: [q_proj, v_proj]\nrank_pattern: {v_proj: 3}\n"
        "keep-best: yes\nmicro-tokens: 256\ndevice: cpu\ndtype: float32\ndropout:\n"
    )
    assert cli("train", "--config", file, "--max-steps", "2").status == 0
    flags = ("--rank", "2", "--learning-rate", "0.001", "--max-steps", "2", "--targets", "q_proj,v_proj")
    flags += ("--rank-pattern", "v_proj=3", "--keep-best", "--micro-tokens", "256", "--eval", train_rows)
    assert cli("train", tiny, train_rows, "--out", tmp_path / "b", *PLAIN, *flags).status == 0
    settings = [json.loads((tmp_path / name / "run.json").read_text())["settings"] for name in "ab"]
    assert settings[0] == settings[1]
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert cli("plan", "--config", file).status == 0
    off = cli("train", "--config", file, "--no-keep-best", "--max-steps", "1", "--out", tmp_path / "c")
    assert off.status == 0, off.err
    assert not json.loads((tmp_path / "c" / "run.json").read_text())["settings"]["config"]["keep_best"]


def test_renamed_columns_and_continuing_an_adapter(cli, tiny, tmp_path):
    given = [{"question": row["prompt"], "answer": row["completion"]} for row in rows(4)]
    data = write_rows(tmp_path / "train.jsonl", given)
    words = (tiny, data, *PLAIN, "--prompt", "question", "--completion", "answer", "--max-steps", "1")
    assert cli("train", *words, "--out", tmp_path / "a", "--rank", "2").status == 0
    done = cli("train", *words, "--out", tmp_path / "b", "--from", tmp_path / "a")
    assert done.status == 0, done.err
    assert "14 sites of the adapter in --from" in done.err
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["generate", "--help"]])
def test_help_loads_neither_torch_nor_transformers(words):
    code = (
        f"import sys; from brushstroke.cli import main; status = main({words!r}); "
        "print(status, sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert done.stderr == ""
