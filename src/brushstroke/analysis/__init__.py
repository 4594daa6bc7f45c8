"""What an adapter's numbers say: tensors in, tables out; with or without the base's weights.

It never sees a live model run, and never forms a d×h update. W comes as a mapping site → (d×h).
"""

from brushstroke.analysis.budget import Truncation, fit_budget, keep_energy
from brushstroke.analysis.spectrum import SiteSpectrum, Spectrum, spectrum
from brushstroke.analysis.table import arrange

__all__ = [
    "SiteSpectrum",
    "Spectrum",
    "Truncation",
    "arrange",
    "fit_budget",
    "keep_energy",
    "spectrum",
]
