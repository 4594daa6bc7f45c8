"""The card of an adapter: a record of where the adapter comes from, as plain data.

Does not check a base (`sites` does) and does not read or write files (`formats` does).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from brushstroke.adapter.fingerprint import Fingerprint
from brushstroke.errors import AdapterFileError, did_you_mean

FORMAT = 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("base_name", "chat_template", "task"), (_is_text, "a text")),
    **dict.fromkeys(("target_modules", "stop_tokens"), (_are_texts, "a list of texts")),
    **dict.fromkeys(("lora", "fingerprint", "training"), (_is_object, "an object")),
    "conv1d": (_is_flag, "true or false"),
}


@dataclass(frozen=True, repr=False)
class Card:
    """The known facts about an adapter's origin; any field may be unknown.

    Args:
        base_name: the base model as the user named it.
        lora: the settings of the `LoraConfig` that made the adapter.
        target_modules: names that select exactly the adapter's sites in the base, by PEFT's rule.
        fingerprint: samples of the base's weights.
        chat_template: the template (Jinja) that the adapter was trained with.
        stop_tokens: the texts of the tokens that end an answer.
        task: "CAUSAL_LM" for a language model.
        conv1d: whether the sites are HF Conv1D layers (PEFT's fan_in_fan_out).
        training: data hash, rows, steps, tokens, learning rate, losses, versions.
    """

    base_name: str | None = None
    lora: Mapping[str, Any] | None = None
    target_modules: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    chat_template: str | None = None
    stop_tokens: tuple[str, ...] = ()
    task: str | None = None
    conv1d: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        facts = [f"base {self.base_name}"] if self.base_name else []
        if self.lora:
            facts.append(f"rank {self.lora.get('rank')}, alpha {self.lora.get('alpha')}")
        if self.training.get("steps"):
            facts.append(f"trained {self.training['steps']} steps")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name)]
        return f"Card({'; '.join([*facts, 'fields: ' + (', '.join(given) or 'none')])})"

    def with_changes(self, **changes: Any) -> "Card":
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON types, without the chat template, which has a separate file."""
        stored = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del stored["chat_template"]
        stored["fingerprint"] = self.fingerprint.as_dict() if self.fingerprint else None
        return {"format": FORMAT, **{k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Card":
        """The inverse of `as_dict`; a null field counts as missing.

        Raises:
            AdapterFileError: a field is unknown or has the wrong type, or the card has another format.
        """
        fields = {name: value for name, value in stored.items() if value is not None}
        if fields.pop("format", None) != FORMAT:
            raise AdapterFileError(
                f"the card has format {stored.get('format')!r}, but this version reads {FORMAT}; upgrade "
                "brushstroke"
            )
        for name, value in fields.items():
            if name not in _KINDS:
                raise AdapterFileError(f"unknown field {name!r} in the card{did_you_mean(name, _KINDS)}")
            fits, wanted = _KINDS[name]
            if not fits(value):
                raise AdapterFileError(
                    f"the card's {name!r} is {value!r:.60}, expected {wanted}; save the adapter again, or "
                    "remove the card"
                )
            if isinstance(value, list):
                fields[name] = tuple(value)
        if "fingerprint" in fields:
            fields["fingerprint"] = Fingerprint.from_dict(fields["fingerprint"])
        return cls(**fields)
