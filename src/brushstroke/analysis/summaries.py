"""The summary of each analysis: the measures that it averages, and a sentence with the result.

Computes only totals and means.
"""

from collections.abc import Iterable, Mapping

from brushstroke.analysis.intruders import Intruders, SiteIntruders
from brushstroke.analysis.relate import Relation
from brushstroke.analysis.spectrum import Spectrum
from brushstroke.analysis.subspace import Overlap
from brushstroke.analysis.summary import Measure, Summary, average, summary
from brushstroke.analysis.text_tables import number

ENDS = {"left": "input", "right": "output"}  # side → the kind of its directions


def spectrum_summary(name: str, found: Spectrum) -> Summary:
    """Norms and ranks of an adapter; the ranks ignore sites with a zero update."""
    based = any(row.norm_base is not None for row in found.values())
    measures = [
        Measure("norm", "norm", lambda row: row.norm, form=".4g"),
        *[Measure("relative_norm", "‖ΔW‖/‖W‖", lambda row: row.relative_norm)] * based,
        Measure("stable_rank", "stable", lambda row: row.stable_rank or None),
        Measure("effective_rank", "effective", lambda row: row.effective_rank or None),
        Measure("energy_rank_99", "99 %", lambda row: row.energy_rank(0.99) or None),
    ]
    return summary(_spectrum_sentence(name, found), measures, found)


def overlap_summary(names: tuple[str, str], found: Overlap) -> Summary:
    """The overlap of two adapters: cosine, and φ(r, r) for the smaller rank r."""
    cosine = Measure("cosine", "cosine", lambda row: row.cosine, 0.0, form=".3f")
    sides = {
        side: Measure(
            side,
            f"{side} φ",
            lambda row, side=side: row.block()[side],
            lambda row, side=side: row.block()[f"chance_{side}"],
            f"{side} chance",
            ".3f",
        )
        for side in found.sides
    }
    return summary(_overlap_sentence(names, found, sides), [cosine, *sides.values()], found)


def relation_summary(name: str, found: Relation) -> Summary:
    """The amplification of an adapter in its base, and that of a random update of the same norm and rank."""
    measures = [
        Measure(
            "amplification",
            "amplification",
            lambda row: row.amplification,
            lambda row: row.amplification_random,
            "at random",
        ),
        Measure("ratio_to_chance", "ratio", lambda row: row.ratio_to_chance, 1.0),
    ]
    return summary(_relation_sentence(name, found), measures, found)


def intruder_summary(name: str, found: Intruders) -> Summary:
    """The numbers of intruders, of undecided directions, and of all checked directions."""
    measures = [
        Measure("directions", "tested", lambda row: len(row.directions), counted=True),
        Measure("intruders", "intruders", lambda row: row.count(), counted=True),
        Measure("undecided", "undecided", lambda row: row.count("undecided"), counted=True),
        Measure("share", "share of tested", _share_of_intruders),
    ]
    return summary(_intruder_sentence(name, found), measures, found)


def _overlap_sentence(names: tuple[str, str], found: Overlap, sides: Mapping[str, Measure]) -> str:
    zero = len(found.unmatched.zero)
    if not found:
        return (
            f"{names[0]} and {names[1]} have nothing to compare: at {_all_sites(zero)} one update "
            "or both are zero. A zero update has no directions, so φ is undefined, and the cosine too."
        )
    shared = []
    for side, measure in sides.items():
        one = average(measure, found.values())
        shared.append(f"{one.mean:.3f} of their {ENDS[side]} directions (chance {one.chance:.3f})")
    cosine = ""
    if found.cosine is not None:
        cosine = f"; their cosine is {found.cosine:z.4f} (chance 0)"
    return (
        f"{names[0]} and {names[1]} share {' and '.join(shared)}, on average over {_sites(len(found))}"
        f"{_zero(zero)}{cosine}."
    )


def _spectrum_sentence(name: str, found: Spectrum) -> str:
    needed = [row.energy_rank(0.99) for row in found.values() if row.norm]
    if not needed:
        return f"{name} changes nothing: its update is zero at {_all_sites(len(found))}."
    mean = sum(needed) / len(needed)
    rank = f"rank {needed[0]}" if len({*needed}) == 1 else f"rank {mean:.3g} on average ({_span(needed)})"
    whole = sum(row.norm_base**2 for row in found.values() if row.norm_base is not None) ** 0.5
    relative = f", {found.norm / whole:.3g} of ‖W‖" if whole else ""
    return (
        f"{name} holds 99 % of its energy in {rank} of {_span(row.rank for row in found.values())}, over "
        f"{_sites(len(needed))}{_zero(len(found) - len(needed))}; ‖ΔW‖ is {found.norm:.4g}{relative}."
    )


def _relation_sentence(name: str, found: Relation) -> str:
    totals = found.totals()
    if totals["amplification"] is None:
        return f"{name} amplifies nothing: its update is zero at {_all_sites(len(found))}."
    count = len(found) - len(totals["zero"])
    if totals["ratio_to_chance"] is None:
        return f"{name} amplifies nothing: W is zero at {_all_sites(count)}{_zero(len(totals['zero']))}."
    return (
        f"{name} amplifies what W does in its directions {number(totals['amplification'])} times (a random "
        f"update of its norms and ranks: {number(totals['amplification_random'])}), and W does there "
        f"{number(totals['ratio_to_chance'])} times what it does in random directions (chance 1), over "
        f"{_sites(count)}{_zero(len(totals['zero']))}."
    )


def _intruder_sentence(name: str, found: Intruders) -> str:
    totals, places = found.totals(), sum(row.count() > 0 for row in found.values())
    strongest = f"of the {totals['directions']} strongest directions of W + {name}"
    meaning = f"(|cosine| below {found.threshold:g} with every singular vector of W)"
    if count := totals["intruders"]:
        text = f"{count} {strongest} are intruders {meaning}, at {places} of {_sites(len(found))}"
    else:
        text = f"None {strongest} is an intruder {meaning}, at {_all_sites(len(found))}"
    return f"{text}; {totals['undecided']} undecided." if totals["undecided"] else f"{text}."


def _share_of_intruders(row: SiteIntruders) -> float | None:
    return row.count() / len(row.directions) if row.directions else None


def _span(values: Iterable[int]) -> str:
    least, most = min(known := [*values]), max(known)
    return str(least) if least == most else f"{least} to {most}"


def _sites(count: int) -> str:
    return f"{count} site{'' if count == 1 else 's'}"


def _all_sites(count: int) -> str:
    return f"all {count} sites" if count > 1 else "its one site"


def _zero(count: int) -> str:
    return f" ({count} more {'are' if count > 1 else 'is'} zero)" if count else ""
