"""Copies the files of a base's folder other than weights (config, tokenizer, templates), or lists them.

It does not write weights; `stream` and transformers do.
"""

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from brushstroke.errors import BaseLoadError
from brushstroke.files import read_json

TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".tflite",
)
_OF_DOWNLOADS = (".git", ".gitattributes", ".cache")  # no part of a model: neither copied nor named


def copy_beside(folder: Path, target: Path, merged: Collection[str]) -> tuple[str, ...]:
    """Copy all files that are not weights; returns the names of those that are left out.

    Left out are weights in a form that was not merged, hidden files and folders, and links to folders.

    Args:
        folder: the base's.
        target: the folder of the merged model.
        merged: the names of the files whose weights are merged, and of their index.
    """
    left = []
    for path in _entries(folder):
        name = str(path.relative_to(folder))
        if name in merged or path.name in _OF_DOWNLOADS:
            continue
        if path.name.startswith(".") or path.name.endswith((*WEIGHTS, ".index.json")) or not path.is_file():
            left.append(name)
        else:
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return tuple(left)


def loaded_files(folder: Path) -> set[str]:
    """The files of a folder from which transformers loads the weights, and their index.

    Raises:
        BaseLoadError: the index is damaged.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return {single}
        if index.is_file():
            with _base_errors(index.name):
                return {index.name, *read_json(index)["weight_map"].values()}
    return set()


def save_template(folder: Path, template: str) -> bool:
    """Replace the base's default chat template by the adapter's; returns whether they differed.

    An adapter's template is also for rows with tools. The base's template "tool_use", which transformers
    would use for them, is therefore removed; templates with other names stay.

    Raises:
        BaseLoadError: the base's are damaged.
    """
    settings = folder / TOKENIZER_CONFIG
    if not settings.is_file():
        return False
    own = folder / TEMPLATE
    with _base_errors(TOKENIZER_CONFIG):
        config = read_json(settings)
        stored = config.get("chat_template")
        named = {entry["name"]: entry["template"] for entry in stored} if isinstance(stored, list) else {}
    with _base_errors(TEMPLATE):
        before = own.read_text("utf-8") if own.is_file() else named.get("default", stored)
    if template == before:
        return False
    own.write_text(template, "utf-8")
    (folder / TEMPLATES / "tool_use.jinja").unlink(missing_ok=True)
    for name, text in named.items():  # transformers ignores those in the settings if there is a file
        other = folder / TEMPLATES / f"{name}.jinja"
        if name not in ("default", "tool_use") and Path(name).name == name and not other.exists():
            other.parent.mkdir(exist_ok=True)
            other.write_text(text, "utf-8")
    if config.pop("chat_template", None) is not None:
        settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return True


def save_stop_tokens(folder: Path, texts: Collection[str]) -> tuple[str, ...]:
    """Add the tokens that end an adapter's answers to those at which plain transformers stops.

    Args:
        folder: a model's, whose generation_config.json is written.
        texts: of the tokens; texts that are not one added token of the tokenizer are ignored.

    Returns:
        The texts that were added.

    Raises:
        BaseLoadError: a file of the base is damaged.
    """
    file = folder / GENERATION
    if not texts or not (folder / TOKENIZER).is_file():
        return ()
    with _base_errors(TOKENIZER):
        tokenizer = read_json(folder / TOKENIZER)
        known = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
    with _base_errors(GENERATION):
        model = read_json(folder / CONFIG)
        defaults = {key: model[key] for key in _GENERATION_KEYS if model.get(key) is not None}
        settings = read_json(file) if file.is_file() else defaults
        stops = settings.get("eos_token_id", defaults.get("eos_token_id"))
        stops = [stops] if isinstance(stops, int) else list(stops or ())
        added = {text: known[text] for text in texts if text in known and known[text] not in stops}
    if added:
        settings["eos_token_id"] = [*stops, *added.values()]
        file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return tuple(added)


@contextmanager
def _base_errors(name: str) -> Iterator[None]:
    """Context manager: an error from invalid contents of a base's file becomes one that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseLoadError(f"{name} of the base is damaged ({error}); fetch the base again") from error


def _entries(folder: Path) -> Iterator[Path]:
    """Every file, and as one whole each link to a folder and each hidden folder."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _entries(path)
        else:
            yield path
