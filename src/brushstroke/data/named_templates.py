"""Chat templates by name, for tokenizers that have none, and from files.

It renders nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from brushstroke.errors import ConfigError, did_you_mean

Template = str | Path | Mapping[str, str] | None

_FOLDER = Path(__file__).parent / "templates"


def template_names() -> tuple[str, ...]:
    """The names of the templates in the library."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def find_template(given: Template) -> str | Mapping[str, str] | None:
    """Find a chat template: given as text, in a file, or by its name.

    Args:
        given: the template text (Jinja contains braces), a file (Jinja, or JSON with the key
            "chat_template"), the name of a template in the library, several templates by name, or None.

    Raises:
        ConfigError: there is no such file or name, or the file cannot be read or contains no template.
    """
    if given is None or isinstance(given, Mapping) or (isinstance(given, str) and "{" in given):
        return given
    name, path = str(given), Path(given).expanduser()
    if path.is_file():
        return _from_file(path)
    if name in template_names():
        return (_FOLDER / f"{name}.jinja").read_text("utf-8")
    raise ConfigError(
        f"there is no chat template {name!r}: no file and no known template has that "
        f"name{did_you_mean(name, template_names())}; give a Jinja file, or one of "
        f"{', '.join(template_names())}"
    )


def _from_file(path: Path) -> str:
    """The template in a Jinja file, or in JSON such as chat_template.json and tokenizer_config.json."""
    reason = "it is empty"
    try:
        text = path.read_text("utf-8")
        template = json.loads(text)["chat_template"] if path.suffix == ".json" else text
    except (OSError, ValueError, KeyError, TypeError) as error:
        template, reason = None, f"{type(error).__name__}: {error}"
    if not isinstance(template, str) or not template.strip():
        raise ConfigError(
            f"{path} contains no chat template ({reason}); give a Jinja file, or JSON with the key "
            "chat_template"
        )
    return template
