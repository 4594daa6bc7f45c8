"""The settings of a new adapter.

Does not resolve targets to sites (`sites` does) and does not create tensors (`layers` does).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from brushstroke.checks import check_choice, check_integer, check_number
from brushstroke.errors import ConfigError, refuse_unknown
from brushstroke.lowrank.init import INITS

SCALE_RULES = {
    "standard": lambda alpha, rank: alpha / rank,  # arXiv:2106.09685, section 4.1
    "rslora": lambda alpha, rank: alpha / rank**0.5,  # arXiv:2312.03732, equation 1
}


MAX_ALPHA = 3.4028234663852886e38  # of float32


@dataclass(frozen=True)
class LoraConfig:
    """The settings of a new low-rank adapter.

    Args:
        rank: r of every site, unless `rank_pattern` sets another.
        alpha: numerator of the scale, unless `alpha_pattern` sets another.
        targets: "all-linear", "attention", "mlp", module names, path suffixes or regular expressions; one,
            or a sequence of them. Each must match at least one site.
        scale_rule: "standard" for alpha/rank, "rslora" for alpha/√rank.
        dropout: probability on the input of the low-rank path.
        rank_pattern: pattern → rank; the first pattern that matches a site is used.
        alpha_pattern: pattern → alpha; the first pattern that matches a site is used.
        init: rule for the starting U, "kaiming" or "gaussian"; V starts at zero.
        variant: type of the update, "lora" for scale·U·V.

    Raises:
        ConfigError: a value is invalid; the message names it.

    >>> LoraConfig(rank=4, targets=["q_proj", "v_proj"]).scale(4, 16)
    4.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    scale_rule: str = "standard"
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: str = "kaiming"
    variant: str = "lora"

    def __post_init__(self) -> None:
        named: Any = self.targets
        targets = (named,) if isinstance(named, str) else tuple(named) if isinstance(named, Iterable) else ()
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ConfigError(f"targets must name at least one pattern, such as 'all-linear'; got {named!r}")
        object.__setattr__(self, "targets", targets)
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ConfigError(f"{name} must map patterns to numbers; got {pattern!r}")
            object.__setattr__(self, name, dict(pattern))
        for where, rank in [
            ("rank", self.rank),
            *((f"rank_pattern {k!r}", v) for k, v in self.rank_pattern.items()),
        ]:
            check_integer(where, rank)
        for where, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern {k!r}", v) for k, v in self.alpha_pattern.items()),
        ]:
            check_number(where, alpha, above=0, at_most=MAX_ALPHA)
        check_number("dropout", self.dropout, at_least=0, below=1)
        check_choice("scale_rule", self.scale_rule, SCALE_RULES)
        check_choice("init", self.init, INITS)

    def scale(self, rank: int, alpha: float) -> float:
        """The factor that multiplies U·V at a site of this rank and alpha."""
        return SCALE_RULES[self.scale_rule](alpha, rank)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {**dataclasses.asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "LoraConfig":
        """The inverse of `as_dict`.

        Raises:
            ConfigError: a key is unknown, or a value is invalid.
        """
        refuse_unknown(settings, (field.name for field in dataclasses.fields(cls)), "a LoRA config")
        return cls(**settings)
