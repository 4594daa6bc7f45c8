"""Checkpoints: factors, optimiser state and counters in safetensors and JSON, written atomically.

They contain no random states: the order of the data and dropout depend only on the seed and the step
(`philox`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes

from brushstroke.errors import ResumeError
from brushstroke.files import read_json, read_tensors
from brushstroke.layers import TrainableAttachment
from brushstroke.outputs import OpenFolder, OwnFiles, clear_leftovers, has_keys, open_folder, replace_files

STATE, TENSORS = "state.json", "state.safetensors"
STATE_KEYS = {"format", "steps", "micro_tokens", "learning_rate", "extra"}
OWN_FILES = OwnFiles(
    (STATE, TENSORS), {STATE: has_keys(*STATE_KEYS)}, (STATE,)
)  # in the order in which they are removed
FORMAT = 3
OTHER_FORMATS = {2: " (its data order and dropout come from another random generator)"}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Resumable(Protocol):
    """The parts of a training session that a checkpoint stores."""

    attachment: TrainableAttachment
    optimizer: torch.optim.Optimizer
    steps: int
    micro_tokens: int
    learning_rate: float


def save_session(session: Resumable, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write the state of a training session into its own folder; replaces a checkpoint in it.

    Raises:
        OutputError: it cannot be written; no partial checkpoint is left.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in session.attachment.named_parameters():
        tensors[f"factor.{name}"] = parameter.detach().cpu()
        for moment, value in session.optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}.{name}"] = value.detach().cpu()
    content = to_bytes(tensors)
    state = {
        "format": FORMAT,
        "steps": session.steps,
        "micro_tokens": session.micro_tokens,
        "learning_rate": session.learning_rate,
        "extra": dict(extra or {}),
        "tensors": hashlib.sha256(content).hexdigest(),
    }
    files = {TENSORS: content, STATE: json.dumps(sealed(state), indent=2) + "\n"}
    clear_leftovers(folder, OWN_FILES.names.__contains__)
    replace_files(folder, files, last=STATE, owned=OWN_FILES.names)


def load_session(session: Resumable, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into a session with the same base, sites and ranks; returns its extra fields.

    Raises:
        ResumeError: the checkpoint is damaged or belongs to another adapter.
    """
    try:
        with open_folder(folder) as opened:
            state = read_state(opened)
            content = (opened / TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != state["tensors"]:
            raise damaged(folder, f"the checksum of {TENSORS} does not match")
        tensors = read_tensors(content)
    except (OSError, SafetensorError) as error:
        raise damaged(folder, str(error)) from error
    named = dict(session.attachment.named_parameters())
    expected = {f"factor.{name}": tuple(p.shape) for name, p in named.items()}
    found = {key: tuple(t.shape) for key, t in tensors.items() if key.startswith("factor.")}
    if expected != found:
        differing = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        raise ResumeError(
            f"the checkpoint {folder} belongs to another adapter: {len(differing)} factors differ, such as "
            f"{differing[0]} (shape {expected.get(differing[0])} in this session, {found.get(differing[0])} "
            "in the checkpoint)"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"factor.{name}"])
            moments = {m: tensors[f"{m}.{name}"] for m in MOMENTS if f"{m}.{name}" in tensors}
            if moments:
                on_device = {m: t if m == "step" else t.to(parameter.device) for m, t in moments.items()}
                if session.optimizer.defaults.get("fused"):
                    on_device["step"] = on_device["step"].to(parameter.device)
                session.optimizer.state[parameter] = on_device
    session.steps, session.micro_tokens = state["steps"], state["micro_tokens"]
    session.learning_rate = state["learning_rate"]
    return state["extra"]


def read_state(folder: Path | OpenFolder) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ResumeError: it is missing, damaged, or has the format of another version.
    """
    try:
        state = read_json(folder / STATE)
    except (OSError, ValueError) as error:
        raise damaged(folder, str(error)) from error
    state = state if isinstance(state, dict) else {}
    if state.get("format", FORMAT) != FORMAT:
        found = f"{state['format']!r}{OTHER_FORMATS.get(state['format'], '')}"
        raise ResumeError(
            f"the checkpoint {folder} has format {found}; this version reads {FORMAT}: continue with the "
            "version that wrote it, or start over with overwrite (--overwrite)"
        )
    if state != sealed(state):
        raise damaged(folder, f"{STATE} is incomplete or its checksum does not match")
    return state


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with the checksum of its other fields, which detects damage to any of them."""
    fields = {name: value for name, value in state.items() if name != "sum"}
    return {**fields, "sum": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}


def damaged(folder: Path | OpenFolder, why: str) -> ResumeError:
    """The error for a checkpoint that cannot be resumed."""
    return ResumeError(
        f"the checkpoint {folder} is damaged ({why}); remove it to use an earlier one, or start over with "
        "overwrite (--overwrite)"
    )
