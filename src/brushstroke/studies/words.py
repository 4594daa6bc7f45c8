"""Formats counts and lists for the sentences of a study, with singular and plural.

Does not use studies.
"""

from collections.abc import Sequence


def counted(count: int, one: str, many: str = "") -> str:
    """A count with its noun.

    >>> counted(1, "run"), counted(3, "run"), counted(2, "matrix", "matrices")
    ('1 run', '3 runs', '2 matrices')
    """
    return f"{count} {one if count == 1 else many or one + 's'}"


def listed(one: str, names: Sequence[object]) -> str:
    """A noun with the names of several things.

    >>> listed("seed", [2]), listed("seed", [1, 2])
    ('seed 2', 'seeds 1, 2')
    """
    return f"{one if len(names) == 1 else one + 's'} {', '.join(map(str, names))}"
