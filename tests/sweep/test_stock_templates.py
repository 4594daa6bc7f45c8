"""Stock chat templates × kinds of conversation: a row is trained and used in prompts in full, or refused.

The checks do not use the library's own checks: they decode tokens, and render with plain transformers.
`make sweep` runs every cell, from two seeds; `make test` runs a seeded sample.
"""

import itertools
import json
import random
import re
from dataclasses import dataclass, field

import pytest

from brushstroke.data import ChatFormat, encode, segments
from brushstroke.errors import DataError
from sampling import SEED, WHOLE, sample
from stock_templates import stock_templates, tokenizer_for

SAMPLE = 130  # cells of the 820 in `make test`
WORDS = (
    "river",
    "Bern",
    "tide",
    "été",
    "naïve",
    "don't",
    '"quoted"',
    "a<b",
    "x & y",
    "[1]",
    "{b}",
)


@dataclass
class Cell:
    """A conversation, and what must be found of it."""

    messages: list
    tools: list | None = None
    answers: list = field(default_factory=list)  # for each: the texts that are trained, or ways to write one
    context: list = field(default_factory=list)  # texts that stand in the example and are not trained


def words(draw: random.Random, count: int = 6) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count)) + f" {draw.randrange(10**6)}"


def plain(draw):
    texts = [words(draw) for _ in range(4)]
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return Cell(messages, None, [[texts[1]], [texts[3]]], [texts[0], texts[2]])


def under(role):
    def make(draw):
        first, asked, said = (words(draw) for _ in range(3))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return Cell([{"role": role, "content": first}, *turns], None, [[said]], [first, asked])

    return make


def parts(count):
    def make(draw):
        cell = plain(draw)
        for message in cell.messages:
            text = message["content"]
            cut = len(text) // 2 if count == 2 else len(text)
            pieces = (text[:cut], text[cut:])[:count]
            message["content"] = [{"type": "text", "text": piece} for piece in pieces]
        return cell

    return make


def think(turns):
    def make(draw):
        cell = Cell([])
        for _ in range(turns):
            asked, why, said = (words(draw) for _ in range(3))
            content = f"<think>\n{why}\n</think>\n\n{said}"
            cell.messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": content}]
            cell.answers.append([why, said])
            cell.context.append(asked)
        return cell

    return make


def reasoning(draw):
    asked, why, said = (words(draw) for _ in range(3))
    answer = {"role": "assistant", "content": said, "reasoning_content": why}
    return Cell([{"role": "user", "content": asked}, answer], None, [[why, said]], [asked])


TYPES = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


def tool_of(arguments):
    """The declaration of a function that takes these."""
    properties = {
        key: {"type": "null" if value is None else TYPES[type(value)]} for key, value in arguments.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": "get_tide", "description": "High water", "parameters": schema}
    return {"type": "function", "function": function}


def calls(*given):
    """A conversation with these calls in one message."""

    def make(draw):
        asked, said = words(draw), words(draw)
        arguments = [drawn(entry, draw) for entry in given]
        made = [
            {
                "id": f"call0000{number}",
                "type": "function",
                "function": {"name": "get_tide", "arguments": entry},
            }
            for number, entry in enumerate(arguments, start=1)
        ]
        results = [f"{draw.randrange(24)}:{draw.randrange(60):02d}, {number}" for number in range(len(made))]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "", "tool_calls": made},
            *(
                {"role": "tool", "name": "get_tide", "tool_call_id": call["id"], "content": result}
                for call, result in zip(made, results, strict=True)
            ),
            {"role": "assistant", "content": said},
        ]
        trained = ["get_tide", *(text for entry in arguments for text in texts_in(entry))]
        return Cell(messages, [tool_of(arguments[0])], [trained, [said]], [asked, *results])

    return make


def drawn(value, draw):
    if isinstance(value, dict):
        return {key: drawn(inner, draw) for key, inner in value.items()}
    return value(draw) if callable(value) else value


