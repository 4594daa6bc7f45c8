"""The commands `generate` and `chat`.

They choose the adapter of each prompt; the library generates the answers.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from brushstroke.cli.adapters import AdapterFlags, ToolsFile, load, load_adapters, read_tools
from brushstroke.cli.console import emit, emit_json, say
from brushstroke.cli.options import BaseOptions
from brushstroke.cli.values import Whole, read_text, split
from brushstroke.errors import BrushstrokeError, ConfigError, DataError, OutputError
from brushstroke.locate import require_base_files
from brushstroke.outputs import write_file

if TYPE_CHECKING:
    from brushstroke.inference import Answer

BASE = "base"  # the name of the model without an adapter
HELP = "/help, /adapter NAME, /base, /system TEXT, /save FILE, /reset, /quit"
COMMANDS = """\
/adapter NAME  NAME answers from now on (also /use NAME); without NAME, the names are listed
/base          the base answers, without an adapter
/system TEXT   TEXT is the system message, and the conversation starts over; without TEXT, there is none
/save FILE     writes the conversation to a new file, as a row of training data (JSONL)
/reset         starts over with the same system message
/quit          ends (also /exit, or the end of the input)"""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling settings.

    Args:
        max_new_tokens: Maximum tokens of an answer [default: 256].
        temperature: Sampling temperature; 0 always takes the most likely token [default: 0].
        top_p: With a temperature, sample from the most likely tokens with this total probability [default:
            1].
        seed: Seed of the sampling [default: 0].
        num_beams: Number of beams of a beam search [default: 1].
    """

    max_new_tokens: Whole = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Whole = None
    num_beams: Whole = None

    def given(self) -> dict[str, Any]:
        """The given settings, checked.

        Raises:
            ConfigError: an invalid value.
        """
        from brushstroke.inference import SamplingParams

        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        SamplingParams(**values)
        return values


def generate(
    base: str,
    /,
    *texts: str,
    prompt: Annotated[list[str] | None, Parameter(negative=())] = None,
    prompts: Path | None = None,
    column: str | None = None,
    system: str | None = None,
    adapter: AdapterFlags = None,
    use: str | None = None,
    tools: ToolsFile = None,
    chat_template: str | None = None,
    date: str | None = None,
    sampling: SamplingOptions | None = None,
    options: BaseOptions | None = None,
) -> None:
    """Answer prompts. With several adapters, each answers every prompt, unless --use selects adapters.

    With --json, prints one object per line and answer.

    Args:
        base: A model folder, a hub id or a .gguf file.
        texts: Prompts; without any, and without --prompt and --prompts, one prompt is read from stdin.
        prompt: A prompt; repeatable.
        prompts: A file of prompts: one per line, or a JSONL, JSON, CSV or Parquet file with a prompt or
            messages column (and system, history, tools, chat_template_kwargs); a final answer in messages is
            ignored.
        column: The column of that file with the prompts [default: prompt or messages].
        system: A system message for every prompt that has none.
        use: Names of the adapters, one per prompt or one for all, separated by commas; "base" for none.
        chat_template: A Jinja file, or chatml, llama3, gemma or alpaca [default: the adapter's template, or
            the tokenizer's].
        date: The date of "today" in the chat template, YYYY-MM-DD [default: the date of the adapter's
            training].
    """
    declared = read_tools(tools)
    asked = _prompts([*texts, *(prompt or ())], prompts, column, declared)
    if system is not None:
        asked = [_with_system(question, system, declared) for question in asked]
    require_base_files(base)
    adapters = load_adapters(adapter)
    asked, names = _rows(asked, list(adapters), use)
    given = (sampling or SamplingOptions()).given()
    options = options or BaseOptions()
    loaded = load(base, options)
    from brushstroke.inference import generate as answer_all
    from brushstroke.inference import shown_prompt

    answers = answer_all(
        loaded,
        asked,
        adapters=adapters,
        rows=names,
        tools=declared,
        chat_template=chat_template,
        date=date,
        allow_different_base=options.allow_different_base,
        **given,
    )
    for question, answer in zip(asked, answers, strict=True):
        name = answer.adapter or BASE
        if options.json:
            emit_json({"adapter": name, "prompt": shown_prompt(question), **_parts(answer)}, lines=True)
            continue
        if len(answers) > 1:
            say(f"{name} < {_short(shown_prompt(question))}")
        if answer.reasoning:
            say(f"reasoning: {answer.reasoning}")
        if answer.text or not answer.tool_calls:
            emit(answer.text)
        for call in answer.tool_calls:
            emit_json(call, lines=True)


