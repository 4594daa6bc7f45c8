"""Writes the text of an adapter's `README.md`: what it is, how it was made, how to load it.

It is for people and for the hub; brushstroke reads nothing back from it.
"""

import json
from pathlib import Path

from brushstroke.adapter import Adapter, Card


def model_card(adapter: Adapter, card: Card, folder_name: str) -> str:
    """The page, in Markdown with the hub's YAML header."""
    base = card.base_name
    on_hub = base is not None and base.count("/") == 1 and not base.startswith((".", "/", "~"))
    on_hub = on_hub and not Path(str(base)).exists()
    header = ["---", "library_name: peft", *([f"base_model: {json.dumps(base)}"] if on_hub else [])]
    if card.task == "CAUSAL_LM":
        header.append("pipeline_tag: text-generation")
    header += ["tags:", "- lora", "- brushstroke", "---", ""]
    shown = base or "BASE"
    lines = [
        f"# {folder_name}",
        "",
        f"A low-rank adapter (LoRA) for `{shown}`: {len(adapter)} sites, rank {adapter.rank}, "
        f"{adapter.parameters:,} parameters.",
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
        f"With PEFT: `PeftModel.from_pretrained(model, {json.dumps(folder_name)})`. "
        f"With vLLM: `vllm serve {shown} --enable-lora --max-lora-rank {max(adapter.rank, 8)} "
        f"--lora-modules {folder_name}={folder_name}`.",
        "",
    ]
    return "\n".join([*header, *lines])


def _facts(adapter: Adapter, card: Card) -> list[str]:
    """A table of what the card knows."""
    lora = dict(card.lora or {})
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
