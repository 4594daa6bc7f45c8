"""Runs a trial step before the first step, to find adapted sites that text would not train.

It changes no factors and no state of the run.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import nn

from brushstroke.packed.probes import LONG, SHORT, probe_examples
from brushstroke.sites import in_all_layers
from brushstroke.training.session import Training

TRIALS = 2  # each with other tokens, which a router may send to other experts


def unlearnt_sites(session: Training) -> tuple[str, ...]:
    """Warnings about sites that a step on generated examples did not reach; empty if such a step fails.

    An expert that did not run is not reported if another expert of the same list ran.
    """
    sites = list(session.attachment.sites)
    try:
        unreached, ran = _trial(session, seed=0)
        idle = [path for path in sites if path not in ran]
        if idle:
            trials = [ran, *(_trial(session, seed)[1] for seed in range(1, TRIALS))]
            routed, reached = _routed_lists(session.model, trials), set().union(*trials)
            idle = [path for path in idle if path not in reached]
            idle = [path for path in idle if not _other_expert_ran(session.model, path, reached, routed)]
    except Exception:  # the first step of the run raises the same error
        return ()
    finally:
        session.zero_grad()
    found = []
    if unreached:
        found.append(
            f"the model gives no gradient to {_listed(unreached, sites)}: a step in which they run raises "
            "an error; choose targets without them"
        )
    if idle:
        found.append(
            f"text does not run through {_listed(idle, sites)}: they are not trained; choose targets "
            "without them"
        )
    return tuple(found)


def _trial(session: Training, seed: int) -> tuple[list[str], set[str]]:
    """The sites that ran but got no gradient in a step, and all sites that ran."""
    context = session.context
    lengths = LONG if context is None or sum(LONG) <= context else SHORT
    session.zero_grad()
    session.forward_backward(probe_examples(session.model, lengths, seed))
    return session.unreached(), set(session.ran())


def _other_expert_ran(model: nn.Module, path: str, ran: set[str], routed: set[str]) -> bool:
    """Whether a site belongs to one of several experts, and the same site of another expert ran."""
    for holder, _, rest in _enclosing_lists(model, path):
        if holder in routed or _has_router(model, holder):
            twins = (f"{holder}.{other}{rest}" for other, _ in model.get_submodule(holder).named_children())
            return any(twin in ran for twin in twins)
    return False


def _routed_lists(model: nn.Module, trials: list[set[str]]) -> set[str]:
    """The module lists whose running members depend on the tokens: the model routes among them."""
    members = [
        {(holder, member) for path in ran for holder, member, _ in _enclosing_lists(model, path)}
        for ran in trials
    ]
    return {holder for a, b in pairwise(members) for holder, _ in a ^ b}


def _enclosing_lists(model: nn.Module, path: str) -> Iterator[tuple[str, str, str]]:
    """Each module list that contains a site, with the member that contains it, and the rest of the path."""
    parts = path.split(".")
    for i in range(1, len(parts)):
        holder = ".".join(parts[:i])
        if isinstance(model.get_submodule(holder), nn.ModuleList | nn.ModuleDict):
            yield holder, parts[i], "".join(f".{part}" for part in parts[i + 1 :])


def _has_router(model: nn.Module, holder: str) -> bool:
    """Whether a sibling of a list has a weight with one row for each of its members (a router)."""
    count = len(list(model.get_submodule(holder).children()))
    siblings = model.get_submodule(holder.rpartition(".")[0]).children()
    routers = [m for m in siblings if not isinstance(m, nn.ModuleList | nn.ModuleDict | nn.Embedding)]
    return any(p.ndim == 2 and len(p) == count for module in routers for p in module.parameters())


def _listed(paths: Iterable[str], sites: Iterable[str]) -> str:
    """Paths as text; the same site in several layers is one entry with its count (of the total)."""
    paths = list(paths)
    counts, known = Counter(map(in_all_layers, paths)), Counter(map(in_all_layers, sites))
    full_paths = {in_all_layers(path): path for path in paths}
    shown = []
    for name, count in counts.items():
        of = "" if count == known[name] else f" of {known[name]}"
        shown.append(full_paths[name] if count == 1 else f"{name} ({count}{of})")
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
