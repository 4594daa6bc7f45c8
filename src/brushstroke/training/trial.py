"""A trial step before the first: which adapted sites would learn nothing from text.

It changes no factor and no state of the run.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import nn

from brushstroke.packed.probes import LONG, SHORT, probe_examples
from brushstroke.sites import in_all_layers
from brushstroke.training.session import Training

TRIALS = 2  # with other tokens each: a router sends them to other experts


def unlearnt_sites(session: Training) -> tuple[str, ...]:
    """What a step on made-up examples did not reach, in words; nothing where such a step fails.

    An expert that did not run is passed over where another one of the same list did.
    """
    sites = list(session.attachment.sites)
    try:
        unreached, ran = _trial(session, seed=0)
        idle = [path for path in sites if path not in ran]
        if idle:
            trials = [ran, *(_trial(session, seed)[1] for seed in range(1, TRIALS))]
            routed, reached = _varying(session.model, trials), set().union(*trials)
            idle = [path for path in idle if path not in reached]
            idle = [path for path in idle if not _has_stand_in(session.model, path, reached, routed)]
    except Exception:  # whatever the model raises; the first step says it
        return ()
    finally:
        session.zero_grad()
    found = []
    if unreached:
        found.append(
            f"the model gives no gradient to {_listed(unreached, sites)}: a step in which they run is an "
            "error; choose targets without them"
        )
    if idle:
        found.append(
            f"text does not run through {_listed(idle, sites)}: they learn nothing; choose targets without "
            "them"
        )
    return tuple(found)


def _trial(session: Training, seed: int) -> tuple[list[str], set[str]]:
    """The sites that ran and got no gradient in a step, and those that ran."""
    context = session.context
    lengths = LONG if context is None or sum(LONG) <= context else SHORT
    session.zero_grad()
    session.forward_backward(probe_examples(session.model, lengths, seed))
    return session.unreached(), set(session.ran())


def _has_stand_in(model: nn.Module, path: str, ran: set[str], routed: set[str]) -> bool:
    """Whether a site belongs to one of several experts, and its twin in another one ran."""
    for holder, _, rest in _choices(model, path):
        if holder in routed or _has_router(model, holder):
            twins = (f"{holder}.{other}{rest}" for other, _ in model.get_submodule(holder).named_children())
            return any(twin in ran for twin in twins)
    return False


def _varying(model: nn.Module, trials: list[set[str]]) -> set[str]:
    """The lists of modules of which other tokens reach other members: the model chooses among them."""
    members = [
        {(holder, member) for path in ran for holder, member, _ in _choices(model, path)} for ran in trials
    ]
    return {holder for a, b in pairwise(members) for holder, _ in a ^ b}


def _choices(model: nn.Module, path: str) -> Iterator[tuple[str, str, str]]:
    """Each list above a site, with the member in which the site lies and the path from there."""
    parts = path.split(".")
    for i in range(1, len(parts)):
        holder = ".".join(parts[:i])
        if isinstance(model.get_submodule(holder), nn.ModuleList | nn.ModuleDict):
            yield holder, parts[i], "".join(f".{part}" for part in parts[i + 1 :])


def _has_router(model: nn.Module, holder: str) -> bool:
    """Whether a weight beside a list gives one number for each of its members."""
    count = len(list(model.get_submodule(holder).children()))
    beside = model.get_submodule(holder.rpartition(".")[0]).children()
    routers = [m for m in beside if not isinstance(m, nn.ModuleList | nn.ModuleDict | nn.Embedding)]
    return any(p.ndim == 2 and len(p) == count for module in routers for p in module.parameters())


def _listed(paths: Iterable[str], sites: Iterable[str]) -> str:
    """Those of the same name in several layers as one, with their number; where others learn, of how many."""
    paths = list(paths)
    counts, known = Counter(map(in_all_layers, paths)), Counter(map(in_all_layers, sites))
    alone = {in_all_layers(path): path for path in paths}
    shown = []
    for name, count in counts.items():
        of = "" if count == known[name] else f" of {known[name]}"
        shown.append(alone[name] if count == 1 else f"{name} ({count}{of})")
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
