"""Chooses the examples of each step: a seeded shuffle, every example once per epoch.

It has no state: any step can be computed at any time, so a checkpoint does not store it.
"""

import math
from collections.abc import Sequence

from brushstroke.data import Example
from brushstroke.philox import order_of


class BatchSampler:
    """The batches of a run.

    Args:
        examples: the data.
        batch_size: examples per step; the last step of an epoch has the remaining ones.
        seed: for the shuffle.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the data."""
        return math.ceil(len(self._examples) / self._batch_size)

    def steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimiser steps of a run."""
        return max_steps if max_steps is not None else max(1, math.ceil(epochs * self.steps_per_epoch))

    def batch(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = order_of(len(self._examples), self._seed, epoch)
            self._epoch = epoch
        chosen = self._permutation[index * self._batch_size : (index + 1) * self._batch_size]
        return [self._examples[i] for i in chosen]
