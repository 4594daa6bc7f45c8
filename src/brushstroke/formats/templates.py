"""The chat template beside an adapter: in a file of its own, or in the settings of a tokenizer.

It renders nothing.
"""

from pathlib import Path

from brushstroke.adapter import one_template
from brushstroke.errors import AdapterFileError
from brushstroke.files import read_json

TEMPLATE, OTHERS, SETTINGS = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"


def read_template(folder: Path) -> str | None:
    """The chat template that an adapter was trained with, as far as its folder tells.

    Where there are several, it is one that chooses between them as transformers does.

    Raises:
        AdapterFileError: a file that cannot be read.
    """
    file = folder / TEMPLATE
    try:
        if file.is_file():
            others = sorted((folder / OTHERS).glob("*.jinja"))
            named = {other.stem: other.read_bytes().decode("utf-8") for other in others}
            return one_template({**named, "default": file.read_bytes().decode("utf-8")})
        file = folder / SETTINGS
        stored = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(stored, list):
            return one_template({entry["name"]: entry["template"] for entry in stored})
        return stored if isinstance(stored, str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file} cannot be read ({error}); copy it again") from error
