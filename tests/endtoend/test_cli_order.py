"""Data is checked with the tokenizer only, which a base without weights shows."""

import shutil

import pytest
from cli_kit import rows, write_rows

from brushstroke.cli import early

COMMANDS = {
    "train": ("train", "BASE", "DATA", "--out", "OUT"),
    "train with an evaluation": ("train", "BASE", "GOOD", "--eval", "DATA", "--out", "OUT"),
    "plan": ("plan", "BASE", "DATA"),
    "data": ("data", "BASE", "DATA"),
    "study": ("study", "rank", "BASE", "DATA", "--out", "OUT"),
    "study with a test": ("study", "rank", "BASE", "GOOD", "--test", "DATA", "--out", "OUT"),
}
CONTENTS = {
    "no file": (None, "no such file"),
    "broken JSON": ('{"prompt": "a", "completion"\n', "line 1"),
    "other columns": ('{"question": "a", "reply": "b"}\n', "row 1: found the columns"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}\n', "row 1"),
    "nothing to train on": ('{"input_ids": [1, 2], "labels": [-100, -100]}\n', "nothing to train"),
    "an answer that is no text": ('{"prompt": "a", "completion": 3}\n', "row 1: 'completion'"),
    "a prompt that fills the limit": (f'{{"prompt": "{"x" * 600}", "completion": "b"}}\n', "--skip-too-long"),
}


@pytest.fixture(scope="module")
def weightless(tiny, tmp_path_factory):
    """The tiny base without its weights."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("weightless") / "base")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", CONTENTS)
def test_data_is_checked_before_the_weights_are_loaded(cli, weightless, tmp_path, command, case):
    content, expected = CONTENTS[case]
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    places = {
        "BASE": weightless,
        "DATA": tmp_path / "bad.jsonl",
        "GOOD": write_rows(tmp_path / "good.jsonl", rows(40)),
        "OUT": tmp_path / "out",
    }
    done = cli(*(places.get(word, word) for word in COMMANDS[command]))
    assert done.status == 1
    assert expected in done.error
    assert not (tmp_path / "out").exists()


def test_valid_data_proceeds_to_loading_the_weights(cli, weightless, train_rows, tmp_path):
    done = cli("train", weightless, train_rows, "--out", tmp_path / "out")
    assert done.status == 1
    assert "cannot load the model" in done.error


def test_data_is_checked_with_the_template_of_the_continued_adapter(
    cli, weightless, tiny, train_rows, tmp_path
):
    assert cli("train", tiny, train_rows, "--out", tmp_path / "a", "--max-steps", 1).status == 0
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ raise_exception('no such talk') }}")
    done = cli("plan", weightless, train_rows, "--from", tmp_path / "a")
    assert done.status == 1
    assert "no such talk" in done.error


def test_large_data_is_checked_in_part_before_loading(cli, tiny, weightless, tmp_path, monkeypatch):
    monkeypatch.setattr(early, "ROWS", 60)
    data = write_rows(tmp_path / "many.jsonl", [*rows(60), {"prompt": "a", "completion": 3}])
    assert "cannot load the model" in cli("plan", weightless, data).error
    assert "row 61" in cli("plan", tiny, data).error
