"""How much of an adapter's gain a merged model keeps: the losses of base, adapted and merged model.

All three compute in fp32, so that only the rounding of the merged weights differs.
"""

import dataclasses
import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.base import Base, load_base
from brushstroke.inference.evaluate import evaluate
from brushstroke.layers import attach


@dataclass(frozen=True)
class GainKept:
    """Losses on the same rows, in nats per trained token.

    Args:
        rows: number of rows.
        base: the loss of the base.
        adapted: with the adapter attached.
        merged: of the merged model.
    """

    rows: int
    base: float
    adapted: float
    merged: float

    @property
    def kept(self) -> float | None:
        """(base − merged) / (base − adapted); None if the adapter gains nothing on these rows."""
        gain = self.base - self.adapted
        return (self.base - self.merged) / gain if gain > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**dataclasses.asdict(self), "kept": self.kept}


def gain_kept(
    base: str | Path,
    adapter: Adapter,
    merged: str | Path,
    data: Any,
    *,
    allow_different_base: bool = False,
    trust_remote_code: bool = False,
) -> GainKept:
    """The losses of a base, with an adapter and with the adapter merged into it, on a data set.

    All rows are written with the chat template that the adapter was trained with.

    Args:
        base: a model folder, a `.gguf` file or a hub id.
        adapter: the adapter.
        merged: the folder of the merged model.
        data: any data that `read_rows` or `encode` accepts.
        allow_different_base: use the adapter although its fingerprint belongs to another base.
        trust_remote_code: run code that is part of the models' folders.

    Raises:
        DataError: rows that cannot be read, do not fit the model's context, or have no trained token.
    """
    load = partial(load_base, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    template = adapter.card.chat_template if adapter.card else None

    def measured(model: Base) -> tuple[int, float]:
        found = evaluate(model, data, generate=False, chat_template=template)
        assert found.loss is not None  # rows without a trained token are refused
        return found.rows, found.loss

    loaded = load(base)
    tokenizer, (rows, before) = loaded.tokenizer, measured(loaded)
    with attach(loaded, adapter, allow_different_base=allow_different_base):
        _, adapted = measured(loaded)
    del loaded
    gc.collect()
    _, after = measured(Base(load(merged).model, tokenizer))
    return GainKept(rows, before, adapted, after)
