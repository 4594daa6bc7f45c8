"""The command `data`: shows which tokens of a data set a base would be trained on.

It loads only the tokenizer.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from brushstroke.checks import check_integer
from brushstroke.cli.console import emit_json, facts, results
from brushstroke.cli.options import Use
from brushstroke.cli.progress import RowsProgress
from brushstroke.cli.values import Whole
from brushstroke.locate import require_base_files

if TYPE_CHECKING:
    from brushstroke.data import EncodedData, Example

SHOWN = 3  # examples
OPEN, CLOSE = "⟦", "⟧"


def data(
    base: str,
    data: list[str],
    *,
    rows: Whole = None,
    prompt: str | None = None,
    completion: str | None = None,
    use: Use = None,
    max_length: Whole = None,
    skip_too_long: bool = False,
    split_turns: bool = False,
    chat_template: str | None = None,
    date: str | None = None,
    trust_remote_code: bool = False,
    json: bool = False,
) -> None:
    """Show examples with the trained tokens marked, counts by role, the stop tokens and lengths.

    Args:
        base: A model folder, a hub id or a .gguf file.
        data: A JSONL, JSON, CSV or Parquet file, a folder of them, a URL of a file, or a data set on the hub;
            several are joined, and NAME:2 repeats the rows of one.
        rows: Examples to show [default: 3].
        prompt: Name of the column with the prompts [default: prompt].
        completion: Name of the column with the completions [default: completion].
        use: Use the chosen answers of preference data, or the texts of data with text and label.
        max_length: Longest example in tokens [default: the model's context].
        skip_too_long: Leave out examples whose prompt fills --max-length, instead of refusing them.
        split_turns: Make an example of every assistant turn, written as the model will see it.
        chat_template: A Jinja file, or chatml, llama3, gemma or alpaca [default: the tokenizer's own].
        date: The date of "today" in the chat template, YYYY-MM-DD [default: today].
        trust_remote_code: Run Python code from the base's folder if transformers does not have its class.
        json: Print JSON on stdout.
    """
    if rows is not None:
        check_integer("--rows", rows, 0)
    require_base_files(base)
    from brushstroke.data import ChatFormat, encode, find_columns, find_template, read_rows

    read = read_rows(data, prompt=prompt, completion=completion, use=use)
    template = find_template(chat_template)
    find_columns(read, prompt, completion)
    from brushstroke.base import load_tokenizer

    tokenizer, context = load_tokenizer(base, trust_remote_code=trust_remote_code, max_length=max_length)
    chat = None if tokenizer is None else ChatFormat(tokenizer, template, date=date)
    with RowsProgress(read.name) as progress:
        encoded = encode(
            read,
            tokenizer,
            prompt_column=prompt,
            completion_column=completion,
            max_length=context if max_length is None else max_length,
            skip_too_long=skip_too_long,
            split_turns=split_turns,
            chat_template=chat,
            on_progress=progress.update,
        )
    shown = encoded[: SHOWN if rows is None else rows]
    if json:
        emit_json({**_numbers(encoded), "examples_shown": [_as_dict(e, tokenizer) for e in shown]})
        return
    console = results()
    for example in shown:
        console.print(
            f"row {example.row}: {len(example)} tokens, {example.trained} trained", style="bold", markup=False
        )
        console.print(_marked(example, tokenizer, coloured=console.is_terminal))
        console.print()
    _print_numbers(console, encoded)


def _parts(example: "Example", tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, trained) of each segment."""
    from brushstroke.data import segments

    return [
        (_text(tokenizer, example.tokens[start:stop]), trained) for start, stop, trained in segments(example)
    ]


def _text(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _marked(example: "Example", tokenizer: Any, *, coloured: bool) -> Any:
    from rich.text import Text

    text = Text()
    for part, trained in _parts(example, tokenizer):
        if not trained:
            text.append(part, style="dim")
        elif coloured:
            text.append(part, style="black on green")
        else:
            text.append(f"{OPEN}{part}{CLOSE}")
    return text


def _as_dict(example: "Example", tokenizer: Any) -> dict[str, Any]:
    return {
        "row": example.row,
        "tokens": len(example),
        "trained_tokens": example.trained,
        "cut": example.cut,
        "roles": dict(example.roles),
        "parts": [{"text": text, "trained": trained} for text, trained in _parts(example, tokenizer)],
    }


def _numbers(encoded: "EncodedData") -> dict[str, Any]:
    report, lengths = encoded.report, encoded.lengths
    return {
        "name": encoded.name,
        "hash": encoded.hash,
        "kind": report.kind,
        "rows": report.rows,
        "examples": report.examples,
        "real_tokens": report.real_tokens,
        "trained_tokens": report.trained_tokens,
        "roles": dict(report.roles),
        "read_as": report.read_as,
        "unused_columns": list(report.unused_columns),
        "unused_keys": list(report.unused_keys),
        "notes": list(report.notes),
        "begin_tokens": list(report.begin_tokens),
        "stop_tokens": list(report.stop_tokens),
        "lengths": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "skipped_rows": list(report.skipped_rows),
        "cut_rows": list(report.cut_rows),
        "cut_tokens": report.cut_tokens,
    }


def _print_numbers(console: Any, encoded: "EncodedData") -> None:
    numbers = _numbers(encoded)
    is_text = numbers["kind"] == "text"
    lengths, skipped, cut = numbers["lengths"], numbers["skipped_rows"], numbers["cut_rows"]
    console.print(numbers["name"], style="bold", markup=False)
    facts(
        console,
        {
            "rows": f"{numbers['rows']:,} ({numbers['kind']}), {numbers['examples']:,} examples",
            "tokens": f"{numbers['real_tokens']:,}, {numbers['trained_tokens']:,} of them trained",
            "by role": ", ".join(f"{role} {count:,}" for role, count in numbers["roles"].items()),
            "read as": encoded.report.reading,
            "notes": "; ".join(numbers["notes"]),
            **({"begin token": " ".join(numbers["begin_tokens"]) or "none"} if is_text else {}),
            "stop token": " ".join(numbers["stop_tokens"]) or "none",
            "lengths": f"min {lengths['min']}, median {lengths['median']:g}, mean {lengths['mean']:.1f}, "
            f"max {lengths['max']}",
            "left out": f"{len(skipped):,} rows whose prompt fills the limit" if skipped else "",
            "cut": f"{len(cut):,} rows, {numbers['cut_tokens']:,} tokens" if cut else "",
        },
    )
