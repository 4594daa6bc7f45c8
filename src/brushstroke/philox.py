"""Random numbers of training and merging: Philox4x64-10, whose bits numpy guarantees in every version.

Key: (seed, epoch) for the order of the data, (seed, step) for dropout, (seed, hash of a tensor's name) for
rounding. The counter's highest word separates the three. It does not control what torch draws from a seed:
this may differ between versions of torch.
"""

import hashlib

import numpy as np

ORDER, DROPOUT, ROUNDING = 0, 1, 2
_PER_BLOCK = 16  # numbers of 16 bits in one block of four words


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in an epoch, found by sorting `count` random numbers.

    >>> order_of(6, seed=0, epoch=0)
    [0, 2, 1, 5, 4, 3]
    """
    return np.argsort(_draw(count, (seed, epoch), (0, 0, 0, ORDER)), kind="stable").tolist()


def dropout_seed(seed: int, step: int, call: int) -> int:
    """The seed (below 2**63) for torch's generators in one `forward_backward` call of a step."""
    return int(_draw(1, (seed, step), (0, 0, call, DROPOUT))[0] >> np.uint64(1))


def rounding_bits(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """16 random bits for each of the positions start to start + count of a tensor, as uint16.

    A position has the same bits whatever range it is drawn in.
    """
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    first, skipped = divmod(start, _PER_BLOCK)
    words = _draw(-(-(skipped + count) // 4), (seed, key), (first, 0, 0, ROUNDING))
    return words.astype("<u8", copy=False).view("<u2")[skipped : skipped + count]


def _draw(count: int, key: tuple[int, int], counter: tuple[int, int, int, int]) -> np.ndarray:
    """The first raw outputs for a key after a counter; its upper two words are those of a purpose."""
    state = {"key": np.array(key, np.uint64), "counter": np.array(counter, np.uint64)}
    return np.asarray(np.random.Philox(**state).random_raw(count))
