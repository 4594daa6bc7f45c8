"""Checks that a model can be trained, and that tokenised examples fit it; errors name the row.

It changes neither the model nor the examples.
"""

import inspect
from collections.abc import Iterable

from torch import nn

from brushstroke.base import refuse_unknown_tokens, require_language_model
from brushstroke.base.model_facts import embedding_rows
from brushstroke.data import EncodedData, Example
from brushstroke.errors import ConfigError, DataError


def check_model(model: nn.Module) -> None:
    """Refuse a value that is not a model, and a model that is not a language model or allows no gradients.

    Raises:
        ConfigError: the model cannot be trained; the message says what to do.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected a Base or an nn.Module; got {type(model).__name__}: load one with load_base(...)"
        )
    require_language_model(model, getattr(model, "config", None))
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigError(
            "the model was made inside torch.inference_mode(), which allows no gradients; make it outside"
        )


def check_loss(loss: object) -> None:
    """Refuse a loss that cannot be called with three arguments.

    Raises:
        ConfigError: it cannot be called; the message says with which arguments.
    """
    try:
        fits = callable(loss) and bool(inspect.signature(loss).bind(None, None, None))
    except TypeError:
        fits = False
    except ValueError:  # a built-in or C function without a signature
        fits = True
    if not fits:
        raise ConfigError(
            f"loss must be a function of (logits, targets, weights) that returns a scalar; {loss!r} "
            "cannot be called with these arguments"
        )


def check_vocabulary(examples: Iterable[Example], model: nn.Module) -> None:
    """Refuse examples without tokens, and tokens that the model has no embedding for.

    Raises:
        DataError: it names the row.
    """
    if isinstance(examples, EncodedData):
        examples = examples.examples.suspects(embedding_rows(model))
    for example in examples:
        if not example.tokens:
            raise DataError(
                f"{_describe(example)} has no tokens; leave it out, or give it at least one trained token"
            )
        refuse_unknown_tokens(model, (min(example.tokens), max(example.tokens)), _describe(example))


def check_lengths(examples: Iterable[Example], context: int | None, max_length: int | None = None) -> None:
    """Refuse examples that need more positions than both the model's `context` and `max_length`.

    Raises:
        DataError: it names the row.
    """
    if context is None or (isinstance(examples, EncodedData) and examples.largest_reach <= context):
        return
    for example in examples:
        if example.reach > max(context, max_length or 0):
            raise DataError(
                f"{_describe(example)} needs {example.reach} positions, and the model's context has "
                f"{context}; truncate it (if the rotary frequencies depend on the length, max_length= allows "
                "more)"
            )


def _describe(example: Example) -> str:
    return f"row {example.row}" if example.row else "an example"
