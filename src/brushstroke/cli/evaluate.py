"""The command `evaluate`: the loss and the scores of answers on a data file.

The scores are defined in `inference`.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from brushstroke.cli.adapters import AdapterFlags, ToolsFile, load, load_adapters, read_tools
from brushstroke.cli.console import emit_json, people, results, say, table
from brushstroke.cli.early import check_data, say_what_was_read
from brushstroke.cli.options import BaseOptions, Use
from brushstroke.cli.values import Whole
from brushstroke.errors import ConfigError, OutputError, install_command
from brushstroke.locate import require_base_files

BASE = "base"
OPTIONAL = (
    "choice",
    "contains",
    "final_answer",
    "rouge_l",
    "valid_json",
    "field_f1",
)  # shown where they are defined
COLUMNS = ("rows", "loss", "exact_match", *OPTIONAL, "seconds")
WITHOUT = (
    "seconds",
    "rows",
    "contains",
    "rouge l",
    "valid json",
    "field f1",
)  # columns that a narrow terminal omits, in this order


def evaluate(
    base: str,
    /,
    data: list[str],
    *,
    adapter: AdapterFlags = None,
    with_base: Annotated[bool, Parameter(name="--base")] = False,
    max_new_tokens: Whole = None,
    batch_size: Whole = None,
    out: Path | None = None,
    overwrite: bool = False,
    generate: bool = True,
    choices: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    use: Use = None,
    max_length: Whole = None,
    split_turns: bool = False,
    tools: ToolsFile = None,
    chat_template: str | None = None,
    date: str | None = None,
    run: BaseOptions | None = None,
) -> None:
    """Show the loss per trained token and the scores of answers on a data file.

    The scores are exact match; for labels, the most probable one; for texts, whether the answer contains the
    expected text, and ROUGE-L; the final answer after "####", if the data has it; for JSON, validity and F1
    of the fields. With --json, prints the numbers; for several adapters, an object that maps names to
    numbers.

    Args:
        base: A model folder, a hub id or a .gguf file.
        data: A JSONL, JSON, CSV or Parquet file, a folder of them, a URL of a file, or a data set on the hub;
            several are joined, and NAME:2 repeats the rows of one.
        with_base: Also score the base without an adapter.
        max_new_tokens: Maximum tokens of an answer [default: 256].
        batch_size: Rows in one batch [default: 16].
        out: Write the answers to this file, as JSONL.
        overwrite: Replace that file.
        generate: Generate answers; --no-generate computes only the loss, and with --choices the choice.
        choices: Labels of which the most probable one is chosen: a list such as yes,no; all (the different
            expected answers), or none [default: all, if they are at most 20 and repeated].
        prompt: Name of the column with the prompts [default: prompt].
        completion: Name of the column with the completions [default: completion].
        use: Use the chosen answers of preference data, or the texts of data with text and label.
        max_length: Longest example in tokens, for the loss [default: the model's context].
        split_turns: Compute the loss of every assistant turn as a separate example, as in training.
        chat_template: A Jinja file, or chatml, llama3, gemma or alpaca [default: the adapter's template, or
            the tokenizer's].
        date: The date of "today" in the chat template, YYYY-MM-DD [default: the date of the adapter's
            training].
    """
    declared = read_tools(tools)
    require_base_files(base)
    from brushstroke.data import find_columns, find_template, read_rows
    from brushstroke.data.mixture import read_weight

    rows = read_rows(data, prompt=prompt, completion=completion, use=use)
    template = find_template(chat_template)
    find_columns(rows, prompt, completion)
    say_what_was_read(rows)
    if out is not None:
        _refuse_out(out.expanduser(), [str(read_weight(source)[0]) for source in data], overwrite)
    loaded_adapters = load_adapters(adapter)
    if with_base and BASE in loaded_adapters:
        raise ConfigError(f"an adapter is called {BASE!r}; give it another name (--adapter NAME=FOLDER)")
    shows_base = with_base or not loaded_adapters
    adapters: dict[str, Any] = {**({BASE: None} if shows_base else {}), **loaded_adapters}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    options = {name: value for name, value in options.items() if value is not None}
    from brushstroke.inference import SamplingParams, check_batch_size
    from brushstroke.inference import evaluate as run_evaluation

    if max_new_tokens is not None:
        SamplingParams(max_new_tokens)
    if batch_size is not None:
        check_batch_size(batch_size)
    run = run or BaseOptions()
    check_data(
        base,
        [rows],
        prompt_column=prompt,
        completion_column=completion,
        max_length=max_length,
        split_turns=split_turns,
        chat_template=template
        or next((a.card.chat_template for a in adapters.values() if a and a.card), None),
        tools=declared,
        trust_remote_code=run.trust_remote_code,
    )
    loaded = load(base, run)
    with _Progress() as progress:
        found = run_evaluation(
            loaded,
            rows,
            adapters,
            generate=generate,
            choices=_read_choices(choices),
            on_progress=progress.update,
            prompt_column=prompt,
            completion_column=completion,
            max_length=max_length,
            split_turns=split_turns,
            tools=declared,
            chat_template=template,
            date=date,
            allow_different_base=run.allow_different_base,
            **options,
        )
    if out is not None:
        _keep(found, out.expanduser())
    _say_what_is_possible(found, choices)
    if run.json:
        numbers = {name: one.as_dict() for name, one in found.items()}
        emit_json(numbers if len(numbers) > 1 else next(iter(numbers.values())))
        return
    columns = [
        column
        for column in COLUMNS
        if column not in OPTIONAL or any(getattr(one, column) is not None for one in found.values())
    ]
    cells = [(name, *(_cell(getattr(one, column)) for column in columns)) for name, one in found.items()]
    heads = ("", *(column.replace("_", " ") for column in columns))
    table(results(), heads, cells, leave_out=WITHOUT)


def _say_what_is_possible(found: Any, choices: str | None) -> None:
    """Name the scores that need a flag or a library."""
    one = next(iter(found.values()))
    different = {answer["expected"] for answer in one.answers}
    is_text = one.contains is not None and one.choice is None and one.final_answer is None
    if choices is None and is_text and 2 * len(different) <= len(one.answers):
        say(f"there are {len(different)} different expected answers; --choices all scores them as labels")
    elif is_text and find_spec("rouge_score") is None:
        say(f"ROUGE-L needs the package rouge-score; run: {install_command('scores')}")


def _read_choices(choices: str | None) -> list[str] | bool | None:
    if choices in (None, "all", "none"):
        return {None: None, "all": True, "none": False}[choices]
    return [label.strip() for label in choices.split(",")]


def _refuse_out(out: Path, data: list[str], overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise OutputError(
            f"cannot write {out}: there is no folder {out.parent}; create it, or name another file"
        )
    if out.is_dir():
        raise OutputError(f"cannot write {out}: it is a folder; name a file in it")
    sources = (Path(source).expanduser() for source in data)  # or the name of a data set on the hub
    if out.exists() and any(source.exists() and out.samefile(source) for source in sources):
        raise OutputError(f"{out} is the data itself; name another file for the answers")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} already exists; pass --overwrite to replace it, or name another file")


def _keep(found: Any, out: Path) -> None:
    from brushstroke.outputs import write_file

    lines = [json.dumps(answer, ensure_ascii=False) for one in found.values() for answer in one.answers]
    write_file(out, "".join(f"{line}\n" for line in lines))
    say(f"{len(lines)} answers are written to {out}")


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


class _Progress:
    """Shows progress on a terminal, and nothing elsewhere."""

    def __init__(self) -> None:
        self._console = people()
        self._status: Any = None

    def __enter__(self) -> "_Progress":
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, name: str, kind: str, done: int, count: int) -> None:
        """Show a progress report of `evaluate`."""
        if self._status is not None:
            self._status.update(f"{name}: {kind} {done}/{count}")
