"""A small language model of two layers over bytes, trained in half a minute on the Python standard library.

Does not model language well: it is only large enough for the paper's experiments.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from brushstroke.base import Base, load_base, quiet_transformers
from brushstroke.data import Example
from brushstroke.errors import DataError, OutputError
from brushstroke.outputs import clear_leftovers, replace_folder
from brushstroke.studies.arm_run import Task
from brushstroke.studies.arms import OTHER, TASK
from brushstroke.training.schedule import factor

WIDTH, LAYERS, HEADS, INNER = 64, 2, 4, 192
WINDOW = 64  # bytes per example
STEPS, BATCH, RATE, WARMUP = 2000, 16, 3e-3, 50
LEFT_OUT = {  # folders with text of the tasks, and folders that some Python installations lack
    *("pydoc_data", "encodings", "site-packages", "dist-packages"),
    *("test", "tests", "idlelib", "__pycache__"),
}
HELD_OUT = 20  # every 20th file is held out from the model's training
SHARED = 32  # a training window has no piece of this many bytes in common with a held-out text
MADE = "made_by.json"  # file in the model's folder with its training settings
SIZES = {"train": 4096, "validation": 96, "test": 256}  # windows of a task
GENERAL = 128  # windows of Python source whose halves are not in the model's training text


def tiny_base(folder: Path, seed: int = 0) -> Base:
    """The model in the folder, trained first if the folder does not exist; float32, on the CPU.

    Raises:
        DataError: this Python has no standard library in source form.
        OutputError: the folder cannot be written, or contains another model.
    """
    how = {"width": WIDTH, "layers": LAYERS, "steps": STEPS, "seed": seed}
    if folder.is_dir():
        made = folder / MADE
        try:
            same = json.loads(made.read_text("utf-8")) == how
        except (OSError, ValueError):
            same = False
        if not same:
            raise OutputError(
                f"{folder} holds another model than the one that this study trains, by what {made} says, or "
                "does not; move it away, or choose another folder"
            )
    else:
        model = _pretrained(seed)
        clear_leftovers(folder, lambda _: True)
        with replace_folder(folder, lambda _: True) as new, quiet_transformers():
            model.save_pretrained(new)
            (new / MADE).write_text(json.dumps(how) + "\n", "utf-8")
    return Base(load_base(folder, dtype="float32", device="cpu").model, None, "a byte model of two layers")


def tasks() -> dict[str, Task]:
    """English prose (the help texts of pydoc) as the task, and character tables as the other task.

    Raises:
        DataError: this Python does not have these files.
    """
    prose = [text.encode() for text in help_texts()]
    return {
        TASK: _task("prose of Python's help", without_repeats(prose, b"\n\n")),
        OTHER: _task("tables of Python's character encodings", without_repeats(_tables(), b"\n")),
    }


def general() -> tuple[Example, ...]:
    """Python source that the model was not trained on: no half of a window is in its training text."""
    parts = list(enumerate(_sources()))
    seen = b"".join(part for index, part in parts if index % HELD_OUT)
    candidates = _windows(b"".join(part for index, part in parts if not index % HELD_OUT), 4 * GENERAL)
    new = [e for e in candidates if not any(half in seen for half in _halves(e))]
    return tuple(_spread(new, GENERAL))


def _pretrained(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    text = b"".join(part for index, part in enumerate(_sources()) if index % HELD_OUT)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=WIDTH,
                intermediate_size=INNER,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS,
                max_position_embeddings=2 * WINDOW,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        for step in range(STEPS):
            starts = torch.randint(0, len(data) - WINDOW, (BATCH,)).tolist()
            batch = torch.stack([data[start : start + WINDOW] for start in starts])
            logits = model(input_ids=batch).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = RATE * factor("linear", step, STEPS, WARMUP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _sources() -> Iterator[bytes]:
    """The contents of the standard library's files, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in _library_files("**/*.py"):
        if not set(file.relative_to(root).parts[:-1]) & LEFT_OUT:
            yield file.read_bytes()


def _library_files(*patterns: str) -> list[Path]:
    """The files of the standard library that match a pattern, sorted by name.

    Raises:
        DataError: there are none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for pattern in patterns for file in root.glob(pattern))
    if not files:
        raise DataError(f"this Python has no {patterns[0]} in {root}; use one with a full standard library")
    return files


def help_texts() -> list[str]:
    """The prose of pydoc's topics, sorted by topic. The file is parsed, not executed.

    Raises:
        DataError: this Python does not have the file.
    """
    (file,) = _library_files("pydoc_data/topics.py")
    tree = ast.parse(file.read_text("utf-8"))
    values = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(values)
    return [topics[name] for name in sorted(topics)]


def _tables() -> list[bytes]:
    files = _library_files("encodings/cp*.py", "encodings/iso8859_*.py")
    texts = [file.read_bytes() for file in files]
    return [text[text.find(b"decoding_table") :] for text in texts if b"decoding_table" in text]


def without_repeats(texts: Sequence[bytes], separator: bytes) -> list[bytes]:
    """The texts without parts that occur in an earlier text, or earlier in the same text.

    >>> without_repeats([b"a b a", b"b c"], b" ")
    [b'a b', b'c']
    """
    seen: set[bytes] = set()
    kept = []
    for text in texts:
        parts = [(part, b" ".join(part.split())) for part in text.split(separator)]
        new = []
        for part, plain in parts:
            if plain not in seen:
                seen.add(plain)
                new.append(part)
        kept.append(separator.join(new))
    return kept


def _task(name: str, texts: Sequence[bytes]) -> Task:
    """Assigns each text to one split: every tenth to validation, every tenth to the test.

    Removes training windows that share 32 bytes with a held-out text, and validation windows that share 32
    bytes with the test split.
    """
    test = b"".join(texts[5::10])
    validation = b"".join(texts[0::10])
    train = b"".join(text for index, text in enumerate(texts) if index % 10 not in (0, 5))
    of_test, of_both = _pieces(test), _pieces(validation) | _pieces(test)
    windows = _windows(train)
    split = {
        "test": list(_windows(test)),
        "validation": [e for e in _windows(validation) if of_test.isdisjoint(_pieces(bytes(e.tokens)))],
        "train": [e for e in windows if of_both.isdisjoint(_pieces(bytes(e.tokens)))],
    }
    chosen = {key: tuple(_spread(found, SIZES[key])) for key, found in split.items()}
    repeated = len(windows) - len(split["train"])
    return Task(name, chosen["train"], chosen["validation"], chosen["test"], repeated)


def _pieces(text: bytes) -> set[bytes]:
    return {text[start : start + SHARED] for start in range(len(text) - SHARED + 1)}


def _halves(example: Example) -> tuple[bytes, bytes]:
    text = bytes(example.tokens)
    return text[: WINDOW // 2], text[WINDOW // 2 :]


def _windows(text: bytes, count: int | None = None) -> list[Example]:
    """Windows that do not overlap: all of them, or `count` at even distances."""
    weights = (0.0, *[1.0] * (WINDOW - 1))
    starts = range(0, len(text) - WINDOW + 1, WINDOW)
    chosen = starts if count is None else _spread(starts, count)
    return [Example(tuple(text[start : start + WINDOW]), weights) for start in chosen]


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, at even distances."""
    return list(items) if len(items) <= count else [items[i * len(items) // count] for i in range(count)]
