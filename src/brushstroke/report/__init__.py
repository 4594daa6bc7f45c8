"""Reports: figures as SVG, and self-contained HTML pages.

It computes nothing; callers pass tables, texts and series.
"""

from brushstroke.report.figures import bars, curves, heatmap
from brushstroke.report.page import Page

__all__ = ["Page", "bars", "curves", "heatmap"]
