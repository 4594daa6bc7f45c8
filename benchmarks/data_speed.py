"""Rows a second from rows to tokens and labels, by kind of row; each is proved against what is printed.

python benchmarks/data_speed.py
"""

import time
from typing import Any

from _common import keep
from brushstroke.base import load_tokenizer
from brushstroke.data import encode
from brushstroke.samples import model_path

ROWS = 20_000
TOOL = {"type": "function", "function": {"name": "split", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
KINDS = ("prompt and completion", "two turns", "reasoning", "tool call")


def row(kind: str, number: int) -> dict[str, Any]:
    """A short row of a kind, like no other."""
    asked, answer = f"Split {number} Main St", f'{{"number": "{number}"}}'
    if kind == "prompt and completion":
        return {"prompt": asked, "completion": answer}
    question, said = {"role": "user", "content": asked}, {"role": "assistant", "content": answer}
    if kind == "two turns":
        return {"messages": [question, said, {"role": "user", "content": f"And {number + 1}?"}, said]}
    if kind == "reasoning":
        return {"messages": [question, said | {"reasoning_content": f"{number} stands first."}]}
    call = {"type": "function", "function": {"name": "split", "arguments": {"number": number}}}
    return {
        "messages": [question, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [TOOL],
    }


def main() -> None:
    tokenizer, _ = load_tokenizer(str(model_path()))
    found = {}
    for kind in KINDS:
        rows = [row(kind, number) for number in range(ROWS)]
        start = time.perf_counter()
        encode(rows, tokenizer, chat_template=None if kind in KINDS[:2] else TEMPLATE)
        found[kind] = ROWS / (time.perf_counter() - start)
        print(f"{kind}: {found[kind]:,.0f} rows/s")
    keep("data_speed", rows_per_second=found)


if __name__ == "__main__":
    main()
