"""How much of the long tests runs: a seeded sample or a small form in `make test`, all of it in `make sweep`.

A test with two forms has the marker `sweep`, by which `make sweep` chooses it.
"""

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SEED = int(os.environ.get("BRUSHSTROKE_TEST_SEED", "0"))
WHOLE = bool(os.environ.get("BRUSHSTROKE_SWEEP"))


def sample(every: Sequence[T], count: int) -> list[T]:
    """All of them in `make sweep`; in `make test`, `count` of them, chosen by the seed."""
    return list(every) if WHOLE else random.Random(SEED).sample(every, count)
