"""Reads the chat template in an adapter's folder: from a separate file, or from the tokenizer's settings.

It renders no template.
"""

from importlib.resources.abc import Traversable

from brushstroke.errors import AdapterFileError
from brushstroke.files import read_json
from brushstroke.templates import one_template

TEMPLATE, OTHERS, SETTINGS = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"


def read_template(folder: Traversable) -> str | None:
    """The chat template in an adapter's folder, with which it was trained; None if there is none.

    If there are several, the result is one template that selects among them like transformers.

    Raises:
        AdapterFileError: a file that cannot be read.
    """
    file = folder / TEMPLATE
    try:
        if file.is_file():
            others = [other for other in (folder / OTHERS).iterdir() if other.name.endswith(".jinja")]
            named = {other.name[:-6]: other.read_bytes().decode("utf-8") for other in others}
            return one_template({**named, "default": file.read_bytes().decode("utf-8")})
        file = folder / SETTINGS
        stored = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(stored, list):
            return one_template({entry["name"]: entry["template"] for entry in stored})
        return stored if isinstance(stored, str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file} cannot be read ({error}); copy it again") from error
