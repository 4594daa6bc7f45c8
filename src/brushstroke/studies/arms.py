"""The arms of a study: which matrices are trained, in which form, and on which task.

Does not train (`arm_run` does).
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from brushstroke.adapter import LoraConfig
from brushstroke.checks import check_integer
from brushstroke.errors import ConfigError
from brushstroke.layers import FullFineTuning
from brushstroke.sites import Site
from brushstroke.sites.targets import matches_path, resolve_targets
from brushstroke.studies.words import listed

TASK, OTHER = "task", "other task"
WHOLE_RATE = 10  # the best rate of W is about a tenth of that of low-rank factors (Schulman et al. 2025)
RUN_KEY = re.compile(r"[\w-]*-[0-9a-f]{8}-lr[0-9.e+-]+-seed-?\d+")  # the form of `Run.key`
BUDGET_TOLERANCE = 0.05  # maximum deviation from the parameter budget, as a share of it


@dataclass(frozen=True)
class Arm:
    """One training setup that a study compares with others.

    Args:
        name: the name in tables.
        targets: patterns of the trained matrices.
        rank: of the low-rank update; None trains W (full fine-tuning).
        alpha: numerator of the scale.
        scale_rule: "standard" (alpha/rank) or "rslora" (alpha/√rank).
        task: the name of its task.
        rates: learning rates to choose from; None uses those of the study.
        dimension: train only a random subspace with this many dimensions; None trains all parameters.
        rate_of: name of the arm whose chosen learning rate this arm uses; None chooses its own.
        steps_share: share of the steps of the study's runs; the schedule is shortened to it.
        rate: the one learning rate of all runs of this arm; None chooses it from `rates`.

    Raises:
        ConfigError: the rank or the dimension is below 1.
    """

    name: str
    targets: tuple[str, ...]
    rank: int | None = 8
    alpha: float = 16.0
    scale_rule: str = "standard"
    task: str = TASK
    rates: tuple[float, ...] | None = None
    dimension: int | None = None
    rate_of: str | None = None
    steps_share: float = 1.0
    rate: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("dimension", self.dimension)):
            if value is not None:
                check_integer(name, value)

    @property
    def request(self) -> LoraConfig | FullFineTuning:
        """The training settings of this arm: full fine-tuning or LoRA."""
        return FullFineTuning(self.targets) if self.rank is None else self.lora

    @property
    def lora(self) -> LoraConfig:
        """The LoRA settings; an arm that trains W has rank 1 here, which serves to find its sites."""
        return LoraConfig(
            rank=self.rank or 1, alpha=self.alpha, targets=self.targets, scale_rule=self.scale_rule
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON types; omits `rate_of`, `steps_share` and `rate` at their defaults."""
        settings = {
            **asdict(self),
            "targets": list(self.targets),
            "rates": None if self.rates is None else list(self.rates),
        }
        for name, default in (("rate_of", None), ("steps_share", 1.0), ("rate", None)):
            if settings[name] == default:
                del settings[name]
        return settings


