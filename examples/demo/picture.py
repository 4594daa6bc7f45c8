"""Draw the README's picture, docs/demo.svg, from the results that the demo left in demo-out/."""

import json
from pathlib import Path

import page

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Read demo-out/results.json, write docs/demo.svg on a white background."""
    results = json.loads(Path("demo-out/results.json").read_text("utf-8"))
    svg = page.scores_figure(results).replace('fill="#00000000"', 'fill="#ffffff"', 1)
    (ROOT / "docs" / "demo.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
