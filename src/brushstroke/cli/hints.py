"""Hints for flags that do not exist: names that other tools use, and near misses."""

import difflib
from collections.abc import Iterable

NEAR = 0.7  # required similarity of two names
_SIMPLE = {  # flags of other tools, without dashes at the start → ours
    **dict.fromkeys(("lr", "lr-rate"), "learning-rate"),
    **dict.fromkeys(("r", "lora-r", "lora-rank", "lora-dim"), "rank"),
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    **dict.fromkeys(("target-modules", "lora-target", "lora-target-modules", "modules"), "targets"),
    **dict.fromkeys(("num-epochs", "num-train-epochs", "n-epochs", "epoch"), "epochs"),
    **dict.fromkeys(("steps", "iters", "num-steps", "max-train-steps"), "max-steps"),
    **dict.fromkeys(("per-device-train-batch-size", "train-batch-size", "micro-batch-size"), "batch-size"),
    **dict.fromkeys(("max-seq-length", "max-seq-len", "seq-len", "cutoff-len", "block-size"), "max-length"),
    **dict.fromkeys(("lr-scheduler", "lr-scheduler-type", "scheduler"), "schedule"),
    **dict.fromkeys(("warmup-steps", "warmup-ratio", "num-warmup-steps"), "warmup"),
    **dict.fromkeys(("max-grad-norm", "gradient-clipping", "grad-clip"), "clip"),
    **dict.fromkeys(("save-steps", "save-every", "save-interval"), "checkpoint-every"),
    **dict.fromkeys(("eval-steps", "eval-interval"), "eval-every"),
    **dict.fromkeys(("val-data", "eval-dataset", "validation", "valid-data"), "eval"),
    "load-best-model-at-end": "keep-best",
    **dict.fromkeys(("output-dir", "output", "save-dir", "adapter-path"), "out"),
    **dict.fromkeys(("resume-from-checkpoint", "continue"), "resume"),
    **dict.fromkeys(("max-tokens", "max-length-of-answer"), "max-new-tokens"),
    "force": "overwrite",
    **dict.fromkeys(("report-to", "log-with"), "track"),
    "gradient-checkpoint": "gradient-checkpointing",
    "compile": "torch-compile",
}
_TOLD = {  # flags of other tools that have no counterpart → what to do instead
    **dict.fromkeys(
        ("gradient-accumulation-steps", "grad-accum", "accumulation-steps"),
        "a step is divided into passes automatically: --batch-size is the number of examples of a whole step",
    ),
    **dict.fromkeys(("bf16", "fp16", "torch-dtype"), "give --dtype bfloat16 or --dtype float16"),
    **dict.fromkeys(
        ("model", "model-name", "model-name-or-path", "base-model"), "the base is the first argument: BASE"
    ),
    **dict.fromkeys(
        ("dataset", "data", "data-path", "dataset-name", "train-file"),
        "the data is the second argument: DATA",
    ),
    **dict.fromkeys(("packing", "group-by-length"), "rows are always packed without padding"),
    **dict.fromkeys(("wandb", "use-wandb", "wandb-project"), "give --track wandb"),
    **dict.fromkeys(("tensorboard", "tensorboard-dir"), "give --track tensorboard"),
    "use-rslora": "give --scale-rule rslora",
    "use-dora": "give --variant dora",
    "optim": "the optimiser is AdamW",
}


def flag_hint(flag: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown flag, as the end of a message; empty if nothing is known.

    Args:
        flag: the flag as it was given, such as `--lora_alpha=8`.
        known: the flags of the command, such as `--alpha`, or the keys of a config file.

    >>> flag_hint("--lr", ["--learning-rate"]), flag_hint("--zzz", ["--rank"])
    ('; here it is --learning-rate', '')
    """
    name = flag.partition("=")[0].lstrip("-").replace("_", "-").lower()
    flags = {one.lstrip("-"): one for one in known}
    ours = flags.get(_SIMPLE.get(name, ""))
    if ours is not None:
        return f"; here it is {ours}"
    if name in _TOLD:
        return f"; {_TOLD[name]}"
    near = difflib.get_close_matches(name, list(flags), n=1, cutoff=NEAR)
    return f" (did you mean {flags[near[0]]}?)" if near else ""