def chat(
    base: str,
    *,
    adapter: AdapterFlags = None,
    system: str | None = None,
    tools: ToolsFile = None,
    chat_template: str | None = None,
    date: str | None = None,
    sampling: SamplingOptions | None = None,
    options: BaseOptions | None = None,
) -> None:
    """Chat with a base and its adapters; /help lists the commands in the chat.

    With --json, prints one object per line and turn.

    Args:
        base: A model folder, a hub id or a .gguf file.
        system: A system message.
        chat_template: A Jinja file, or chatml, llama3, gemma or alpaca [default: the adapter's template, or
            the tokenizer's].
        date: The date of "today" in the chat template, YYYY-MM-DD [default: the date of the adapter's
            training].
    """
    declared = read_tools(tools)
    require_base_files(base)
    adapters = load_adapters(adapter)
    given = (sampling or SamplingOptions()).given()
    options = options or BaseOptions()
    loaded = load(base, options)
    from brushstroke.inference import ChatSession, SamplingParams

    with ChatSession(
        loaded,
        adapters,
        system=system,
        tools=declared,
        chat_template=chat_template,
        date=date,
        sampling=SamplingParams(**given),
        allow_different_base=options.allow_different_base,
    ) as session:
        say(f"{session.adapter or BASE} answers; {HELP}")
        while (line := _ask(session.adapter or BASE)) is not None:
            text = line.strip()
            if text in ("/quit", "/exit"):
                break
            try:
                if text.startswith("/"):
                    _command(session, text)
                elif text:
                    _turn(session, text, options.json)
            except BrushstrokeError as error:
                say(f"error: {error}")


