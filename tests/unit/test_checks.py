"""Checks of an adapter and a base from the headers of their files, and cases that headers cannot decide."""

import pytest

from brushstroke.checks import check_stored
from brushstroke.errors import ShapeError

SITES = {f"model.layers.{n}.mlp.up_proj": (32, 48) for n in (0, 1)}


def keys(form: str = "model.layers.{}.mlp.up_proj.weight", shape: tuple[int, ...] = (48, 32), count: int = 2):
    return {form.format(n): shape for n in range(count)}


@pytest.mark.parametrize(
    "stored",
    [
        {},
        keys(),
        keys(count=5),
        keys(shape=(32, 48)),
        keys("layers.{}.mlp.up_proj.weight"),
        keys("base.model.layers.{}.mlp.up_proj.weight"),
        keys("transformer.blocks.{}.fc.weight"),
        keys("model.layers.{}.mlp.gate_up_proj.weight", (96, 32)),
        {**keys("vision.layers.{}.mlp.up_proj.weight", (9, 7)), **keys("text.layers.{}.mlp.up_proj.weight")},
        {**keys(count=1), "model.layers.1.norm.weight": (32,)},
        {**keys(), "model.layers.0.mlp.up_proj.bias": (48,)},
    ],
    ids=[
        "nothing is known",
        "as it is",
        "more layers",
        "Conv1D",
        "without the prefix",
        "with another prefix",
        "renamed",
        "fused",
        "two stacks",
        "a layer whose weight is tied",
        "a bias",
    ],
)
def test_bases_that_may_fit_are_not_refused(stored):
    check_stored(SITES, stored)


@pytest.mark.parametrize(
    ("stored", "reported"),
    [
        (keys(shape=(64, 32)), r"layers.0.mlp.up_proj: W must be .* = \(32, 48\); the base's is \(32, 64\)"),
        (keys("layers.{}.mlp.up_proj.weight", (48, 30)), r"the base's is \(30, 48\)"),
        (keys(count=1), r"lacks at least 1 of 2 adapted sites.*\n  model.layers.1.mlp.up_proj"),
        (keys("layers.{}.mlp.up_proj.weight", count=1), "lacks at least 1 of 2"),
        (keys("transformer.h.{}.mlp.c_fc.weight", (64, 256)), "lacks at least 2 of 2"),
    ],
    ids=["wider", "narrower", "fewer layers", "fewer, without the prefix", "another width"],
)
def test_bases_that_cannot_fit_are_refused(stored, reported):
    with pytest.raises(ShapeError, match=reported):
        check_stored(SITES, stored)
