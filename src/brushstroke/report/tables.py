"""Tables as text for other programs: CSV with full precision, and LaTeX that needs no package.

It rounds nothing and does not depend on the contents of the tables.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"[-−+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?( ± (\d[\d,]*\.?\d*)(e[-+]?\d+)?)?")
_MINUS = re.compile(r"(?<![\w.-])-(?=\.?\d)")
_MATH = {
    "±": r"\pm",
    "−": "-",
    "×": r"\times",
    "·": r"\cdot",
    "‖": r"\Vert",
    "√": r"\surd",
    "≤": r"\le",
    "≥": r"\ge",
    "≈": r"\approx",
    "→": r"\to",
    "∞": r"\infty",
    "Δ": r"\Delta",
    "Σ": r"\Sigma",
    "α": r"\alpha",
    "σ": r"\sigma",
    "φ": r"\varphi",
    "²": "^2",
    "ᵀ": "^T",
    "ᵢ": "_i",
    "<": "<",
    ">": ">",
    "|": "|",
    **{digit: f"_{number}" for number, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}
_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "…": r"\dots{}",
    "[": "{[}",  # after \\, a bracket or star would begin an argument
    "*": "{*}",
    "\n": " ",
    "\N{NO-BREAK SPACE}": "~",
    **{special: f"\\{special}" for special in "#$%&_{}"},
    **{sign: rf"\ensuremath{{{command}}}" for sign, command in _MATH.items()},
}


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as CSV; missing values are empty cells.

    >>> csv_text(["site", "norm"], [["a,b", 0.1], ["c", None]])
    'site,norm\\n"a,b",0.1\\nc,\\n'
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()


def csv_of_records(records: Sequence[Mapping[str, Any]]) -> str:
    """Format JSON objects as CSV, one row each: nested names and list items are columns, grids are left out.

    >>> csv_of_records([{"site": "q", "norm": {"mean": 2.0}, "sigma": [3.0, 1.0]}])
    'site,norm_mean,sigma_1,sigma_2\\nq,2.0,3.0,1.0\\n'
    """
    rows = [_flat(record) for record in records]
    columns = [*dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)]
    return csv_text(columns, [[row.get(name) for name in columns] for row in rows])


def latex_text(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    r"""Format a table as a `tabular` environment; special characters are escaped, numbers are in math mode.

    >>> print(latex_text(["site", "norm"], [["q_proj", "-0.5"]]), end="")
    \begin{tabular}{lr}
    \hline
    site & norm \\
    \hline
    q\_proj & $-0.5$ \\
    \hline
    \end{tabular}
    """
    cells = [[str(cell) for cell in row] for row in rows]
    sides = "".join("r" if _is_numeric([row[at] for row in cells]) else "l" for at in range(len(columns)))
    lines = [" & ".join(map(_cell, row)) + r" \\" for row in cells]
    comments = [f"% {line}" for line in caption.splitlines()]
    head = " & ".join(map(latex_escaped, columns)) + r" \\"
    return "\n".join(
        [
            *comments,
            rf"\begin{{tabular}}{{{sides}}}",
            r"\hline",
            head,
            r"\hline",
            *lines,
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


def latex_escaped(text: str) -> str:
    r"""Escape a text for LaTeX; non-ASCII letters remain, because LaTeX reads UTF-8.

    >>> latex_escaped("‖ΔW‖ of q_proj, 90 %")
    '\\ensuremath{\\Vert}\\ensuremath{\\Delta}W\\ensuremath{\\Vert} of q\\_proj, 90 \\%'
    """
    return "".join(_ESCAPED.get(letter, letter) for letter in text)


def _cell(text: str) -> str:
    if not _NUMBER.fullmatch(text):
        return _MINUS.sub(r"\\ensuremath{-}", latex_escaped(text))
    plain = text.replace("−", "-").replace("±", r"\pm").replace(",", "{,}")
    return "$" + re.sub(r"e([-+]?)0*(\d+)", _power, plain) + "$"


def _power(found: re.Match[str]) -> str:
    return rf" \times 10^{{{found[1].replace('+', '')}{found[2]}}}"


def _is_numeric(cells: Sequence[str]) -> bool:
    return bool(cells) and all(_NUMBER.fullmatch(cell) or cell in ("–", "", "inf") for cell in cells)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}_{inner}": part for inner, part in _flat(value).items()}
        elif not isinstance(value, list):
            found[name] = value
        elif not any(isinstance(part, list | Mapping) for part in value):
            found |= {f"{name}_{number}": part for number, part in enumerate(value, 1)}
    return found