def _ask(name: str) -> str | None:
    """The next line, or None at the end of the input."""
    if sys.stdin.isatty():
        sys.stderr.write(f"{name}> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line if line else None


def _turn(session: Any, text: str, as_json: bool) -> None:
    if as_json:
        answer = session.say(text)
        said = session.messages[-1]
        further = {"reasoning": said.get("reasoning_content"), "tool_calls": said.get("tool_calls")}
        record = {"adapter": session.adapter or BASE, "prompt": text, "answer": answer}
        emit_json(record | {name: value for name, value in further.items() if value}, lines=True)
        return
    try:
        session.say(text, on_text=lambda piece: emit(piece, end=""))
    except KeyboardInterrupt:
        say(" (interrupted; this turn is discarded)")
    emit("")


def _command(session: Any, text: str) -> None:
    word, _, given = text.partition(" ")
    given = given.strip()
    word = "/adapter" if word == "/use" else word
    if word == "/help":
        say(COMMANDS)
    elif word == "/reset":
        session.reset()
        say("the conversation starts over")
    elif word == "/system":
        session.set_system(given or None)
        say(f"the conversation starts over, {'with this' if given else 'without a'} system message")
    elif word == "/save" and given:
        say(f"the conversation is in {_save(session, Path(given).expanduser())}")
    elif word == "/base" or (word == "/adapter" and given == BASE):
        session.use(None)
        say("the base answers")
    elif word == "/adapter" and given:
        session.use(given)
        say(f"{given} answers")
    elif word == "/adapter":
        say(f"{session.adapter or BASE} answers; there are {', '.join((*session.names, BASE))}")
    else:
        say(f"unknown command {text!r}; {HELP}")


def _save(session: Any, path: Path) -> Path:
    """Write the conversation to a new file, as one row with messages."""
    if path.exists():
        raise OutputError(f"{path} exists; name a new file")
    if not any(message["role"] == "assistant" for message in session.messages):
        raise DataError("there is no answer to save yet")
    row = {"messages": session.messages, **({"tools": session.tools} if session.tools else {})}
    write_file(path, json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _parts(answer: "Answer") -> dict[str, Any]:
    """An answer as JSON: its text, and its reasoning and tool calls if there are any."""
    parts: dict[str, Any] = {"answer": answer.text}
    if answer.reasoning:
        parts["reasoning"] = answer.reasoning
    if answer.tool_calls:
        parts["tool_calls"] = list(answer.tool_calls)
    return {**parts, "finish": answer.finish}


def _with_system(question: Any, system: str, tools: Sequence[Any]) -> Any:
    """The prompt with a system message at its beginning, unless it has one."""
    from brushstroke.data import read_conversation

    message = {"role": "system", "content": system}
    if isinstance(question, str):
        turns = [message, {"role": "user", "content": question}]
        return read_conversation(turns, tools=list(tools), where="the prompt")
    if question.messages[0]["role"] in ("system", "developer"):
        return question
    return dataclasses.replace(
        question, messages=(message, *question.messages), trained=(False, *question.trained)
    )


def _prompts(given: list[Any], file: Path | None, column: str | None, tools: Sequence[Any]) -> list[Any]:
    if column is not None and file is None:
        raise ConfigError("--column needs --prompts FILE, which has the column")
    if file is not None:
        given = [*given, *_read_prompts(file, column, tools)]
    elif not given:
        text = sys.stdin.read().removesuffix("\n")
        given = [text] if text else []
    if not given:
        raise DataError("there is no prompt; give one on the command line, with --prompts FILE, or on stdin")
    return given


def _read_prompts(file: Path, column: str | None, tools: Sequence[Any]) -> list[Any]:
    from brushstroke.data import read_prompt, read_rows
    from brushstroke.data.files import is_readable

    if is_readable(file):
        read = read_rows(file, prompt=column)
        rows = [read.where(number) for number in range(1, len(read) + 1)]
        if column is not None:
            for row, where in zip(read.rows, rows, strict=True):
                if row.get(column) is None:
                    raise DataError(f"{where}: has no column {column!r}; it has {', '.join(map(repr, row))}")
            named = [{**row, "messages": None, "prompt": row[column]} for row in read.rows]
        else:
            named = read.rows
        return [read_prompt(row, where, tools=tools) for row, where in zip(named, rows, strict=True)]
    if column is not None:
        raise ConfigError(f"--column {column}: {file} is a text file, with one prompt per line")
    return [line for line in read_text(file, "--prompts").splitlines() if line.strip()]


def _rows(prompts: list[Any], names: list[str], use: str | None) -> tuple[list[Any], list[str | None]]:
    """Pair each prompt with the adapter that answers it."""
    if use is None:
        voices: list[str | None] = [*names] or [None]
        return [p for p in prompts for _ in voices], [voice for _ in prompts for voice in voices]
    chosen = split(use)
    for name in chosen:
        if name != BASE and name not in names:
            raise ConfigError(
                f"--use {name!r}: there is no such adapter; known adapters: {', '.join([*names, BASE])}"
            )
    if len(chosen) == 1:
        chosen = chosen * len(prompts)
    if len(chosen) != len(prompts):
        raise ConfigError(
            f"--use names {len(chosen)} adapters for {len(prompts)} prompts; name one adapter, or one per "
            "prompt"
        )
    return prompts, [None if name == BASE else name for name in chosen]


def _short(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"
