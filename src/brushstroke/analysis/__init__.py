"""Analyses of adapters, with or without the base's weights: tensors in, tables out.

Does not run a model and does not form a d×h update. W is a mapping site → (d×h).
"""

from brushstroke.analysis.budget import Truncation, fit_budget, keep_energy
from brushstroke.analysis.directions import DirectionCache, Directions
from brushstroke.analysis.intruders import Direction, Intruders, SiteIntruders, intruders, repair
from brushstroke.analysis.relate import Relation, Share, SiteRelation, mean_deciles, relate
from brushstroke.analysis.spectrum import SiteSpectrum, Spectrum, spectrum
from brushstroke.analysis.subspace import Overlap, SiteOverlap, Unmatched, random_pair, subspace
from brushstroke.analysis.table import Grid, SiteTable, arrange, as_plain, natural

__all__ = [
    "Direction",
    "DirectionCache",
    "Directions",
    "Grid",
    "Intruders",
    "Overlap",
    "Relation",
    "Share",
    "SiteIntruders",
    "SiteOverlap",
    "SiteRelation",
    "SiteSpectrum",
    "SiteTable",
    "Spectrum",
    "Truncation",
    "Unmatched",
    "arrange",
    "as_plain",
    "fit_budget",
    "intruders",
    "keep_energy",
    "mean_deciles",
    "natural",
    "random_pair",
    "relate",
    "repair",
    "spectrum",
    "subspace",
]
