"""`--config FILE.yaml` for every command."""

import pytest

from brushstroke.cli.app import COMMANDS, main
from brushstroke.cli.configfile import take_config_flag
from brushstroke.errors import ConfigError


def test_the_flag_is_taken_wherever_it_stands():
    assert take_config_flag(["show", "--config", "a.yaml", "x"]) == (["show", "x"], _path("a.yaml"))
    assert take_config_flag(["show", "x", "--config=a.yaml"]) == (["show", "x"], _path("a.yaml"))
    assert take_config_flag(["generate", "--", "--config"]) == (["generate", "--", "--config"], None)
    for given in (["--config"], ["--config="], ["--config", "a", "--config", "b"]):
        with pytest.raises(ConfigError, match="--config is"):
            take_config_flag(given)


def test_every_command_reads_flags_from_a_file(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text("json: true\n")
    assert main(["cache", "--config", str(file)]) == 0
    assert '"parts"' in capsys.readouterr().out
    file.write_text("unknown-flag: 3\n")
    for command in COMMANDS:
        assert main([command, "--config", str(file)]) == 2
        assert "unknown key 'unknown-flag'" in capsys.readouterr().err


def test_a_list_is_a_flag_that_is_repeated(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text(f"adapter: [{tmp_path}/a, b={tmp_path}/b]\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert main(["evaluate", a_base(tmp_path), f"{tmp_path}/rows.jsonl", "--config", str(file)]) == 1
    assert f"there is no folder {tmp_path}/a;" in capsys.readouterr().err


def test_a_list_of_data_is_joined(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text(f"data: [{tmp_path}/a.jsonl, '{tmp_path}/b.jsonl:2']\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert main(["plan", a_base(tmp_path), "--config", str(file)]) == 1
    assert f"{tmp_path}/b.jsonl: no such file or folder" in capsys.readouterr().err


def test_every_command_has_an_example_in_its_help(capsys):
    for command, (_, about, example) in COMMANDS.items():
        assert main([command, "--help"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert about in said
        assert f"Example: {example}" in said
        assert "--config FILE.yaml" in said


def a_base(folder):
    """The path of a base without weights, which is found but not loaded."""
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    return str(folder / "base")


def _path(name):
    from pathlib import Path

    return Path(name)
