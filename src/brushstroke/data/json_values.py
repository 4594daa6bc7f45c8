"""Values that a row contains as JSON or JSON text: tools, arguments, variables of a template.

It does not depend on messages.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from brushstroke.data.validate import check_encodable, expect
from brushstroke.errors import DataError

RESERVED = frozenset(  # variables that a template already gets
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_dict",
        "return_tensors",
        "strftime_now",
        "tokenize",
        "tools",
        "truncation",
    ]
)


def parsed(value: Any) -> Any:
    """Parse JSON text; return other values, and text that is not JSON, unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def as_json(value: Any, place: str) -> Any:
    """Convert a value to JSON types.

    Raises:
        DataError: the value has no JSON form, or contains half a surrogate pair.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
        check_encodable(text, place)
        return json.loads(text)
    except (TypeError, RecursionError) as error:
        raise DataError(f"{place} cannot be written as JSON ({error}); correct it") from error


def read_tools(tools: object, where: str) -> tuple[Any, ...]:
    """Read function declarations and remove keys that are null (but not from JSON text).

    Raises:
        DataError: the value is not a list of declarations.
    """
    given = parsed(tools)
    if given is None or given == "":
        return ()
    declared = []
    schemas = expect(Sequence, given, f"{where}: 'tools'", "a list of JSON schemas")
    for number, tool in enumerate(schemas, start=1):
        place = f"{where}: tool {number}"
        read = as_json(parsed(tool), place)
        _check_tool(read, place)
        declared.append(read if isinstance(tools, str) or isinstance(tool, str) else without_nulls(read))
    return tuple(declared)


def read_options(options: object, where: str) -> dict[str, Any]:
    """Read additional variables for the template.

    Raises:
        DataError: the value is not an object, or a name is already used.
    """
    given = parsed(options)
    if given is None or given == "":
        return {}
    given = expect(Mapping, given, f"{where}: 'chat_template_kwargs'", "an object")
    if taken := sorted(RESERVED & given.keys()):
        raise DataError(f"{where}: 'chat_template_kwargs' cannot contain {taken[0]!r}; remove it")
    return {name: value for name, value in as_json(given, where).items() if value is not None}


def schema_of(tools: Sequence[Any], name: str) -> Mapping[str, Any]:
    """The schema of a function's arguments; empty if none is declared."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            return function.get("parameters") or {}
    return {}


def without_nulls(value: Any, schema: Any = None) -> Any:
    """Remove the keys that are null from a value, at any depth, unless the schema allows null there."""
    known = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, list):
        return [without_nulls(inner, known.get("items")) for inner in value]
    if not isinstance(value, Mapping):
        return value
    properties = known.get("properties")
    inner = properties if isinstance(properties, Mapping) else {}
    return {
        key: without_nulls(entry, inner.get(key))
        for key, entry in value.items()
        if entry is not None or _allows_null(inner.get(key))
    }


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    kinds = schema.get("type")
    options = (*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ()))
    return (
        "null" in ([kinds] if isinstance(kinds, str) else kinds or ())
        or bool(schema.get("nullable"))
        or any(map(_allows_null, options))
    )


def _check_tool(tool: Any, place: str) -> None:
    """Refuse a value that is not a function declaration.

    Raises:
        DataError: the declaration is invalid.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    function = expect(Mapping, function, place, "an object with the name of a function")
    if not isinstance(function.get("name"), str):
        raise DataError(f"{place} has no function name; expected an object with name and parameters")
    for holder, key in ((function, "parameters"), (function.get("parameters") or {}, "properties")):
        found = holder.get(key) if isinstance(holder, Mapping) else None
        if found is not None:
            expect(Mapping, found, f"{place} ({function['name']}): {key!r}", "an object")
