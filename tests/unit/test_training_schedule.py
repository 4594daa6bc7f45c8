"""Schedules against transformers' own."""

import pytest
import torch
from transformers import get_scheduler

from brushstroke.training.schedule import factor

KINDS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_factors_are_those_of_the_trainer(kind: str, warmup: int) -> None:
    total = 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(KINDS[kind], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert factor(kind, step, total, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
