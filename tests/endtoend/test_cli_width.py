"""Every command on terminals of 60, 80 and 200 columns: lines fit, numbers and words are complete."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cli_kit import ENVIRONMENT, PLAIN, rows, write_rows
from rich.cells import cell_len

import brushstroke as bs
from brushstroke.adapter import Adapter
from brushstroke.lowrank import LowRank

pytestmark = pytest.mark.slow
WIDTHS = (60, 80, 200)
GOLDEN = Path(__file__).parent / "golden" / "width_80.txt"
ANALYSES = ("spectrum", "compare", "relate", "intruders")
SITES = tuple(f"{name} --sites" for name in ANALYSES)
STABLE = ("show", *ANALYSES, *SITES)  # nothing of the machine is in what they say
DRIVER = """
import json, sys
from termios import tcsetwinsize
from brushstroke.cli import main
for width, commands in json.loads(sys.argv[1]):
    if width:
        tcsetwinsize(0, (50, width))
    print(f"[[{width}", flush=True)
    for words in commands:
        print(f"<<{words[0]}", flush=True)
        print(f">>{main(words)}", flush=True)
    print("]]", flush=True)
"""
TYPED = b"/quit\n"  # chat reads it
ASKS = "one>"  # chat on a terminal, before it reads
NUMBER = re.compile(r"\d[\d.,:]*(e[+-]?\d+)?")
MARKS = re.compile(r"[━╸╺│╭╮╰╯─⟦⟧]")
CUT_NAME = re.compile(r"[\w.]+…[\w.]+")
# What a reader needs of each table, however narrow the terminal is.
NEEDED = {
    "evaluate": ("loss", "match"),
    "show": ("site", "rank", "norm"),
    "spectrum": ("one holds 99 % of its energy", "matrix", "layer", "norm", "99 %", "advice"),
    "compare": ("one and two share", "matrix", "layer", "cosine", "(chance 0)", "left", "right", "φ"),
    "relate": ("one amplifies", "matrix", "layer", "amplification", "at random", "chance, outputs"),
    "intruders": ("of the 28 strongest directions", "matrix", "layer", "tested", "share of"),
    "spectrum --sites": ("site", "rank", "norm", "99 %", "layer,"),
    "compare --sites": ("site", "cosine", "φ"),
    "relate --sites": ("site", "amplification", "chance"),
    "intruders --sites": ("site", "σ", "verdict"),
    "plan": ("base", "targets", "memory", "learning rate", "stop tokens"),
    "data": ("rows", "tokens", "stop token", "lengths"),
    "generate": ("loading",),
    "chat": ("one answers;", "/help, /adapter NAME, /base"),
    "merge": ("survived", "model drift"),
    "train": ("done:", "mean loss", "the adapter is in", "evaluation after step 2"),
    "study": ("What rank is enough", "The lowest test loss"),
    "again": ("error:", "--overwrite"),
    "help": ("--no-gradient-checkpointing", "--learning-rate"),
}


class Screen:
    """What a terminal shows in the end, of the few codes that rich and cyclopts write."""

    CODE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])")

    def __init__(self, text: str) -> None:
        self.lines, self.row, self.column = [""], 0, 0
        position = 0
        while position < len(text):
            if code := self.CODE.match(text, position):
                self._obey(code[2], int(code[1]) if code[1].isdigit() else 1)
                position = code.end()
                continue
            self._put(text[position])
            position += 1

    def _obey(self, kind: str, count: int) -> None:
        if kind == "A":
            self.row = max(0, self.row - count)
        elif kind == "K":
            self.lines[self.row] = ""

    def _put(self, letter: str) -> None:
        if letter == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif letter == "\r":
            self.column = 0
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two adapters whose factors are the same everywhere."""
    folder = tmp_path_factory.mktemp("a")
    base = bs.load_base(tiny, dtype="float32", device="cpu")
    with bs.attach(base, bs.LoraConfig(rank=4)) as attachment:
        fresh = attachment.adapter()
    for name, seed in (("one", 1), ("two", 2)):
        generator = torch.Generator().manual_seed(seed)
        updates = {}
        for site, update in fresh.items():
            d, h = update.shape
            U, V = (torch.randn(shape, generator=generator) for shape in ((d, 4), (4, h)))
            updates[site] = LowRank(U, V, 0.25)
        bs.save(Adapter(updates, fresh.card), folder / name)
    return folder


