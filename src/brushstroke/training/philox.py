"""The random numbers of a run: Philox4x64-10, for which numpy guarantees the same bits in every version.

Key: (seed, epoch) for the order of the data, (seed, step) for dropout. The counter's highest word separates
the two. It does not control what torch draws from a seed: this may differ between versions of torch.
"""

import numpy as np

ORDER, DROPOUT = 0, 1


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in an epoch, found by sorting `count` random numbers.

    >>> order_of(6, seed=0, epoch=0)
    [0, 2, 1, 5, 4, 3]
    """
    return np.argsort(_draw(count, seed, epoch, (0, ORDER)), kind="stable").tolist()


def dropout_seed(seed: int, step: int, call: int) -> int:
    """The seed (below 2**63) for torch's generators in one `forward_backward` call of a step."""
    return int(_draw(1, seed, step, (call, DROPOUT))[0] >> np.uint64(1))


def _draw(count: int, seed: int, index: int, high: tuple[int, int]) -> np.ndarray:
    """The first raw outputs for the key (seed, index); `high` are the upper words of the counter."""
    key, counter = np.array([seed, index], np.uint64), np.array([0, 0, *high], np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count))
