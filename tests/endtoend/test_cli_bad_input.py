"""Every bad input gives an exit status and one message, and writes no files."""

import json
import resource

import pytest
from cli_kit import PLAIN, files_in, rows, write_rows

import brushstroke as bs

LONG = "x" * 300  # more tokens than the tiny base has positions for

BAD_ROWS = {
    "a row without the columns": ([*rows(2), {"prompt": "a"}], "row 3", "'completion'"),
    "columns of other names": ([{"promt": "a", "completion": "b"}], "row 1", "did you mean 'prompt'"),
    "a null value": ([*rows(1), {"prompt": "a", "completion": None}], "row 2", "expected text"),
    "a value that is no text": ([{"prompt": 3, "completion": "b"}], "row 1", "expected text"),
    "a row that is no object": ([*rows(1), ["a"]], "2", "object"),
    "an unknown role": (
        [{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        "row 1",
        "system, user, assistant, tool, developer",
    ),
    "no assistant turn": ([{"messages": [{"role": "user", "content": "a"}]}], "row 1", "assistant"),
    "no trained token": (
        [{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}],
        "row 1",
        "nothing to train",
    ),
    "a text without a token": ([{"text": "a b"}, {"text": ""}, {"text": "c d"}], "2", "nothing to train on"),
    "a prompt that fills the limit": (
        [*rows(1), {"prompt": LONG, "completion": "b"}],
        "2",
        "--skip-too-long",
    ),
}
BAD_FILES = {
    "an empty file": (b"", "the file is empty", ""),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}\n', "UTF-8", ""),
    "broken JSON": (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2", ""),
}
BAD_VALUES = {
    "a rank of 0": (["--rank", "0"], "rank"),
    "a negative rank": (["--rank=-1"], "rank"),
    "a rank that is not whole": (["--rank", "1.5"], "whole number"),
    "a rank in letters": (["--rank", "eight"], "whole number"),
    "a negative learning rate": (["--learning-rate", "-0.001"], "learning_rate"),
    "a learning rate that is no number": (["--learning-rate", "fast"], "--learning-rate"),
    "no batch": (["--batch-size", "0"], "batch_size"),
    "a dropout of 1": (["--dropout", "1"], "dropout"),
    "an alpha beyond what float32 holds": (["--alpha", "1e300"], "alpha must be"),
    "more epochs than can be counted": (["--epochs", "1e308"], "epochs asks for more than"),
    "steps that a float cannot count": (["--max-steps", str(10**400)], "a whole number of at most"),
    "going on and starting over": (["--resume", "--overwrite"], "give one of them"),
    "a seed beyond what a generator takes": (["--seed", str(2**64)], "a whole number of at most"),
    "an unknown schedule": (["--schedule", "liner"], "linear"),
    "an unknown scale rule": (["--scale-rule", "sqrt"], "rslora"),
    "an unknown dtype": (["--dtype", "fp8"], "bfloat16"),
    "micro-tokens in words": (["--micro-tokens", "many"], "'auto' or a whole number"),
    "a pattern without a value": (["--rank-pattern", "q_proj"], "PATTERN=VALUE"),
    "a limit of one token": (["--max-length", "1"], "max_length"),
    "the best of no evaluation": (["--keep-best"], "--eval DATA"),
    "an unknown flag": (["--rnk", "4"], "did you mean --rank?"),
    "a flag without its value": (["--rank"], "--rank"),
}


@pytest.fixture
def refused(cli, tiny, tmp_path):
    """Train, expect a refusal, and that nothing was left; returns the message."""

    def run(data, *flags, status=1):
        before = files_in(tmp_path)
        done = cli("train", tiny, data, "--out", tmp_path / "out", "--device", "cpu", *flags)
        assert done.status == status, done.err
        assert done.out == ""
        assert not (tmp_path / "out").exists()
        assert files_in(tmp_path) == before
        return done.error

    return run


@pytest.mark.parametrize("case", BAD_ROWS)
def test_invalid_rows_are_refused(refused, tmp_path, case):
    given, *expected = BAD_ROWS[case]
    message = refused(write_rows(tmp_path / "train.jsonl", given))
    assert all(text in message for text in expected), message


@pytest.mark.parametrize("case", BAD_FILES)
def test_invalid_files_are_refused(refused, tmp_path, case):
    content, *expected = BAD_FILES[case]
    (tmp_path / "train.jsonl").write_bytes(content)
    message = refused(tmp_path / "train.jsonl")
    assert all(text in message for text in expected), message


def test_many_bad_rows_name_their_file_once(refused, tmp_path):
    file = write_rows(tmp_path / "train.jsonl", [{"text": ""} for _ in range(12)])
    assert f"{file}, rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more; remove such rows" in refused(file)


def test_missing_file_error_suggests_a_similar_file(refused, tmp_path):
    write_rows(tmp_path / "train.jsonl", rows(1))
    assert "did you mean 'train.jsonl'" in refused(tmp_path / "trian.jsonl")


def test_unknown_data_names_are_refused(refused, tmp_path):
    assert "name of the data is empty" in refused("")
    assert "begins with ~" in refused("~nobody-of-this-name/train.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "did you mean" not in refused(tmp_path / "link.jsonl")


def test_columns_that_are_separated_by_something_else(refused, tmp_path):
    (tmp_path / "train.csv").write_text("prompt;completion\na;b\n", "utf-8")
    message = refused(tmp_path / "train.csv")
    assert "separated by ';'" in message
    assert "did you mean" not in message


def test_bad_evaluation_data(refused, train_rows, tmp_path):
    assert "no such file" in refused(train_rows, "--eval", tmp_path / "none.jsonl")


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_are_usage_errors(refused, train_rows, case):
    flags, expected = BAD_VALUES[case]
    assert expected in refused(train_rows, *flags, status=2)


@pytest.mark.parametrize("words", [["train"], ["train", "base"], ["train", "base", "data"], ["trian"]])
def test_missing_words_are_usage_errors(cli, words):
    done = cli(*words)
    assert done.status == 2
    assert done.error


def test_patterns_that_match_nothing_name_near_ones(cli, tiny, train_rows, tmp_path):
    done = cli("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--targets", "q_porj,v_prj")
    assert done.status == 2
    assert "'q_porj' matches no site; near it: q_proj" in done.error
    assert "'v_prj' matches no site; near it: v_proj" in done.error  # both in the one line
    assert not (tmp_path / "out").exists()


def test_missing_base_is_an_error(cli, train_rows, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    for base in (tmp_path / "none", tmp_path / "empty", tmp_path / "a.gguf"):
        done = cli("train", base, train_rows, "--out", tmp_path / "out")
        assert done.status == 1
        assert base.name in done.error
        assert not (tmp_path / "out").exists()


def test_missing_adapter_is_an_error(cli, tiny, train_rows, tmp_path):
    (tmp_path / "empty").mkdir()
    commands = [
        ("train", tiny, train_rows, "--out", tmp_path / "out", "--from", tmp_path / "none"),
        ("generate", tiny, "hello", "--adapter", tmp_path / "empty"),
        ("evaluate", tiny, train_rows, "--adapter", tmp_path / "none"),
        ("merge", tiny, tmp_path / "empty", "--out", tmp_path / "out"),
        ("show", tmp_path / "none"),
    ]
    for words in commands:
        done = cli(*words)
        assert done.status == 1, words
        assert "adapter" in done.error
    assert not (tmp_path / "out").exists()


def test_rank_with_from_is_refused(refused, train_rows, tmp_path):
    message = refused(train_rows, "--from", tmp_path / "a", "--rank", "4", "--targets", "mlp", status=2)
    assert "--rank, --targets cannot be combined with --from" in message


def test_config_files(refused, train_rows, tmp_path):
    file = tmp_path / "config.yaml"
    cases = {
        "rnk: 4": "did you mean rank?",
        "rank: [1": "broken YAML",
        "- rank": "keys and values",
        "rank: four": "whole number",
        "rank: true": "found true",
        "rank: {a: {b: 1}}": "found a mapping",
        "rank: -2": "rank",
        "rank: 4\nseed: 1\nrank: 8": "'rank' appears twice",
        "rank_pattern: {q_proj: 2, q_proj: 4}": "'q_proj' appears twice",
        "rank: " + "[" * 3000: "nested too deeply",
        "prompt: ''": "the value of --prompt is empty",
        "max_steps: 3\nmax-steps: 4": "'max_steps' and 'max-steps' are the same flag",
    }
    for text, expected in cases.items():
        file.write_text(text, "utf-8")
        assert expected in refused(train_rows, "--config", file, status=2), text
    assert "none.yaml" in refused(train_rows, "--config", tmp_path / "none.yaml", status=2)


def test_existing_folder_is_refused_and_overwrite_replaces_only_own_files(cli, tiny, train_rows, tmp_path):
    words = ("train", tiny, train_rows, "--out", tmp_path, *PLAIN, "--max-steps", "1")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text(line := '{"step": 9, "loss": 1.5, "real_tokens": 40}\n')
    done = cli(*words)
    assert done.status == 1
    assert "--overwrite" in done.error
    assert files_in(tmp_path) == {"notes.txt", "metrics.jsonl"}
    assert (tmp_path / "metrics.jsonl").read_text() == line
    assert cli(*words, "--overwrite").status == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_readme_of_the_user_is_not_replaced(cli, tiny, train_rows, tmp_path, flag):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    done = cli("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--max-steps", "1", flag)
    assert done.status == 1
    assert "README.md was not written by brushstroke" in done.error
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_continuing_an_adapter_into_its_own_folder_is_refused(cli, tiny, train_rows, tmp_path, monkeypatch):
    words = ("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--max-steps", "1")
    assert cli(*words).status == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    monkeypatch.chdir(tmp_path)
    for flag in ("--overwrite", "--resume"):
        done = cli(*words, "--from", "out", flag)
        assert done.status == 2
        assert "the start adapter out is in the output folder" in done.error
        assert "loading" not in done.err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")} == before


def test_an_adapter_is_not_written_into_the_folder_of_its_base(cli, tiny, train_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    before = files_in(tiny)
    for out in (tiny, "."):
        done = cli("train", tiny, train_rows, "--out", out, *PLAIN, "--overwrite")
        assert done.status == 1
        assert "is the base's own folder" in done.error
        assert "loading" not in done.err
    base = bs.load_base(tiny, dtype="float32", device="cpu")
    with pytest.raises(bs.errors.OutputError, match="the base's own folder"):
        bs.train(base, rows(4), bs.LoraConfig(), bs.TrainConfig(max_steps=1), out=tiny, overwrite=True)
    assert files_in(tiny) == before


@pytest.mark.parametrize("flag", ["--out", "--from", "--config", "--prompt", "--eval"])
def test_empty_values_are_refused_by_name(cli, tiny, train_rows, flag):
    done = cli("train", tiny, train_rows, *([] if flag == "--out" else ["--out", "out"]), f"{flag}=")
    assert done.status == 2
    assert f"the value of {flag} is empty; give a value, or leave the flag out" in done.error


def test_empty_and_impossible_paths_are_refused_by_every_command(cli, tiny, tmp_path):
    for words in (
        ["show", ""],
        ["spectrum", ""],
        ["merge", tiny, "", "--out", "out"],
        ["compare", tmp_path, ""],
    ):
        done = cli(*words)
        assert done.status == 2
        assert "is empty" in done.error
    for words in (["merge", tiny, tmp_path, "--out", "a\0b"], ["show", "a\0b"]):
        done = cli(*words)
        assert done.status == 2
        assert "NUL" in done.error


def test_a_folder_with_a_name_that_no_file_system_takes(cli, tiny, train_rows):
    done = cli("train", tiny, train_rows, "--out", "a\0b", *PLAIN)
    assert done.status == 2
    assert "NUL" in done.error


def test_a_file_where_the_folder_should_be(cli, tiny, train_rows, tmp_path):
    (tmp_path / "out").write_text("mine")
    done = cli("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--overwrite")
    assert done.status == 1
    assert "is a file" in done.error


def test_long_prompts_are_left_out_and_long_answers_cut_when_asked(cli, tiny, tmp_path):
    given = [*rows(2), {"prompt": LONG, "completion": "b"}, {"prompt": "a", "completion": LONG}]
    data = write_rows(tmp_path / "train.jsonl", given)
    words = ("train", tiny, data, "--out", tmp_path / "out", *PLAIN, "--max-steps", "1", "--skip-too-long")
    done = cli(*words)
    assert done.status == 0, done.err
    assert "1 examples are left out, because their prompt fills the limit (row 3)" in done.err
    assert "1 examples are cut at the limit" in done.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["examples"] == 3


def test_warmup_as_long_as_the_run_is_reported(cli, tiny, train_rows):
    for warmup, reported in (("2", True), ("1", False), ("0.5", False)):
        done = cli("plan", tiny, train_rows, *PLAIN, "--max-steps", "2", "--warmup", warmup)
        assert done.status == 0, done.err
        assert ("the warm-up has 2 steps and the run 2" in done.err) == reported


def test_nan_loss_stops_with_advice(cli, tiny, train_rows, tmp_path):
    flags = ("--learning-rate", "1e30", "--checkpoint-every", "1", "--max-steps", "9")
    done = cli("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, *flags)
    assert done.status == 1
    assert "lower the learning rate" in done.error
    kept = sorted((tmp_path / "out" / "checkpoints").iterdir())
    assert kept
    assert str(kept[-1]) in done.error
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("flag", "value", "advice"),
    [
        ("--learning-rate", "1e39", "lower the learning rate (it is 1e+39)"),
        ("--weight-decay", "1e308", "or the weight decay (it is 1e+308)"),
    ],
)
def test_non_finite_final_factors_are_refused_with_advice(
    cli, tiny, train_rows, tmp_path, flag, value, advice
):
    words = ("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--max-steps", "1")
    done = cli(*words, flag, value)
    assert done.status == 1
    assert advice in done.error
    assert files_in(tmp_path / "out") == {"metrics.jsonl"}
    assert cli(*words, "--resume").status == 0


def test_a_full_disk_stops_with_one_message(cli, tiny, train_rows, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # no file may be longer: the adapter is
        done = cli("train", tiny, train_rows, "--out", tmp_path / "out", *PLAIN, "--max-steps", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.status == 1
    assert "cannot write" in done.error
    assert not [name for name in files_in(tmp_path / "out") if name.startswith(("adapter", ".partial"))]


def test_generate_and_data_errors_are_clear(cli, tiny, train_rows, tmp_path):
    cases = [
        (("generate", tiny, "a", "--max-new-tokens", "0"), 2, "max_new_tokens"),
        (("generate", tiny, "a", "--use", "nobody"), 2, "no such adapter"),
        (("generate", tiny, "a", "--prompts", tmp_path / "none.txt"), 1, "none.txt"),
        (("generate", tiny, "a", "--adapter", "base=x"), 2, "'base'"),
        (("generate", tiny, "a", "--adapter", "x", "--adapter", "y/x"), 2, "two adapters"),
        (("generate", tiny, LONG, *PLAIN), 1, "prompt 1"),
        (("data", tiny, train_rows, "--rows=-1"), 2, "--rows"),
        (("evaluate", tiny, train_rows, "--out", tmp_path / "no" / "file"), 1, "no folder"),
        (("evaluate", tiny, train_rows, "--batch-size", "0"), 2, "batch_size"),
        (("evaluate", tiny, train_rows, "--out", tmp_path), 1, "it is a folder"),
        (("evaluate", tiny, train_rows, "--out", train_rows), 1, "is the data itself"),
        (("evaluate", tiny, train_rows, "--out", tiny / "config.json"), 1, "--overwrite"),
        (("evaluate", tiny, train_rows.parent, "--out", train_rows), 1, "--overwrite"),
        (("generate", tiny, "a", "--temperature", "1e-45"), 2, "temperature"),
        (("generate", tiny, "a", "--seed", str(2**64)), 2, "seed"),
        (("data", tiny, train_rows, "--max-length", "0"), 2, "max_length"),
    ]
    for words, status, expected in cases:
        done = cli(*words)
        assert done.status == status, (words, done.err)
        assert expected in done.error, words


def test_unexpected_error_is_called_a_bug_and_traced_only_in_debug(cli, tiny, train_rows, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no idea")

    monkeypatch.setattr("brushstroke.data.read_rows", broken)
    done = cli("plan", tiny, train_rows)
    assert done.status == 1
    assert "bug in brushstroke" in done.error
    assert "no idea" in done.error
    monkeypatch.setenv("BRUSHSTROKE_DEBUG", "1")
    assert "Traceback" in cli("plan", tiny, train_rows).err