@pytest.fixture(scope="module")
def commands(tiny, adapters, tmp_path_factory):
    """Name → its words, in a folder of their own."""
    data = write_rows(tmp_path_factory.mktemp("d") / "rows.jsonl", rows(40))

    def make(out):
        one, two = adapters / "one", adapters / "two"
        small = ("--max-steps", 4, "--batch-size", 4)
        grid = ("--learning-rates", "1e-3,1e-2,1e-1", "--seeds", 2, "--targets", "q_proj", "--ranks", "1,2")
        analyses = {
            "spectrum": ("spectrum", one, "--base", tiny),
            "compare": ("compare", one, two),
            "relate": ("relate", one, tiny),
            "intruders": ("intruders", one, tiny, "--top", 2),
        }
        train = ("train", tiny, data, "--out", out / "t", *PLAIN, *small)
        return {
            "plan": ("plan", tiny, data, *PLAIN),
            "data": ("data", tiny, data, "--rows", 1),
            "train": (*train, "--eval", data, "--eval-every", 2),
            "again": train,
            "evaluate": ("evaluate", tiny, data, *PLAIN, "--adapter", one, "--max-new-tokens", 2),
            "generate": ("generate", tiny, "Split 1 Oak St", *PLAIN, "--adapter", one, "--max-new-tokens", 1),
            "chat": ("chat", tiny, *PLAIN, "--adapter", one),
            "show": ("show", one),
            "merge": ("merge", tiny, one, "--out", out / "m"),
            **analyses,
            **{f"{name} --sites": (*words, "--sites") for name, words in analyses.items()},
            "spectrum --sites": (*analyses["spectrum"], "--sites", "--map", "rank99"),
            "study": ("study", "rank", tiny, data, "--out", out / "s", *small, *PLAIN, *grid),
            "help": ("train", "--help"),
        }

    return make


