import pytest

from brushstroke.cli.app import main
from brushstroke.cli.hints import _SIMPLE, flag_hint

OTHERS = {
    "--lr": "--learning-rate",
    "--r": "--rank",
    "--lora-alpha": "--alpha",
    "--lora_alpha": "--alpha",
    "--lora_dropout=0.1": "--dropout",
    "--num-epochs": "--epochs",
    "--num_train_epochs": "--epochs",
    "--target-modules": "--targets",
    "--max-seq-length": "--max-length",
    "--output-dir": "--out",
    "--per-device-train-batch-size": "--batch-size",
    "--eval-steps": "--eval-every",
}


@pytest.mark.parametrize(("theirs", "ours"), OTHERS.items())
def test_the_flags_of_other_tools_name_ours(capsys, theirs, ours):
    assert main(["train", "base", "data", "--out", "out", theirs]) == 2
    expected = f"Unknown option: {theirs.partition('=')[0]}; here it is {ours}. See: brushstroke train --help"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--gradient-accumulation-steps", "--batch-size is the number of examples of a whole step"),
        ("--bf16", "--dtype bfloat16"),
        ("--model", "the first argument"),
        ("--rnk", "(did you mean --rank?)"),
        ("--use-dora", "--variant dora"),
    ],
)
def test_other_flags_are_explained(capsys, flag, hint):
    assert main(["train", "base", "data", "--out", "out", flag, "4"]) == 2
    assert hint in capsys.readouterr().err


def test_a_name_that_is_far_from_all_flags_has_no_hint(capsys):
    assert main(["train", "base", "data", "--out", "out", "--wandb"]) == 2
    assert "Unknown option: --wandb; give --track wandb. See" in capsys.readouterr().err


def test_every_hint_is_a_flag_of_a_command(capsys):
    shown = ""
    for command in ("train", "generate", "merge"):
        assert main([command, "--help"]) == 0
        shown += capsys.readouterr().out
    assert [ours for ours in set(_SIMPLE.values()) if f"--{ours}" not in shown] == []


def test_keys_of_a_config_file_have_the_same_hints(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 0.001\n")
    assert main(["train", "base", "data", "--out", "out", "--config", str(path)]) == 2
    assert "unknown key 'lr'; here it is learning-rate" in capsys.readouterr().err
    assert flag_hint("batchsize", ["batch-size"]) == " (did you mean batch-size?)"
