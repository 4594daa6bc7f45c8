"""The summary of a finished run, and the card of its adapter.

It computes no metrics; it collects those of the run.
"""

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers

from brushstroke.adapter import Adapter, Card
from brushstroke.data import EncodedData
from brushstroke.training.events import Totals
from brushstroke.training.session import Training

ON_THE_CARD = (
    *("steps", "real_tokens", "trained_tokens", "final_loss", "mean_loss", "learning_rate"),
    *("dtype", "date", "examples", "data_hash", "versions"),
)


def summarise(
    session: Training, totals: Totals, identity: dict[str, Any], examples: EncodedData
) -> dict[str, Any]:
    """The content of `run.json`: totals, settings and versions."""
    internal = {"loss_sum", "best_loss", "best_step", "best_sums", "evaluated", "not_better", "schedule_from"}
    return {
        **{name: value for name, value in asdict(totals).items() if name not in internal},
        "steps": session.steps,
        "real_tokens_per_second": totals.real_tokens / totals.seconds if totals.seconds else 0.0,
        "mean_loss": totals.loss_sum / max(1, session.steps),
        "best_eval_loss": totals.best_loss if totals.best_loss < float("inf") else None,
        "dtype": identity["dtype"],
        "date": identity["date"],
        "learning_rate": session.learning_rate,
        "micro_tokens": session.micro_tokens,
        "memory": session.step.mode,
        "layout": session.step.forward_reason,
        "base": session.base.name,
        "examples": len(examples),
        "data_hash": examples.hash,
        "settings": identity,
        "versions": versions(),
    }


def card_of_run(adapter: Adapter, summary: dict[str, Any], examples: EncodedData) -> Card:
    """The card of the adapter that a run trained."""
    training = {name: summary[name] for name in ON_THE_CARD}
    card = adapter.card or Card()
    stops = tuple(dict.fromkeys((*card.stop_tokens, *examples.report.stop_tokens)))
    return card.with_changes(training=training, stop_tokens=stops)


def versions() -> dict[str, str]:
    """The versions of the packages that a run depends on."""
    try:
        installed = version("brushstroke")
    except PackageNotFoundError:
        installed = "unknown"
    return {
        "brushstroke": installed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
