"""Resolves target patterns to sites, ranks and scales.

It uses only descriptions of sites, not modules.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from brushstroke.adapter.config import LoraConfig
from brushstroke.errors import TargetError, did_you_mean
from brushstroke.sites.site import Other, Site

_ATTENTION_PART = re.compile(
    r"(^|[._])(attn|attention|self_?attention|cross_?attention|encdecattention)([._]|$)", re.IGNORECASE
)
_ATTENTION_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"}
_MLP_PART = re.compile(
    r"(^|[._])(mlp|ffn|feed_?forward|intermediate|ff|dense(relu|gatedact)dense)([._]|$)", re.IGNORECASE
)
_MLP_NAMES = {
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    *("fc1", "fc2", "c_fc", "w1", "w2", "w3", "linear1", "linear2"),
}


def _is_attention(path: str) -> bool:
    return bool(_ATTENTION_PART.search(path)) or path.rsplit(".", 1)[-1] in _ATTENTION_NAMES


def _is_mlp(path: str) -> bool:
    if _is_attention(path):
        return False
    bert_output = path.endswith("output.dense")
    return bool(_MLP_PART.search(path)) or path.rsplit(".", 1)[-1] in _MLP_NAMES or bert_output


GROUPS: dict[str, Callable[[str], bool]] = {
    "all-linear": lambda path: True,
    "attention": _is_attention,
    "mlp": _is_mlp,
}

REASONS = 3  # shown for one pattern that matches no site

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class TargetPlan:
    """The sites that get factors, with ranks and scales.

    Args:
        matches: pattern → paths of the sites that it selects, in model order.
        ranks: path → rank.
        scales: path → scale.
        capped: path → the requested rank, for small sites in a group that got the largest rank that fits.
        skipped: path → why it is left out: a site that groups do not select, or a weight that is not a site.
    """

    matches: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    capped: Mapping[str, int]
    skipped: Mapping[str, str]


def matches_path(pattern: str, path: str) -> bool:
    """Whether a name, a dotted suffix or a regular expression selects this path.

    >>> matches_path("q_proj", "layers.0.q_proj"), matches_path(r"layers\\.[01]\\..*", "model.layers.0.q")
    (True, True)
    """
    if path == pattern or path.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path) is not None
    except re.error:
        return False


def resolve_targets(config: LoraConfig, sites: Sequence[Site], others: Sequence[Other] = ()) -> TargetPlan:
    """Match every pattern of the config against the sites of a model.

    Args:
        config: the request.
        sites: of the model.
        others: its modules and parameters that are not sites; those that a pattern selects are listed.

    Raises:
        TargetError: patterns match nothing (all are listed, with near misses), a rank is too large for a site
            that was named explicitly, or an adapter at a named site would have no effect or learn nothing.
    """
    matches: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    named: set[str] = set()
    for pattern in config.targets:
        found = [site for site in sites if _selects(pattern, site)]
        if pattern in GROUPS:
            skipped |= {site.path: reason for site in found if (reason := _left_out_of_groups(site))}
            found = [site for site in found if site.path not in skipped]
        else:
            named.update(site.path for site in found)
        skipped |= {
            other.path: other.reason for other in others if other.has_weight and _selects(pattern, other)
        }
        matches[pattern] = tuple(site.path for site in found)
    _refuse_unmatched("target", matches, sites, others)

    selected = {path for paths in matches.values() for path in paths}
    targeted = [site for site in sites if site.path in selected]
    for site in targeted:
        skipped.pop(site.path, None)
        if reason := site.bypassed or site.frozen:
            groups = [name for name, rule in GROUPS.items() if any(rule(s.path) for s in _usable(sites))]
            advice = f", as the groups ({', '.join(groups)}) do" if groups else ""
            raise TargetError(f"{site.path} cannot be adapted: {reason}; leave it out{advice}")
    ranks = _per_site("rank_pattern", config.rank_pattern, config.rank, targeted)
    alphas = _per_site("alpha_pattern", config.alpha_pattern, config.alpha, targeted)
    capped: dict[str, int] = {}
    for site in targeted:
        largest = min(site.d, site.h)
        if ranks[site.path] <= largest:
            continue
        if site.path in named:
            raise TargetError(
                f"rank {ranks[site.path]} is larger than {site.path} allows: its weight is "
                f"{site.d}×{site.h}, "
                f"so the largest useful rank is {largest}; lower --rank or give it one in rank_pattern"
            )
        capped[site.path], ranks[site.path] = ranks[site.path], largest
    scales = {path: config.scale(ranks[path], alphas[path]) for path in ranks}
    return TargetPlan(matches, ranks, scales, capped, skipped)


def short_names(selected: Iterable[str], all_paths: Iterable[str]) -> tuple[str, ...]:
    """The shortest names that select exactly these modules under PEFT's rule (the path ends with the name).

    >>> short_names(["a.0.q", "a.1.q", "a.0.k"], ["a.0.q", "a.1.q", "a.0.k", "a.1.k"])
    ('a.0.k', 'q')
    """
    chosen = set(selected)
    everywhere: dict[str, set[str]] = {}
    for path in all_paths:
        everywhere.setdefault(path.rsplit(".", 1)[-1], set()).add(path)
    short = {path.rsplit(".", 1)[-1] for path in chosen}
    whole = {name for name in short if everywhere.get(name, set()) <= chosen}
    return tuple(sorted(whole | {path for path in chosen if path.rsplit(".", 1)[-1] not in whole}))


def _selects(pattern: str, item: Site | Other) -> bool:
    if pattern in GROUPS:
        return GROUPS[pattern](item.path) and (isinstance(item, Other) or item.in_groups)
    paths = item.paths if isinstance(item, Site) else (item.path,)
    return any(matches_path(pattern, path) for path in paths)


def _usable(sites: Iterable[Site]) -> list[Site]:
    """The sites that can be adapted."""
    return [site for site in sites if not (site.bypassed or site.frozen)]


def _left_out_of_groups(site: Site) -> str | None:
    if reason := site.bypassed or site.frozen:
        return reason
    if site.is_output:
        return "it makes the model's output; name it to adapt it"
    return f"its weight is tied to {site.tied_to}; name it to adapt it" if site.tied_to else None


def _per_site(
    kind: str, patterns: Mapping[str, Value], default: Value, sites: Sequence[Site]
) -> dict[str, Value]:
    values = {site.path: default for site in sites}
    used: dict[str, tuple[str, ...]] = dict.fromkeys(patterns, ())
    for site in sites:
        for pattern, value in patterns.items():
            if any(matches_path(pattern, path) for path in site.paths):
                values[site.path] = value
                used[pattern] = (*used[pattern], site.path)
                break
    shadowed = {
        pattern
        for pattern, paths in used.items()
        if not paths and any(matches_path(pattern, path) for site in sites for path in site.paths)
    }
    _refuse_unmatched(kind, {p: paths for p, paths in used.items() if p not in shadowed}, sites)
    return values


def _refuse_unmatched(
    kind: str,
    matches: Mapping[str, tuple[str, ...]],
    sites: Sequence[Site],
    others: Sequence[Other] = (),
) -> None:
    missing = [pattern for pattern, paths in matches.items() if not paths]
    if not missing:
        return
    lines = [
        f"{kind} {pattern!r} matches no site{_group_meant(kind, pattern)}{_instead(pattern, sites, others)}"
        for pattern in missing
    ]
    groups = f"; groups are {', '.join(GROUPS)}" if kind == "target" else ""
    raise TargetError("\n".join(lines) + f"\nthis model has {len(_usable(sites))} adaptable sites{groups}")


def _group_meant(kind: str, pattern: str) -> str:
    known = GROUPS if kind == "target" and pattern not in GROUPS else ()
    return did_you_mean(pattern, known, count=1, cutoff=0.8)


def _instead(pattern: str, sites: Sequence[Site], others: Sequence[Other]) -> str:
    """The non-sites that a pattern selects, and why they cannot be adapted; if none, the nearest names."""
    group = pattern in GROUPS
    found = {o.path: f"is {o.reason}" for o in others if _selects(pattern, o) and (o.has_weight or not group)}
    if group:
        left_out = [site for site in sites if _selects(pattern, site)]
        found |= {site.path: f"is left out: {_left_out_of_groups(site)}" for site in left_out}
    if not found:
        return f"; near it: {_near(pattern, sites)}"
    first = {reason: path for path, reason in reversed(found.items())}  # one path for each reason
    shown = [f"{path} {reason}" for reason, path in reversed(first.items())][:REASONS]
    more = [f"and {len(found) - len(shown)} more"] if len(found) > len(shown) else []
    return f": {', '.join(shown + more)}"


def _near(pattern: str, sites: Sequence[Site]) -> str:
    sites = _usable(sites)
    names = sorted({site.name for site in sites})
    near = difflib.get_close_matches(pattern, [*names, *(p for s in sites for p in s.paths)], n=4, cutoff=0.5)
    near = list(dict.fromkeys(near)) or names[:12]
    return ", ".join(near) if near else "(none at all)"