def texts_in(value):
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *texts_in(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    written = json.dumps(value)
    return [value] if isinstance(value, str) else [(written, str(value))]


def city(draw):
    return draw.choice(("Brest", "Saint-Malo", "Le Havre"))


def mixed(draw):
    """Two answers, of which the last alone has reasoning, and a question at the end."""
    cell = plain(draw)
    why, last = words(draw), words(draw)
    cell.messages[3]["reasoning_content"] = why
    cell.messages.append({"role": "user", "content": last})
    return Cell(cell.messages, None, [cell.answers[0], [why, *cell.answers[1]]], cell.context)


def blank_thought(draw):
    cell = plain(draw)
    cell.messages[1]["reasoning_content"], cell.messages[3]["reasoning"] = "", " \n"
    return cell


def weighed(draw):
    cell = plain(draw)
    cell.messages[1]["weight"] = 0
    return Cell(cell.messages, None, [cell.answers[1]], [*cell.context, *cell.answers[0]])


def reasons_and_calls(draw):
    cell = calls({"harbour": city})(draw)
    why = words(draw)
    cell.messages[1]["reasoning"] = why
    cell.answers[0].append(why)
    return cell


def called(content, as_text):
    def make(draw):
        asked, result, said = words(draw), f"{draw.randrange(24)}:{draw.randrange(60):02d}", words(draw)
        arguments = {
            "harbour": draw.choice(("Brest", "Saint-Malo", "Le Havre")),
            "days": draw.randrange(71, 99),
        }
        given = json.dumps(arguments) if as_text else arguments
        call = {"id": "call00001", "type": "function", "function": {"name": "get_tide", "arguments": given}}
        properties = {"harbour": {"type": "string"}, "days": {"type": "integer"}}
        schema = {"type": "object", "properties": properties, "required": ["harbour"]}
        tool = {"name": "get_tide", "description": "High water", "parameters": schema}
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "name": "get_tide", "tool_call_id": "call00001", "content": result},
            {"role": "assistant", "content": said},
        ]
        trained = ["get_tide", "harbour", arguments["harbour"], "days", str(arguments["days"])]
        return Cell(messages, [{"type": "function", "function": tool}], [trained, [said]], [asked, result])

    return make


def nulls(draw):
    cell = plain(draw)
    for message in cell.messages:
        message |= dict.fromkeys(("name", "tool_calls", "reasoning_content", "weight"))
    return cell


KINDS = {
    "plain": plain,
    "system": under("system"),
    "developer": under("developer"),
    "one part": parts(1),
    "two parts": parts(2),
    "think": think(1),
    "think twice": think(2),
    "reasoning_content": reasoning,
    "call, null content": called(None, False),
    "call, arguments as text": called(None, True),
    "call, empty content": called("", False),
    "null keys": nulls,
}
COMMON = tuple(KINDS)
KINDS |= {
    "booleans and nulls": calls({"harbour": city, "exact": True, "old": False, "unit": None}),
    "nested arguments": calls({"place": {"harbour": city, "depths": [71.5, 3]}, "tags": ["calm", "deep"]}),
    "no arguments": calls({}),
    "two calls": calls({"harbour": city}, {"harbour": "Roscoff"}),
    "reasoning and call": reasons_and_calls,
    "late reasoning, open end": mixed,
    "blank reasoning": blank_thought,
    "weight 0": weighed,
}


def cells():
    every = list(itertools.product(sorted(stock_templates()), KINDS))
    seeds = (SEED, SEED + 1) if WHOLE else (SEED,)
    return [(name, kind, seed) for name, kind in sample(every, SAMPLE) for seed in seeds]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", cells(), ids=lambda cell: "-".join(map(str, cell)))


def test_row_values_are_trained_and_prompted_or_refused(cell):
    name, kind, seed = cell
    given = KINDS[kind](random.Random(f"{name} {kind} {seed}"))
    tokenizer = tokenizer_for(stock_templates()[name])
    row = row_of(given)
    other = KINDS[kind](random.Random(f"other words {seed}"))
    try:
        data = encode([row], tokenizer)
    except DataError as error:
        message = str(error)
        assert "row 1" in message
        assert "\n" not in message
        assert not_carried(tokenizer, given), f"refused, and yet the template prints all of it: {message}"
        if "--split-turns" in message:
            check(tokenizer, given, other, split=True)
        return
    assert data.examples == check(tokenizer, given, other).examples


def row_of(cell):
    return {"messages": cell.messages, **({"tools": cell.tools} if cell.tools else {})}


