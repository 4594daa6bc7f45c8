"""How often the comparisons of a study claim a difference that is none, and how often they find one.

2,000 simulated studies of each kind are judged by the library's own procedures, and by those that were
considered: paired t-tests under Holm, and Tukey's and Dunnett's procedures at their usual 5 % with one
variance for all arms. It takes well under a minute; the seeds are fixed:

    python benchmarks/study_statistics.py > docs/results/study_statistics.md
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import combinations

import numpy as np
from scipy import stats

from brushstroke.studies.comparisons import (
    DUNNETT,
    TUKEY,
    Procedure,
    dunnett_p,
    own_variances,
    pair_errors,
    t_at,
    tukey_p,
)

STUDIES = 2000
# arms and seeds; the procedures were chosen by the first
SIZES = ((9, 3), (9, 5), (6, 5), (3, 3), (9, 2), (12, 3), (20, 3))
GAP = 4.0  # of one pair, in residual standard deviations
PLAIN_TUKEY = Procedure("Tukey", partial(t_at, tukey_p, 0.05), tukey_p)
PLAIN_DUNNETT = Procedure("Dunnett", partial(t_at, dunnett_p, 0.05), dunnett_p)
Draw = Callable[[np.random.Generator, int, int, int], np.ndarray]


def normal(variances: Callable[[int], np.ndarray]) -> Draw:
    """Normal residuals whose variances by arm are a function of the number of arms."""

    def draw(rng: np.random.Generator, studies: int, arms: int, seeds: int) -> np.ndarray:
        found = variances(arms)
        return rng.standard_normal((studies, arms, seeds)) * np.sqrt(found / found.mean())[:, None]

    return draw


def larger(share: float) -> Draw:
    """Variances of 4 in a share of the arms, the first ones, at least in one; of 1 in the others."""
    return normal(lambda arms: np.where(np.arange(arms) < max(1, round(share * arms)), 4.0, 1.0))


def heavy(rng: np.random.Generator, studies: int, arms: int, seeds: int) -> np.ndarray:
    """Student's t with 3 degrees of freedom, to variance 1."""
    return rng.standard_t(3, (studies, arms, seeds)) / 3**0.5


KINDS: dict[str, Draw] = {
    "equal variances": normal(np.ones),
    "variance 4 in one arm, the reference, 1 elsewhere": larger(0),
    "variance 4 in a third of the arms, 1 elsewhere": larger(1 / 3),
    "variance 4 in half of the arms, 1 elsewhere": larger(1 / 2),
    "variance 1 in one arm, 4 elsewhere": normal(lambda arms: np.where(np.arange(arms) < 1, 1.0, 4.0)),
    "variances evenly from 1 to 4": normal(lambda arms: np.linspace(1.0, 4.0, arms)),
    "heavy tails: t with 3 degrees of freedom": heavy,
}


def judged(values: np.ndarray, procedure: Procedure, *, one_variance: bool = False) -> np.ndarray:
    """Which pairs of each study are called apart, (studies, arms, seeds) → (studies, pairs).

    The pairs are all of them; for a procedure of Dunnett's those with the first arm.
    """
    arms, seeds = values.shape[-2:]
    first, second = _pairs(arms, procedure)
    own = own_variances(values)
    if one_variance:
        own = np.broadcast_to(own.mean(-1, keepdims=True), own.shape)
    means = values.mean(-1)
    t = np.abs(means[:, first] - means[:, second]) / pair_errors(own, first, second, seeds)
    return t > procedure.quantile(arms, (arms - 1) * (seeds - 1))


def holm_paired(values: np.ndarray) -> np.ndarray:
    """The same by paired t-tests of all pairs under Holm's correction."""
    arms, seeds = values.shape[-2:]
    first, second = _pairs(arms, TUKEY)
    gaps = values[:, first] - values[:, second]
    p = 2 * stats.t.sf(np.abs(gaps.mean(-1)) / (gaps.std(-1, ddof=1) / seeds**0.5), seeds - 1)
    order = np.argsort(p, axis=1)
    allowed = 0.05 / np.arange(p.shape[1], 0, -1)
    passed = np.logical_and.accumulate(np.take_along_axis(p, order, 1) < allowed, axis=1)
    found = np.empty_like(passed)
    np.put_along_axis(found, order, passed, 1)
    return found


def _pairs(arms: int, procedure: Procedure) -> tuple[list[int], list[int]]:
    chosen = list(combinations(range(arms), 2))
    if procedure.name == "Dunnett":
        chosen = [pair for pair in chosen if pair[0] == 0]
    return [first for first, _ in chosen], [second for _, second in chosen]


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "paired t, Holm": holm_paired,
    "plain Tukey, 5 %": lambda values: judged(values, PLAIN_TUKEY, one_variance=True),
    "**Tukey, as studies use it**": lambda values: judged(values, TUKEY),
    "plain Dunnett, 5 %": lambda values: judged(values, PLAIN_DUNNETT, one_variance=True),
    "**Dunnett, as studies use it**": lambda values: judged(values, DUNNETT),
}


@cache
def rates(draw: Draw, arms: int, seeds: int) -> tuple[list[float], list[float]]:
    """For each method: how many null studies name any pair, and how many name the one true pair.

    The true pair is the first arm and the last.
    """
    rng = np.random.default_rng([arms, seeds, 26])
    null, apart = draw(rng, STUDIES, arms, seeds), draw(rng, STUDIES, arms, seeds)
    apart[:, 0] += GAP / 2
    apart[:, -1] -= GAP / 2
    errors, powers = [], []
    for method in METHODS.values():
        errors.append(float(method(null).any(1).mean()))
        found = method(apart)
        true = arms - 2  # of the pairs that begin with the first arm, the last
        powers.append(float(found[:, true].mean()))
    return errors, powers


def table(kinds: dict[str, Draw], arms: int, seeds: int) -> list[str]:
    """A Markdown table: error and power of each method under each kind of residuals."""
    lines = [f"| {arms} arms × {seeds} seeds | {' | '.join(METHODS)} |", "|---" * (1 + len(METHODS)) + "|"]
    for name, draw in kinds.items():
        cells = [
            f"{100 * error:.1f} / {100 * power:.0f}"
            for error, power in zip(*rates(draw, arms, seeds), strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the page."""
    print(f"""# How studies compare arms: the simulation

Written by `benchmarks/study_statistics.py`. {STUDIES:,} studies of each kind. Each cell has the family-wise
error (per cent of the studies without any difference in which some pair is called apart) and, after the
stroke, the power (per cent of the studies with one pair {GAP:g} residual standard deviations apart that name
this pair: the first arm and the last). The mean variance of the arms is 1. An error of 5 % has a standard
error of {100 * (0.05 * 0.95 / STUDIES) ** 0.5:.1f} %.""")
    for arms, seeds in SIZES:
        print("\n" + "\n".join(table(KINDS, arms, seeds)))


if __name__ == "__main__":
    main()
