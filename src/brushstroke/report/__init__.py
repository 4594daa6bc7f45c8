"""Results for people: figures as SVG and one self-contained HTML page.

It computes nothing: it is given tables, texts and series.
"""

from brushstroke.report.figures import bars, curves, heatmap
from brushstroke.report.page import Page

__all__ = ["Page", "bars", "curves", "heatmap"]
