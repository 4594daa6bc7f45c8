"""The command that makes a study in an empty folder, for its report.

Does not parse flags (`study` does).
"""

import shlex
from collections.abc import Sequence

OF_ONE_SESSION = ("--reread", "--no-reread", "--overwrite", "--no-overwrite")
BUDGET = "--budget-minutes"


def study_command(words: Sequence[str], budget_minutes: float | None) -> str:
    """The given command without the flags of one session, and with the time budget of the study's plan.

    Args:
        words: the words after `brushstroke`.
        budget_minutes: of the plan; None if it had none.

    >>> study_command(["study", "rank", "b", "d", "--out", "o", "--reread", "--budget-minutes", "5"], 60.0)
    'brushstroke study rank b d --out o --budget-minutes 60'
    """
    kept, skip = [], False
    for word in words:
        flag = word.partition("=")[0]
        if not skip and flag not in (*OF_ONE_SESSION, BUDGET):
            kept.append(word)
        skip = word == BUDGET and not skip
    budget = [] if budget_minutes is None else [BUDGET, f"{budget_minutes:.12g}"]
    return shlex.join(["brushstroke", *kept, *budget])
