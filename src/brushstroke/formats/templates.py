"""The chat template beside an adapter: in a file of its own, or in the settings of a tokenizer.

It renders nothing.
"""

from importlib.resources.abc import Traversable

from brushstroke.errors import AdapterFileError
from brushstroke.files import read_json
from brushstroke.templates import one_template

TEMPLATE, OTHERS, SETTINGS = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"


def read_template(folder: Traversable) -> str | None:
    """The chat template that an adapter was trained with, as far as its folder tells.

    Where there are several, it is one that chooses between them as transformers does.

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
