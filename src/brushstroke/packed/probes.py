"""Probes of a model before training: artificial examples, and which tokens its predictions depend on.

It makes no decision from the results; `select` does.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.base import vocabulary_size
from brushstroke.data import Example
from brushstroke.packed.pack import Row

SHORT = (9, 5, 3)  # lengths of a probe: the shared prefix, then the rest of each of the two examples
LONG = (48, 24, 16)  # for effects that need a distance between tokens
STIRRED = 0.02  # standard deviation of the numbers that replace zeros, common at initialisation of models


class NoEmbeddings(Exception):
    """The model has no embedding, so the probe cannot check which tokens its outputs depend on."""


def probe_rows(model: nn.Module, lengths: tuple[int, int, int] = SHORT, seed: int = 0) -> tuple[Row, Row]:
    """Two rows with a shared prefix; positions that predict all but the first token after it are wanted."""
    one, other = probe_examples(model, lengths, seed)
    return Row.of(one), Row.of(other)


def probe_examples(
    model: nn.Module, lengths: tuple[int, int, int] = SHORT, seed: int = 0
) -> tuple[Example, Example]:
    """Two examples with a shared prefix; all tokens after it except the first are trained."""
    vocabulary = vocabulary_size(model) or 16
    prefix, *own = lengths
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, vocabulary, (prefix,), generator=generator).tolist()
    rows = [
        Example(
            (*shared, *torch.randint(0, vocabulary, (count,), generator=generator).tolist()),
            (0.0,) * (prefix + 1) + (1.0,) * (count - 1),
        )
        for count in own
    ]
    return rows[0], rows[1]


@contextmanager
def perturb_zeros(trained: Iterable[Tensor]) -> Iterator[None]:
    """Context manager: fill trained tensors that are all 0 with random numbers; restore them bit for bit.

    A factor V of 0, or a block that starts with weights of 0, blocks dependencies that appear during
    training.
    """
    generator = torch.Generator().manual_seed(2)
    kept = [(tensor, tensor.data) for tensor in trained if not bool(tensor.any())]
    try:
        for tensor, own in kept:
            tensor.data = (STIRRED * torch.randn(own.shape, generator=generator)).to(own)
        yield
    finally:
        for tensor, own in kept:
            tensor.data = own


@contextmanager
def capture_embeddings(model: nn.Module, tokens: int) -> Iterator[list[Tensor]]:
    """Context manager: forward passes of a row of `tokens` tokens start their graph at the embeddings.

    The list collects the embeddings, each (…, tokens, d): of the tokens, and of learnt positions if any.
    """
    seen: list[Tensor] = []

    def begin_here(_: nn.Module, __: object, output: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[-2] != tokens or not output.is_floating_point():
            return output
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # some models change it in place

    hooks = [m.register_forward_hook(begin_here) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with torch.enable_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def jitter_embeddings(model: nn.Module) -> Iterator[None]:
    """Context manager: change about half of the numbers of embeddings by one unit in the last place."""
    generator = torch.Generator().manual_seed(3)

    def nudge(_: nn.Module, __: object, output: Tensor) -> Tensor:
        if not output.is_floating_point():
            return output
        up = torch.randint(0, 2, output.shape, generator=generator).to(output.device, output.dtype)
        return output * (1 + up * torch.finfo(output.dtype).eps)

    hooks = [m.register_forward_hook(nudge) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def depends(logits: Float[Tensor, "m v"], embeddings: Sequence[Tensor], tokens: slice) -> bool:
    """Whether any of these logits depends on any of these tokens; if not, gradients are exactly 0.

    Gradients that are nan are ignored: norms produce them for embeddings of zeros.

    Raises:
        NoEmbeddings: no embeddings were captured.
    """
    if not embeddings:
        raise NoEmbeddings("no embedding ran; cannot check whether examples are independent")
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
    with torch.enable_grad():
        projected = (logits.float() * noise).sum()
    gradients = torch.autograd.grad(projected, embeddings, allow_unused=True)
    return any(bool(g[..., tokens, :].nan_to_num(0.0).any()) for g in gradients if g is not None)
