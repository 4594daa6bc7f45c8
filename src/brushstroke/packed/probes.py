"""What a model is tried on before it is trained: made-up examples, and what its predictions depend on.

No judgement here: `select` draws the conclusions.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.base import vocabulary_size
from brushstroke.data import Example
from brushstroke.packed.pack import Row

SHORT = (9, 5, 3)  # tokens that a probe's two examples share, and of each one's own
LONG = (48, 24, 16)  # for what shows at a distance
STIRRED = 0.02  # standard deviation of what stands in for zeros: that of many models before training


class NoEmbeddings(Exception):
    """Nothing in the model looks tokens up, so that nothing can be told about what depends on them."""


def probe_rows(model: nn.Module, lengths: tuple[int, int, int] = SHORT, seed: int = 0) -> tuple[Row, Row]:
    """Two rows with a shared beginning; wanted is what predicts their own tokens but the first."""
    one, other = probe_examples(model, lengths, seed)
    return Row.of(one), Row.of(other)


def probe_examples(
    model: nn.Module, lengths: tuple[int, int, int] = SHORT, seed: int = 0
) -> tuple[Example, Example]:
    """Two examples with a shared beginning; all tokens of their own but the first are trained."""
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
    """Inside, trained tensors that are all 0 hold random numbers; afterwards they hold their own bits again.

    A factor V that is 0, or a block that begins with weights of 0, hides everything that training will let
    through it.
    """
    generator = torch.Generator().manual_seed(2)
    kept = [(tensor, tensor.detach().clone()) for tensor in trained if not bool(tensor.any())]
    try:
        with torch.no_grad():
            for tensor, _ in kept:
                tensor.copy_(STIRRED * torch.randn(tensor.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for tensor, own in kept:
                tensor.copy_(own)


@contextmanager
def capture_embeddings(model: nn.Module, tokens: int) -> Iterator[list[Tensor]]:
    """Inside, a forward pass has a graph that begins at the embeddings of a row of so many tokens.

    The list fills with them, each (…, tokens, d): those of tokens, and of positions where they are learnt.
    """
    seen: list[Tensor] = []

    def begin_here(_: nn.Module, __: object, output: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[-2] != tokens or not output.is_floating_point():
            return output
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # models may change it in place

    hooks = [m.register_forward_hook(begin_here) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with torch.enable_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def jitter_embeddings(model: nn.Module) -> Iterator[None]:
    """Inside, embeddings are as if rounded once more: about half of the numbers move by one last place."""
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
    """Whether any of these logits depends on any of these tokens; gradients are exactly 0 where none does.

    A gradient that is no number says nothing: norms have such a one at embeddings of nothing but zeros.

    Raises:
        NoEmbeddings: there are none to look at.
    """
    if not embeddings:
        raise NoEmbeddings("no embedding was seen; whether examples keep apart cannot be told")
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
    with torch.enable_grad():
        projected = (logits.float() * noise).sum()
    gradients = torch.autograd.grad(projected, embeddings, allow_unused=True)
    return any(bool(g[..., tokens, :].nan_to_num(0.0).any()) for g in gradients if g is not None)