def run(rounds: list[tuple[int | None, list[list[str]]]]) -> str:
    """What the commands write: each round on a terminal of one width, or the only round into a pipe."""
    command = [sys.executable, "-c", DRIVER, json.dumps(rounds)]
    settings = {**ENVIRONMENT, "TERM": "xterm-256color", "TOKENIZERS_PARALLELISM": "false"}
    settings.pop("COLUMNS", None)
    if rounds[0][0] is None:
        done = subprocess.run(
            command, env=settings, input=TYPED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.stdout.decode()
    ours, theirs = pty.openpty()
    os.write(ours, TYPED * len(rounds))
    read: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                return
            if not piece:
                return
            read.append(piece)

    with subprocess.Popen(command, env=settings, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        reader = threading.Thread(target=drain)
        reader.start()
        process.wait(timeout=500)
        reader.join()
    os.close(ours)
    return b"".join(read).decode()


def split(text: str, names: list[str]) -> dict[int | None, dict[str, str]]:
    """Width → name → what was written."""
    found = {}
    for width, shown in re.findall(r"\[\[(\d+|None)\r?\n(.*?)\]\]\r?\n", text, re.DOTALL):
        parts = re.findall(r"<<\S+\r?\n(.*?)>>(\d+)", shown, re.DOTALL)
        assert [status for _, status in parts] == ["1" if name == "again" else "0" for name in names], text
        written = dict(zip(names, (part for part, _ in parts), strict=True))
        found[None if width == "None" else int(width)] = written
    return found


@pytest.fixture(scope="module")
def shown(commands, tmp_path_factory):
    """Width, or None for a pipe → name → what was written."""
    rounds = []
    for width in (*WIDTHS, None):
        words = commands(tmp_path_factory.mktemp("o"))
        rounds.append((width, [[str(word) for word in one] for one in words.values()]))
    texts = {**split(run(rounds[:-1]), list(words)), **split(run(rounds[-1:]), list(words))}
    assert texts.keys() == {*WIDTHS, None}
    return texts


def vocabulary(text: str) -> set[str]:
    """The words of a text, with one number in place of all, and without this run's folder and all marks."""
    text = re.sub(r"/\S*/(?=[tms]\b)", "", text)
    return {NUMBER.sub("0", word) for word in MARKS.sub(" ", text).split()}


def known_words(name: str, texts: dict[int | None, dict[str, str]]) -> set[str]:
    """Those that a command writes where nothing is cut, and the parts between the dots of a head."""
    words = vocabulary(texts[None][name] if name != "help" else "\n".join(Screen(texts[200][name]).lines))
    return words | {part for word in words for part in re.split(r"(?<=[a-z]\.)", word)} | {ASKS}


def zeros(line: str) -> str:
    """A line with 0 for every digit of a number; names keep theirs."""
    return re.sub(r"(?<![\w.…])\d[\d.,]*", lambda number: re.sub(r"\d", "0", number[0]), line)


def lines_without_note(text: str) -> list[str]:
    """The final text on a terminal, without the lines that name omitted columns."""
    shown = "\n".join(Screen(text).lines)
    return re.sub(r"  columns\s+left\s+out:[^;]*;\s+--json\s+has\s+all", "", shown).split("\n")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(shown, width):
    for name, text in shown[width].items():
        for line in re.split(r"[\r\n]+", Screen.CODE.sub("", text)):
            only_word = " " not in line.strip()  # such as a path: it stays whole, to be copied
            assert cell_len(line.rstrip()) <= width or only_word, (name, line)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_word_or_number_is_broken(shown, width):
    for name, text in shown[width].items():
        known = known_words(name, shown)
        for line in lines_without_note(text):
            assert not any("…" in cell for cell in re.split(r" {2,}", line.strip())[1:]), (name, line)
            broken = {word for word in vocabulary(line) - known if not CUT_NAME.fullmatch(word)}
            assert not broken, (name, line)


@pytest.mark.parametrize("width", WIDTHS)
def test_important_parts_are_shown_at_every_width(shown, width):
    for name, needed in NEEDED.items():
        text = " ".join("\n".join(Screen(shown[width][name]).lines).split())
        assert [part for part in needed if part not in text] == [], name


def test_omitted_columns_are_named_below_their_table(shown):
    said = {
        width: {name for name, text in shown[width].items() if "columns left out" in text} for width in shown
    }
    assert said == {
        60: {"show", *ANALYSES, *SITES},
        80: {"spectrum", "compare", *SITES},
        200: set(),
        None: set(),
    }
    times = {name: shown[80][name].count("columns left out") for name in ("spectrum", *SITES)}
    assert times == {"spectrum": 2, **dict(zip(SITES, (3, 3, 1, 1), strict=True))}


def test_wide_terminal_and_pipe_show_the_same(shown):
    for name in STABLE:
        lines = [line.rstrip() for line in Screen(shown[200][name]).lines]
        assert lines == [line.rstrip() for line in shown[None][name].split("\n")], name


def test_the_layout_at_80_columns(shown):
    """To write it anew: delete the file, run this test, and look at it."""
    parts = []
    for name in STABLE:
        lines = [zeros(line.rstrip()) for line in Screen(shown[80][name]).lines]
        parts += [f"# {name}", *(line for line in lines if not line.startswith("  base "))]
    found = "\n".join(parts) + "\n"
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(found, "utf-8")
        pytest.fail(f"{GOLDEN} was not there; it is written, look at it")
    assert found == GOLDEN.read_text("utf-8")
