"""The card of an adapter: where it comes from, as plain data.

It decides nothing: layers judge a base by it, formats write it, people read it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from brushstroke.adapter.fingerprint import Fingerprint
from brushstroke.errors import AdapterFileError, did_you_mean

FORMAT = 1


@dataclass(frozen=True)
class Card:
    """What is known of an adapter's origin; every field may be unknown.

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

    def with_changes(self, **changes: Any) -> "Card":
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """JSON types; the chat template is left to a file of its own."""
        stored = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del stored["chat_template"]
        stored["fingerprint"] = self.fingerprint.as_dict() if self.fingerprint else None
        return {"format": FORMAT, **{k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Card":
        """The inverse of `as_dict`.

        Raises:
            AdapterFileError: an unknown field, or a card of a later format.
        """
        fields = dict(stored)
        if fields.pop("format", None) != FORMAT:
            raise AdapterFileError(
                f"the card has format {stored.get('format')!r}, this version reads {FORMAT}; upgrade "
                "brushstroke"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise AdapterFileError(f"unknown field {key!r} in the card{did_you_mean(key, known)}")
        for name in ("lora", "training"):
            if not isinstance(fields.get(name) or {}, Mapping):
                raise AdapterFileError(
                    f"the card's {name!r} is {type(fields[name]).__name__}, expected an object; save the "
                    "adapter again, or remove the card"
                )
        fields["training"] = fields.get("training") or {}
        for name in ("target_modules", "stop_tokens"):
            fields[name] = tuple(fields.get(name) or ())
        if fields.get("fingerprint") is not None:
            fields["fingerprint"] = Fingerprint.from_dict(fields["fingerprint"])
        return cls(**fields)
