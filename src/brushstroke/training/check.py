"""Whether a model can be trained, and on these tokenised examples; what is wrong is told with its row.

It changes neither.
"""

import inspect
from collections.abc import Iterable

from torch import nn

from brushstroke.base import refuse_unknown_tokens, require_language_model
from brushstroke.data import Example
from brushstroke.errors import ConfigError, DataError


def check_model(model: nn.Module) -> None:
    """Refuse what is no model, a model that does not predict the next token, one without gradients.

    Raises:
        ConfigError: saying what to do.
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
    """Refuse what cannot be called as a loss.

    Raises:
        ConfigError: saying how it is called.
    """
    try:
        fits = callable(loss) and bool(inspect.signature(loss).bind(None, None, None))
    except TypeError:
        fits = False
    except ValueError:  # a function of another language tells no signature
        fits = True
    if not fits:
        raise ConfigError(
            f"loss must be a function of (logits, targets, weights) that gives a scalar; {loss!r} cannot be "
            "called so"
        )


def check_vocabulary(examples: Iterable[Example], model: nn.Module) -> None:
    """Refuse examples without tokens, and tokens that the model has no embedding for.

    Raises:
        DataError: naming the row.
    """
    for example in examples:
        if not example.tokens:
            raise DataError(
                f"{_place(example)} has no tokens; leave it out, or give it at least one trained token"
            )
        refuse_unknown_tokens(model, (min(example.tokens), max(example.tokens)), _place(example))


def check_lengths(examples: Iterable[Example], context: int | None, max_length: int | None = None) -> None:
    """Refuse examples that need more positions than both the model's `context` has and `max_length` grants.

    Raises:
        DataError: naming the row.
    """
    if context is None:
        return
    for example in examples:
        if example.reach > max(context, max_length or 0):
            raise DataError(
                f"{_place(example)} needs {example.reach} positions, and the model's context has {context}; "
                "cut it (where its rotary frequencies follow the length, max_length= grants more)"
            )


def _place(example: Example) -> str:
    return f"row {example.row}" if example.row else "an example"