def check(tokenizer, given, other, split=False):
    chat = ChatFormat(tokenizer)
    answers = [i for i, turn in enumerate(given.messages) if turn["role"] == "assistant" and is_learnt(turn)]
    data, elsewhere = (encode([row_of(cell)], tokenizer, split_turns=split) for cell in (given, other))
    trained, others = trained_texts(tokenizer, data), trained_texts(tokenizer, elsewhere)
    assert len(trained) == len(answers)
    for number, ((example, start, said), index) in enumerate(zip(trained, answers, strict=True)):
        expected = given.answers[number]
        for text in expected:
            assert any(way in said for way in ways(text)), (text, said)
        assert said.endswith(chat.stop_texts), said
        assert said.count("</think>") <= 1, said
        assert frame(said, expected) == frame(others[number][2], other.answers[number]), said
        prompt = chat.prompt_tokens(given.messages[:index], tools=given.tools)
        assert list(example.tokens[:start]) == prompt
    whole = tokenizer.decode(data[-1].tokens)
    for text in given.context:
        assert text in whole
    assert not re.search(r"'type': 'text'|\"type\": \"text\"|\\\\\"|: None|'harbour'", whole), whole
    return data


def is_learnt(turn):
    return turn.get("weight") != 0


def ways(text):
    """How a value may be written."""
    return (text,) if isinstance(text, str) else text


def frame(said, expected):
    """What of an answer the template wrote, the same whatever the words of the row are."""
    for text in sorted({way for value in expected for way in ways(value)}, key=len, reverse=True):
        said = said.replace(text, "·")
    return "".join(said.split())


def trained_texts(tokenizer, data):
    """Of every answer: its example, where its prompt ends, and the text that is trained."""
    found = [
        (example, start, stop) for example in data for start, stop, learnt in segments(example) if learnt
    ]
    return [(example, start, tokenizer.decode(example.tokens[start:stop])) for example, start, stop in found]


def not_carried(tokenizer, given):
    """Whether in every plain form something of the conversation is missing from what transformers renders."""
    values = [text for answer in given.answers for text in answer] + given.context
    values += [tool["function"]["description"] for tool in given.tools or ()]
    for form in itertools.product(
        ("text", "parts"), ("object", "text"), ("reasoning_content", "thinking"), (0, 1)
    ):
        messages = [restated(message, *form) for message in given.messages]
        try:
            text = tokenizer.apply_chat_template(messages, tools=given.tools, tokenize=False)
        except Exception:
            continue
        carried = all(any(way in text for way in ways(value)) for value in values) and "'type'" not in text
        doubled = text.count("</think>") > len(given.answers)  # the template's own thought beside the row's
        if carried and not doubled and has_calls(tokenizer, given, text):
            return False
    return True


def has_calls(tokenizer, given, text):
    """Whether the function's name stands in a text more often than in the declarations."""
    if not given.tools:
        return True
    declared = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tools=given.tools, tokenize=False
    )
    return text.count("get_tide") > declared.count("get_tide")


def restated(message, content, arguments, key, as_system):
    made = {k: v for k, v in message.items() if v is not None}
    text = made.get("content", "")
    text = text if isinstance(text, str) else "".join(part["text"] for part in text)
    made["content"] = [{"type": "text", "text": text}] if content == "parts" else text
    for name in ("reasoning_content", "reasoning"):
        if why := made.pop(name, "").strip():
            made[key] = why
    if as_system and made["role"] == "developer":
        made["role"] = "system"
    for call in made.get("tool_calls", ()):
        given = call["function"]["arguments"]
        parsed = json.loads(given) if isinstance(given, str) else given
        written = json.dumps(parsed) if arguments == "text" else parsed
        made["tool_calls"] = [{**call, "function": {**call["function"], "arguments": written}}]
    return made


@pytest.mark.skipif(not WHOLE, reason="counts the whole sweep, for make sweep")
def test_refused_cells_are_those_the_template_cannot_write(capsys):
    refused = {}
    for name, kind in itertools.product(sorted(stock_templates()), COMMON):
        given = KINDS[kind](random.Random(f"{name} {kind} {SEED}"))
        try:
            encode([row_of(given)], tokenizer_for(stock_templates()[name]))
        except DataError as error:
            refused[name, kind] = str(error)
    with capsys.disabled():
        for (name, kind), message in refused.items():
            print(f"\n{name} × {kind}: {message}", end="")
        print(f"\n{len(refused)} of {len(stock_templates()) * len(COMMON)} cells are refused")
    assert len(refused) <= 100
