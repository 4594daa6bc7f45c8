"""What two runs would share without having learnt the same task: directions of the layers' own inputs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from brushstroke.base import Base
from brushstroke.data import Example
from brushstroke.packed.pack import Row
from brushstroke.packed.select import select_forward
from brushstroke.sites.walk import site_module

EXAMPLES = 64  # whose activations are looked at
MICRO_TOKENS = 1024


@torch.no_grad()
def principal_inputs(
    base: Base, sites: Sequence[str], examples: Sequence[Example], k: int
) -> dict[str, Tensor]:
    """The top k principal directions (d×k, float64) of what enters each site, over some examples.

    Args:
        base: the untouched model.
        sites: module paths.
        examples: the first of them are run.
        k: directions, at most the width of the site.
    """
    moments: dict[str, tuple[Tensor, Tensor, int]] = {}
    model = base.model.eval()
    forward, _ = select_forward(model, share=False)
    rows = [Row.of(example) for example in examples[:EXAMPLES]]
    with forward.context(), _watched(model, sites, moments):
        for part in forward.passes(rows, MICRO_TOKENS, False):
            forward.logits(part)
    found = {}
    for site, (second, first, count) in moments.items():
        mean = first / count
        covariance = second / count - torch.outer(mean, mean)
        found[site] = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k].cpu()
    return found


@contextmanager
def _watched(
    model: torch.nn.Module, sites: Sequence[str], moments: dict[str, tuple[Tensor, Tensor, int]]
) -> Iterator[None]:
    """Inside, the second and first moments of every site's input add up."""

    def watch(site: str):
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            second, first, count = moments.get(site, (0.0, 0.0, 0))
            moments[site] = (second + x.mT @ x, first + x.sum(0), count + len(x))

        return hook

    handles = [site_module(model, site).register_forward_pre_hook(watch(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