@dataclass(frozen=True)
class Run:
    """One training run: an arm, a learning rate, a seed."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """A name for files; two runs have the same key only if they are equal."""
        settings = self.arm.as_dict()
        for name in ("rates", "rate_of", "rate"):
            settings.pop(name, None)
        digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
        words = "".join(c if c.isalnum() else "-" for c in self.arm.name).strip("-")[:40]
        return f"{words}-{digest}-lr{exact(self.learning_rate)}-seed{self.seed}"

    @property
    def start_seed(self) -> int:
        """The seed of the starting factors, different for each arm and seed.

        Equal starts would give two ranks or tasks common directions that do not come from training.
        """
        settings = (self.arm.name, self.arm.targets, self.arm.rank, self.arm.task, self.seed)
        return int.from_bytes(hashlib.sha256(repr(settings).encode()).digest()[:4])


@dataclass(frozen=True)
class Budget:
    """Arms with the same number of trained parameters.

    Args:
        parameters: the budget.
        arms: the arms that meet the budget.
        left_out: name of a set of matrices → why it cannot meet the budget.
    """

    parameters: int
    arms: tuple[Arm, ...]
    left_out: Mapping[str, str]


def chosen_sites(targets: Iterable[str], sites: Sequence[Site]) -> list[Site]:
    """The sites that the patterns select.

    Raises:
        TargetError: a pattern that selects nothing.
    """
    chosen = resolve_targets(LoraConfig(rank=1, targets=tuple(targets)), sites).ranks
    return [site for site in sites if site.path in chosen]


def parameters_per_rank(targets: Iterable[str], sites: Sequence[Site]) -> int:
    """Σ (d + h) over the sites that the patterns select.

    Raises:
        TargetError: a pattern that selects nothing.
    """
    return sum(site.d + site.h for site in chosen_sites(targets, sites))


def equal_budget(
    sets: Mapping[str, tuple[str, ...]], sites: Sequence[Site], budget: int, alpha: float = 16.0
) -> Budget:
    """One arm for each set of matrices, with the rank that satisfies Σ r·(d + h) = budget.

    Args:
        sets: name → patterns.
        sites: the model's sites.
        budget: trained parameters of each arm.
        alpha: of all arms.

    Raises:
        TargetError: a pattern that selects nothing.
        ConfigError: no set can meet the budget.

    >>> sites = [Site("a.q", 4, 4), Site("a.v", 4, 4)]
    >>> [arm.name for arm in equal_budget({"q": ("q",), "q,v": ("q", "v")}, sites, 32).arms]
    ['q r=4', 'q,v r=2']
    """
    arms, left_out = [], {}
    for name, targets in sets.items():
        each = parameters_per_rank(targets, sites)
        rank = max(1, round(budget / each))
        largest = min(min(site.shape) for site in chosen_sites(targets, sites))
        if abs(rank * each - budget) > BUDGET_TOLERANCE * budget:
            left_out[name] = f"needs {rank * each:,} parameters at rank {rank}, the budget is {budget:,}"
        elif rank > largest:
            left_out[name] = f"would need rank {rank}, its smallest matrix allows {largest}"
        else:
            arms.append(low_rank(name, targets, rank, alpha))
    if not arms:
        reasons = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise ConfigError(
            f"no set of matrices meets a budget of {budget:,} parameters: {reasons}; choose another budget"
        )
    return Budget(budget, tuple(arms), left_out)


def low_rank(
    matrices: str, targets: tuple[str, ...], rank: int, alpha: float = 16.0, scale_rule: str = "standard"
) -> Arm:
    """An arm of one rank; all studies use the same name for it, so that it runs only once."""
    return Arm(f"{matrices} r={rank}", targets, rank, alpha, scale_rule)


def whole(matrices: str, targets: tuple[str, ...], rates: tuple[float, ...]) -> Arm:
    """The arm that trains W at these sites, at a tenth of the rates of low-rank factors."""
    return Arm(f"{matrices} W itself", targets, None, rates=two_digits([rate / WHOLE_RATE for rate in rates]))


def equal_rank(sets: Mapping[str, tuple[str, ...]], rank: int, alpha: float = 16.0) -> tuple[Arm, ...]:
    """One arm of this rank for each set of matrices."""
    return tuple(low_rank(name, targets, rank, alpha) for name, targets in sets.items())


def matrix_sets(sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """The sets of matrices of the paper's table 5, and the feed-forward block.

    Each attention matrix alone, q with k, q with v, all attention matrices, the feed-forward block, up with
    down, and all linear layers.
    """
    names: dict[str, tuple[str, ...]] = {}
    attention = _names("attention", sites)
    names |= {short(name): (name,) for name in attention}
    known = {short(name): name for name in attention}
    for pair in (("q", "k"), ("q", "v")):
        if all(part in known for part in pair):
            names[",".join(pair)] = tuple(known[part] for part in pair)
    if len(attention) > 1:
        names[",".join(map(short, attention))] = attention
    feed_forward = _names("mlp", sites)
    names |= {",".join(map(short, feed_forward)): feed_forward} if feed_forward else {}
    if "up_proj" in feed_forward and len(feed_forward) > 2:
        names["up,down"] = ("up_proj", "down_proj")
    return names | {"all": ("all-linear",)}


def matrices_name(targets: Sequence[str]) -> str:
    """The name in reports of the matrices that these patterns select.

    >>> matrices_name(("q_proj", "v_proj")), matrices_name(("all-linear",))
    ('q,v', 'all')
    """
    return ",".join("all" if target == "all-linear" else short(target) for target in targets)


def short(name: str) -> str:
    """A matrix's name without the suffix `_proj` of Llama-like models.

    >>> short("q_proj"), short("c_attn"), short("attn.c_proj")
    ('q', 'c_attn', 'attn.c_proj')
    """
    stem = name.removesuffix("_proj")
    return stem if stem in ("q", "k", "v", "o", "gate", "up", "down") else name


def rate_grid(center: float, ratio: float = math.sqrt(10), points: int = 4) -> tuple[float, ...]:
    """A logarithmic grid around a learning rate, with two significant digits if the rates stay different.

    >>> rate_grid(1e-3)
    (0.00032, 0.001, 0.0032, 0.01)
    """
    first = -((points - 1) // 2)
    return two_digits([center * ratio**k for k in range(first, first + points)])


def two_digits(rates: Sequence[float]) -> tuple[float, ...]:
    """The rates rounded to two significant digits, if they stay different.

    >>> two_digits((0.00316, 0.01)), two_digits((0.001, 0.001001))
    ((0.0032, 0.01), (0.001, 0.001001))
    """
    rounded = tuple(float(f"{rate:.1e}") for rate in rates)
    return rounded if len(set(rounded)) == len(set(rates)) else tuple(rates)


def exact(rate: float) -> str:
    """A learning rate with as few digits as identify it exactly.

    >>> exact(1e-3), exact(1.0), exact(1.0000001e-3)
    ('0.001', '1', '0.0010000001')
    """
    short = f"{rate:g}"
    return short if float(short) == rate else repr(rate)


def on_other_task(arm: Arm) -> Arm:
    """The same arm on the other task, at this arm's learning rate: the control of a task's effect."""
    return replace(arm, name=f"{arm.name}, other task", task=OTHER, rate_of=arm.name, rates=None)


def shortened(arm: Arm, share: Fraction) -> Arm:
    """The same arm, trained for a share of the steps.

    >>> shortened(low_rank("q", ("q",), 4), Fraction(1, 2)).name
    'q r=4, 1/2 of the steps'
    """
    name = f"{arm.name}, {share} of the steps"
    return replace(arm, name=name, rate_of=arm.name, rates=None, steps_share=float(share))


def _names(group: str, sites: Sequence[Site]) -> tuple[str, ...]:
    """The shortest suffixes that select the matrices of a group and no others, such as "attn.c_proj"."""
    try:
        chosen = resolve_targets(LoraConfig(rank=1, targets=(group,)), sites).ranks
    except ConfigError:
        return ()
    others = [site.path for site in sites if site.path not in chosen]
    found = []
    for path in chosen:
        parts = path.split(".")
        suffixes = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        clear = (s for s in suffixes if not any(matches_path(s, other) for other in others))
        found.append(next(clear, path))
    return tuple(dict.fromkeys(found))


def allowed_ranks(ranks: Sequence[int], targets: Sequence[str], sites: Sequence[Site]) -> list[int]:
    """The ranks, in order, that the smallest of the chosen matrices allows.

    Raises:
        ConfigError: it allows none of them.
    """
    largest = min(min(site.shape) for site in chosen_sites(targets, sites))
    allowed = [rank for rank in sorted(set(ranks)) if rank <= largest]
    if not allowed:
        raise ConfigError(f"the smallest of the matrices allows rank {largest}; give smaller ranks (--ranks)")
    return allowed


def by_rank(matrices: str, ranks: Sequence[int], planned: Sequence[str]) -> tuple[dict[int, str], list[int]]:
    """Rank → name of the planned arms, and the ranks without a planned arm, both in order."""
    wanted = {rank: f"{matrices} r={rank}" for rank in sorted(set(ranks))}
    found = {rank: name for rank, name in wanted.items() if name in planned}
    return found, [rank for rank in wanted if rank not in found]


def too_large_note(ranks: Sequence[int]) -> str:
    """The note of a report about ranks that were left out."""
    return f"Left out: {listed('rank', ranks)}, which the smallest of the matrices does not allow."
