"""Hand-labelled lines as conversations: the prompt is a line, the answer a JSON object of its labelled parts.

The keys of an answer are the labels of the data set, in the order of their first occurrence. The words of a
repeated label are joined by one space. A value is the text of the line, without commas at its end, which only
separate the parts.
"""

import json
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, list[dict[str, str]]]

INSTRUCTIONS = {
    "addresses": "Split this address into JSON:\n",
    "people": "Split this name into JSON:\n",
    "companies": "Split this company into JSON:\n",
}
HELD_OUT = 64
SEED = 20


@dataclass(frozen=True)
class Task:
    """The rows of one task.

    Args:
        name: "addresses", "people" or "companies".
        training: training rows, shuffled with a seed.
        heldout: rows for evaluation; none of their lines is in `training`.
    """

    name: str
    training: tuple[Row, ...]
    heldout: tuple[Row, ...]


def read_task(name: str, file: Path, *, held_out: int = HELD_OUT, seed: int = SEED) -> Task:
    """Read a labelled XML file and hold out rows. The same seed holds out the same rows first."""
    rows = [conversation(name, line, parts) for line, parts in labelled_lines(file).items()]
    random.Random(seed).shuffle(rows)
    return Task(name, training=tuple(rows[held_out:]), heldout=tuple(rows[:held_out]))


def labelled_lines(file: Path) -> dict[str, dict[str, str]]:
    """Map each line to its labelled parts. A repeated line counts once, with its first labels."""
    lines: dict[str, dict[str, str]] = {}
    for element in ElementTree.parse(file).getroot():
        parts: dict[str, str] = {}
        for token in element:
            text = " ".join("".join(token.itertext()).split())
            if text:
                parts[token.tag] = f"{parts[token.tag]} {text}" if token.tag in parts else text
        parts = {label: text.rstrip(", ") for label, text in parts.items() if text.rstrip(", ")}
        line = " ".join("".join(element.itertext()).split())
        if line and parts:
            lines.setdefault(line, parts)
    return lines


def conversation(name: str, line: str, parts: dict[str, str]) -> Row:
    """A row for a `messages` file."""
    return {
        "messages": [
            {"role": "user", "content": INSTRUCTIONS[name] + line},
            {"role": "assistant", "content": json.dumps(parts, ensure_ascii=False)},
        ]
    }


def prompt_of(row: Row) -> list[dict[str, str]]:
    """The messages before the answer."""
    return row["messages"][:-1]


def line_of(row: Row, name: str) -> str:
    """The raw line of a row."""
    return row["messages"][0]["content"].removeprefix(INSTRUCTIONS[name])


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """Write rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
