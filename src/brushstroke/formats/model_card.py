"""Writes the text of an adapter's `README.md`: what it is, how it was made, how to load it.

It is for people and for the hub; brushstroke reads nothing back from it.
"""

import json
from pathlib import Path

from brushstroke.adapter import Adapter, Card
from brushstroke.formats.peft_forms import LORA, form_of
from brushstroke.layers.dora import DoRA
from brushstroke.lowrank import LowRank, Update

# For people; a type of update that is not listed is named without a formula.
_DESCRIPTIONS: dict[type[Update], str] = {
    LowRank: "LoRA adapter (`W' = W + scale·U·V`)",
    DoRA: "DoRA adapter (`W' = m·(W + scale·U·V)/‖W + scale·U·V‖`, with the norm of each output column)",
}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts for --max-lora-rank


def model_card(adapter: Adapter, card: Card, folder_name: str) -> str:
    """The page, in Markdown with the hub's YAML header."""
    base = card.base_name
    on_hub = base is not None and base.count("/") == 1 and not base.startswith((".", "/", "~"))
    on_hub = on_hub and not Path(str(base)).exists()
    header = ["---", "library_name: peft", *([f"base_model: {json.dumps(base)}"] if on_hub else [])]
    if card.task == "CAUSAL_LM":
        header.append("pipeline_tag: text-generation")
    kind = _kind(adapter)
    header += ["tags:", f"- {'lora' if kind is LowRank else kind.__name__.lower()}", "- brushstroke"]
    header += ["---", ""]
    shown = base or "BASE"
    lines = [
        f"# {folder_name}",
        "",
        f"A {_DESCRIPTIONS.get(kind, f'{kind.__name__} adapter')} for `{shown}`: {len(adapter)} sites, "
        f"{f'rank {adapter.rank}, ' if adapter.rank else ''}{adapter.parameters:,} parameters.",
        "",
        *_facts(adapter, card),
        "",
        "## Loading",
        "```python",
        "import brushstroke as bs",
        "",
        f"base = bs.load_base({json.dumps(shown)})",
        f"with bs.attach(base, bs.load({json.dumps(folder_name)})):",
        "    ...",
        "```",
        _with_peft(adapter, folder_name) + " " + _with_vllm(adapter, shown, folder_name),
        "",
    ]
    return "\n".join([*header, *lines])


def _kind(adapter: Adapter) -> type[Update]:
    """The type of the updates, which is the same at all sites; that of embeddings counts as LowRank."""
    update = next(iter(adapter.values()), None)
    return LowRank if update is None or isinstance(update, LowRank) else type(update)


def _with_peft(adapter: Adapter, folder_name: str) -> str:
    """How to load the adapter with PEFT, or that PEFT's LoRA does not have its updates."""
    forms = {type(update).__name__: form_of(update) for update in adapter.values()}
    if missing := [name for name, form in forms.items() if not (form and form.is_in_peft)]:
        return f"PEFT's LoRA has no {' and no '.join(missing)}."
    other = {form.peft_type for form in forms.values() if form} - {LORA}
    which = "".join(f", if it knows the type {name}" for name in other)
    return f"With PEFT{which}: `PeftModel.from_pretrained(model, {json.dumps(folder_name)})`."


def _with_vllm(adapter: Adapter, base: str, folder_name: str) -> str:
    """How to serve the adapter with vLLM, or why it cannot be served."""
    scales = {update.scale for update in adapter.values() if isinstance(update, LowRank)}
    rank = next((rank for rank in _VLLM_RANKS if rank >= adapter.rank), None)
    kind = _kind(adapter)
    if kind is not LowRank:
        reason = f"it does not support {kind.__name__}"
    elif len(scales) > 1:
        reason = "it uses one scale for all sites, and here they differ"
    elif rank is None:
        reason = f"its largest rank is {_VLLM_RANKS[-1]}"
    else:
        return (
            f"With vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules {folder_name}={folder_name}`."
        )
    return f"vLLM cannot load it ({reason}): merge it into its base, and serve the merged model."


def _facts(adapter: Adapter, card: Card) -> list[str]:
    """A table of the facts in the card."""
    ranked = any(form and form.needs_rank for form in map(form_of, adapter.values()))
    lora = dict(card.lora or {}) if ranked else {}  # without a rank, these settings had no effect
    rows = {
        "targets": ", ".join(card.target_modules),
        "alpha": lora.get("alpha"),
        "scale rule": lora.get("scale_rule"),
        "dropout": lora.get("dropout"),
        "stop tokens": ", ".join(f"`{token}`" for token in card.stop_tokens),
        "chat template": "`chat_template.jinja`" if card.chat_template else None,
        "size in bytes": f"{adapter.bytes:,}",
        **{key.replace("_", " "): value for key, value in card.training.items()},
    }
    known = {name: value for name, value in rows.items() if value not in (None, "", {}, [])}
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in known.items())]


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return " ".join(text.split()).replace("|", "\\|")
