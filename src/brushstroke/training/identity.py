"""The identity of a run (settings, data, base), which a resumed run must match.

Large parts are stored as hashes. It reads and writes no files.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.adapter.fingerprint import sample_positions
from brushstroke.data import EncodedData
from brushstroke.errors import ResumeError
from brushstroke.training.session import Training
from brushstroke.training.setup import RunRequest

PLAIN = ("dtype", "device", "dropout", "columns", "loss", "date")  # a message gives their values
LENGTH = ("max_steps", "epochs")  # settings of how long a run is
NAMES = {
    "base": "the base model",
    "tokens": "the tokenised data",
    "eval_tokens": "the tokenised evaluation data",
}


def identify(
    session: Training,
    request: RunRequest,
    date: str | None,
    examples: EncodedData,
    held_out: EncodedData | None,
) -> dict[str, Any]:
    """The identity of a run as JSON types; `date` is the date that its chat template prints."""
    config, lora, start, loss = request.config, request.lora, request.start, request.loss
    return {
        "lora": (lora or LoraConfig()).as_dict() if start is None else None,
        "start": _hash_adapter(start) if start is not None else None,
        "dropout": lora.dropout if lora else 0.0,
        "config": {name: value for name, value in config.as_dict().items() if name != "date"},
        "date": date,
        "base": hash_base(session.model, session.parameters),
        "dtype": str(session.base.dtype).removeprefix("torch."),
        "device": session.device.type,
        "data": examples.hash,
        "tokens": examples.examples.hash,
        "eval_data": held_out.hash if held_out is not None else None,
        "eval_tokens": held_out.examples.hash if held_out is not None else None,
        "columns": [request.prompt_column, request.completion_column],
        "loss": getattr(loss, "__qualname__", type(loss).__name__) if loss else None,
    }


def refuse_other_run(now: dict[str, Any], then: dict[str, Any], where: Path) -> None:
    """Check that two identities belong to the same run.

    Raises:
        ResumeError: they differ; the message names all differences.
    """
    if missing := [NAMES.get(key, key) for key in now if key not in then]:
        raise ResumeError(
            f"{where} was written by another version of brushstroke, which did not record "
            f"{', '.join(missing)}; continue with that version, or start over with overwrite (--overwrite)"
        )
    differences = []
    for key, value in now.items():
        if isinstance(value, dict) and isinstance(then[key], dict):
            stored = json.loads(json.dumps(value))
            differences += [
                f"{name}: now {stored.get(name)!r}, then {then[key].get(name)!r}"
                for name in stored
                if stored.get(name) != then[key].get(name)
            ]
        elif value == then[key] or (key == "base" and now["dtype"] != then["dtype"]):
            continue  # another dtype changes the base's hash, and is reported on its own
        elif key in PLAIN:
            differences.append(f"{key}: now {value!r}, then {then[key]!r}")
        else:
            differences.append(f"{NAMES[key]} changed" if key in NAMES else f"another {key}")
    if differences:
        unique = dict.fromkeys(differences)  # dropout is a setting of the adapter and of the run
        raise ResumeError(
            f"{where} belongs to a run with other settings ({'; '.join(unique)}); resume with "
            "the same command, or start over with overwrite (--overwrite)"
        )


def is_longer(now: dict[str, Any], steps: int, finished: dict[str, Any]) -> bool:
    """Whether a run of this many steps is a finished one (by its summary) with more steps or epochs."""
    new, old = now["config"], finished["settings"].get("config", {})
    if new["max_steps"] is not None:
        longer = new["max_steps"] > (old.get("max_steps") or 0)
    else:
        longer = old.get("max_steps") is None and new["epochs"] > old.get("epochs", 0)
    return longer and steps > finished["steps"]


def with_length_of(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An identity with the steps and epochs of another."""
    return {**then, "config": {**then["config"], **{name: now["config"][name] for name in LENGTH}}}


def hash_base(model: torch.nn.Module, factors: Iterable[torch.Tensor]) -> str:
    """A hash of the name, shape, dtype and up to 256 values of every parameter except the adapter's."""
    digest, skipped = hashlib.sha256(), {id(factor) for factor in factors}
    for name, parameter in model.named_parameters():
        if id(parameter) in skipped:
            continue
        _, positions = sample_positions(1, parameter.numel())
        values = parameter.detach().reshape(-1)[positions.to(parameter.device)].cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash_adapter(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for site, update in sorted(adapter.items()):
        digest.update(f"{site} {getattr(update, 'scale', None)}".encode())
        for tensor in update.tensors().values():
            digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()
