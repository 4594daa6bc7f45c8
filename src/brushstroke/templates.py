"""Joins several chat templates of a tokenizer into one.

It renders no template.
"""

from collections.abc import Mapping


def one_template(templates: Mapping[str, str]) -> str | None:
    """One chat template that selects among several like transformers: by whether there are tools.

    Args:
        templates: name → template, as in tokenizers; only "default" and "tool_use" are used.
    """
    default, tools = templates.get("default"), templates.get("tool_use")
    if default is None or tools is None or default == tools:
        return default if default is not None else tools
    with_tools, without = (text[:-1] if text.endswith("\n") else text for text in (tools, default))
    return f"{{% if tools %}}\n{with_tools}{{% else %}}\n{without}{{% endif %}}"
