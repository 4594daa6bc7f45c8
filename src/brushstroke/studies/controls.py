"""Controls for shared directions: the principal directions of the layers' inputs in the base.

Does not compare them with updates (`seeds` does).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from brushstroke.base import Base
from brushstroke.data import Example
from brushstroke.packed.pack import Row
from brushstroke.packed.select import select_forward
from brushstroke.sites.walk import site_module

EXAMPLES = 64  # number of examples whose activations are used
MICRO_TOKENS = 1024


@torch.no_grad()
def principal_inputs(
    base: Base, sites: Sequence[str], examples: Sequence[Example], k: int
) -> dict[str, Tensor]:
    """The top k principal directions (d×k, float64) of the inputs of each site, over the first examples.

    Args:
        base: the model without an adapter.
        sites: module paths.
        examples: at most the first 64 are run.
        k: the number of directions; at most the width of the site.
    """
    moments: dict[str, tuple[Tensor, Tensor, int]] = {}
    model = base.model.eval()
    forward, _ = select_forward(model, share=False)
    rows = [Row.of(example) for example in examples[:EXAMPLES]]
    with forward.context(), _recorded_moments(model, sites, moments):
        for part in forward.passes(rows, MICRO_TOKENS, False):
            forward.logits(part)
    found = {}
    for site, (second, first, count) in moments.items():
        mean = first / count
        covariance = second / count - torch.outer(mean, mean)
        found[site] = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k].cpu()
    return found


@contextmanager
def _recorded_moments(
    model: torch.nn.Module, sites: Sequence[str], moments: dict[str, tuple[Tensor, Tensor, int]]
) -> Iterator[None]:
    """Context manager: accumulates the second and first moments of every site's input."""

    def record(site: str):
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            second, first, count = moments.get(site, (0.0, 0.0, 0))
            moments[site] = (second + x.mT @ x, first + x.sum(0), count + len(x))

        return hook

    handles = [site_module(model, site).register_forward_pre_hook(record(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
