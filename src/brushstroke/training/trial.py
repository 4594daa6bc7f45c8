"""A trial step before the first: which adapted sites would learn nothing from text.

It changes no factor and no state of the run.
"""

from collections import Counter
from collections.abc import Iterable

from brushstroke.adapter import in_all_layers
from brushstroke.step.probes import LONG, SHORT, probe_examples
from brushstroke.training.session import Training


def unlearnt_sites(session: Training) -> tuple[str, ...]:
    """What a step on two made-up examples did not reach, in words; nothing where such a step fails.

    A site that did not run is named where none of the same name in another layer, or of another expert, did.
    """
    context = session.context
    lengths = LONG if context is None or sum(LONG) <= context else SHORT
    try:
        session.forward_backward(probe_examples(session.model, lengths))
        unreached, ran = session.unreached(), {in_all_layers(path) for path in session.ran()}
    except Exception:  # whatever the model raises; the first step says it
        return ()
    finally:
        session.discard()
    idle = [path for path in session.attachment.sites if in_all_layers(path) not in ran]
    found = []
    if unreached:
        found.append(
            f"the model gives no gradient to {_listed(unreached)}: a step in which they run is an error; "
            "choose targets without them"
        )
    if idle:
        found.append(
            f"text does not run through {_listed(idle)}: they learn nothing; choose targets without them"
        )
    return tuple(found)


def _listed(paths: Iterable[str]) -> str:
    counts = Counter(map(in_all_layers, paths))
    shown = [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
