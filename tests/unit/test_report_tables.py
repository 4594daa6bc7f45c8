"""Tables as CSV and LaTeX."""

import ast
import csv
import io
import re
from pathlib import Path

import pytest

import brushstroke
from brushstroke.report.tables import csv_of_records, csv_text, latex_escaped, latex_text

SPECIAL = r"#$%&_{}~^\ "


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_gives_back_every_number_and_text():
    values = [0.1 + 0.2, 1e-300, -0.0, 123456789.123456789, float("inf")]
    names = ['a,b"c', "line\nbreak", " ü ", "", "=1+1"]
    text = csv_text(["site", "norm"], zip(names, values, strict=True))
    assert [row["site"] for row in read(text)] == names
    assert [float(row["norm"]) for row in read(text)] == values


def test_records_of_different_lengths_share_columns():
    text = csv_of_records(
        [
            {"site": "q", "sigma": [2.0], "block": {"left": 0.5}, "grid": [[1.0]], "rank": None},
            {"site": "v", "sigma": [2.0, 1.0], "block": {"left": 0.25}, "grid": [[1.0]], "rank": 3},
        ]
    )
    assert text.splitlines()[0] == "site,sigma_1,sigma_2,block_left,rank"
    assert read(text)[0] == {"site": "q", "sigma_1": "2.0", "sigma_2": "", "block_left": "0.5", "rank": ""}


def test_latex_escapes_every_special_character():
    escaped = latex_escaped(SPECIAL)
    bare = re.sub(r"\\(?:[#$%&_{}]|textbackslash\{\}|textasciitilde\{\}|textasciicircum\{\})", "", escaped)
    assert bare == " "
    assert latex_escaped("模型 é") == "模型 é"


def test_latex_is_ascii_for_every_text_of_studies_and_analysis():
    """pdflatex refuses letters such as ᵀ: check every literal that a head or a caption could contain."""
    source = Path(brushstroke.__file__).parent
    files = [*source.glob("studies/*.py"), *source.glob("analysis/*.py"), source / "cli/analysis_tables.py"]
    trees = [ast.parse(file.read_text("utf-8")) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    }
    assert {"‖leftᵀ·W·right‖: ΔW", "90 % energy"} < texts
    assert [text for text in texts if not latex_escaped(text).isascii()] == []


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("-0.021 ± 0.010", r"$-0.021 \pm 0.010$"),
        ("1.2e-05", r"$1.2 \times 10^{-5}$"),
        ("3e+09 ± 1e+08", r"$3 \times 10^{9} \pm 1 \times 10^{8}$"),
        ("1,234", "$1{,}234$"),
        ("–", "--"),
        ("4,4", "$4{,}4$"),
        ("1.25 [1.2, 1.3]", "1.25 {[}1.2, 1.3]"),
        ("-0.04 [-0.2, 0.2]", r"\ensuremath{-}0.04 {[}\ensuremath{-}0.2, 0.2]"),
        ("q-1 to --2", "q-1 to --2"),
        ("[a]", "{[}a]"),
        ("< 0.0001", r"\ensuremath{<} 0.0001"),
    ],
)
def test_latex_writes_numbers_in_math_mode(cell, expected):
    lines = latex_text(["x"], [[cell]]).splitlines()
    assert lines[4] == rf"{expected} \\"


def test_columns_of_numbers_are_right_aligned():
    text = latex_text(
        ["site", "norm", "verdict"], [["q", "1.5", "intruder"], ["v", "–", "known"]], "a\nb % c"
    )
    assert text.startswith("% a\n% b % c\n\\begin{tabular}{lrl}\n")
    assert text.count("\\hline") == 3
    assert latex_text(["site"], []).splitlines()[0] == r"\begin{tabular}{l}"
