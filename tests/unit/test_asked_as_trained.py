"""Generation uses the prompts of training: generation prompts, dates, stops, templates, tools."""

import json
from datetime import date
from pathlib import Path

import inference_kit as kit
import pytest
import torch
from transformers import AutoTokenizer

import brushstroke as bs
from brushstroke.data import ChatFormat, DataWarning, encode, find_template, read_prompt, segments
from brushstroke.data import template as templates
from brushstroke.errors import ConfigError, DataError, ResumeError
from brushstroke.formats import load, save
from brushstroke.inference import Request, SamplingParams, evaluate, generate
from brushstroke.inference.generate import PromptEncoder
from brushstroke.inference.stops import Stops
from brushstroke.merging import merge_folder

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + kit.TEMPLATE
OPENS = kit.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
TOOLS = [
    {"type": "function", "function": {"name": "clock", "description": "Tells the time", "parameters": {}}}
]
CALLS = (
    "{{ tools | tojson if tools else '' }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [{"prompt": f"n{i}", "completion": f"{i}"} for i in range(6)]


def on(monkeypatch, day: str) -> None:
    class Day(date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(templates, "date", Day)


def asked(tokenizer, *, template=None, **options) -> str:
    return tokenizer.decode(ChatFormat(tokenizer, template, **options).prompt_tokens("hi"))


def test_template_prints_the_given_date(monkeypatch):
    on(monkeypatch, "2026-03-04")
    tokenizer = kit.tokenizer(DATED)
    assert asked(tokenizer).startswith("Today: 04 Mar 2026\n")
    chat = ChatFormat(tokenizer, date="2025-12-31")
    assert chat.date == "2025-12-31"
    assert asked(tokenizer, date="2025-12-31").startswith("Today: 31 Dec 2025\n")
    assert asked(tokenizer, template=chat.template).startswith("Today: 31 Dec 2025\n")
    assert asked(tokenizer, template=chat.template, date="2024-02-29").startswith("Today: 29 Feb 2024\n")
    assert ChatFormat(kit.tokenizer()).date is None
    with pytest.raises(ConfigError, match="YYYY-MM-DD"):
        ChatFormat(tokenizer, date="yesterday")


def test_every_directive_of_a_date_prints_as_strftime_prints_it():
    day = date(2026, 3, 4)
    forms = ["%Y-%m-%d", "%d %B %Y", "%B %d, %Y", "%a %-d %b %y", "%A, day %j", "%F", "%H:%M"]
    source = "".join(f"{{{{ strftime_now({form!r}) }}}}|" for form in forms)
    tokenizer = kit.tokenizer(templates.with_date(source, "2026-03-04"))
    printed = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert printed.split("|")[:-1] == [day.strftime(form) for form in forms]


def test_resuming_on_the_next_day_trains_the_same_bits(monkeypatch, tmp_path: Path):
    config = bs.TrainConfig(max_steps=4, batch_size=2, checkpoint_every=2, learning_rate=1e-2)
    base = lambda: kit.base(template=DATED)  # noqa: E731
    on(monkeypatch, "2026-03-04")
    whole = bs.train(base(), ROWS, bs.LoraConfig(rank=2), config, out=tmp_path / "whole")

    def stop(event):
        if event.step == 3:
            raise RuntimeError("the machine goes")

    with pytest.raises(RuntimeError):
        bs.train(base(), ROWS, bs.LoraConfig(rank=2), config, out=tmp_path / "run", on_step=stop)
    on(monkeypatch, "2026-03-05")
    resumed = bs.train(base(), ROWS, bs.LoraConfig(rank=2), config, out=tmp_path / "run", resume=True)
    assert resumed.resumed_from == 2
    for site in whole.adapter:
        assert torch.equal(whole.adapter[site].dense(), resumed.adapter[site].dense())
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["date"] == "2026-03-04"
    assert bs.train(
        base(), ROWS, bs.LoraConfig(rank=2), config, out=tmp_path / "run", resume=True
    ).resumed_from
    given = bs.TrainConfig(**{**config.as_dict(), "date": "2026-03-05"})
    with pytest.raises(ResumeError, match="date: now '2026-03-05', then '2026-03-04'"):
        bs.train(base(), ROWS, bs.LoraConfig(rank=2), given, out=tmp_path / "run", resume=True)
    # The adapter's own template has the day of training, for every program that asks with it.
    tokenizer = kit.tokenizer((tmp_path / "run" / "chat_template.jinja").read_text())
    turn = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False).startswith("Today: 04 Mar 2026\n")


def test_adapter_uses_training_prompt_and_base_its_own_template():
    base = kit.base(template=OPENS)
    trained = bs.train(base, ROWS, bs.LoraConfig(rank=2), bs.TrainConfig(max_steps=1)).adapter
    with bs.bank(base, {"a": trained}) as bank:
        encoder = PromptEncoder(base, bank)
        prompts = {
            name: base.tokenizer.decode(encoder.request("n1", name, source="it").tokens)
            for name in ("a", None)
        }
    assert prompts["a"].endswith("<|im_start|>assistant\n")
    assert prompts[None] == prompts["a"] + "<think>\n"
    example = encode(ROWS[1:2], base.tokenizer)[0]
    assert prompts["a"] == base.tokenizer.decode(example.tokens[: example.first_target])


def test_stop_tokens_of_model_card_and_template_are_all_used():
    base = kit.base(template=kit.OTHER_TEMPLATE.replace("<|end|>", "<|halt|>"))
    base.model.generation_config.eos_token_id = [5, 6]
    trained = bs.train(base, ROWS, bs.LoraConfig(rank=2), bs.TrainConfig(max_steps=1)).adapter
    assert trained.card.stop_tokens == ("<|halt|>", "<|im_end|>")
    with bs.bank(
        base, {"a": trained.with_card(trained.card.with_changes(stop_tokens=("<|end|>", "STOP")))}
    ) as b:
        request = PromptEncoder(base, b).request("x", "a", source="it")
    ids = base.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>"])
    assert request.stop_token_ids == (*ids, 5, 6)
    assert request.stop_strings == ("<|halt|>", "STOP")


def test_an_answer_ends_at_a_string_of_several_tokens():
    tokenizer = kit.tokenizer()
    stops = Stops(tokenizer, Request((1,), stop_token_ids=(7,), stop_strings=("</s>", "END")))
    said = tokenizer("noon</s>more")["input_ids"]
    output = stops.output(said)
    assert (output.finish, output.stop_string) == ("stop", "</s>")
    assert tokenizer.decode(output.tokens) == "noon</s>"
    assert stops.output(tokenizer("noon")["input_ids"]).finish == "length"
    before = stops.output([*tokenizer("noon")["input_ids"], 7, *tokenizer("</s>")["input_ids"]])
    assert (before.finish, before.stop_string, tokenizer.decode(before.tokens)) == ("stop", None, "noon")
    rows = torch.tensor([tokenizer("xx</s>")["input_ids"], tokenizer("</s>xx")["input_ids"]])
    assert stops.reached(rows, 2).tolist() == [True, False]


@pytest.mark.parametrize("count", [1, 3])
def test_generation_halts_at_the_string(count):
    base = kit.base()
    prompts = [f"hi {i}" for i in range(count)]
    free = generate(base, prompts, max_new_tokens=24)
    long = next(answer for answer in free if len(answer.tokens) > 12)
    text = base.tokenizer.decode(list(long.tokens))
    string = text[6:9]
    encoder = PromptEncoder(base, None)
    requests = [encoder.request(prompt, None, source="it") for prompt in prompts]
    halting = [Request(r.tokens, None, r.stop_token_ids, r.source, (string,)) for r in requests]
    outputs = kit.answered(base, halting, SamplingParams(max_new_tokens=24))
    for answer, output in zip(free, outputs, strict=True):
        whole = base.tokenizer.decode(list(answer.tokens))
        if string in whole:
            assert (output.finish, output.stop_string) == ("stop", string)
            assert encoder.raw(output) == whole[: whole.find(string)]
        else:
            assert output.tokens == answer.tokens


@pytest.mark.parametrize("where", ["file", "settings", "named settings", "named files"])
def test_the_template_of_another_tools_adapter_is_read(tmp_path: Path, where: str):
    base = kit.base()
    folder = save(kit.adapter(base), tmp_path / "adapter")
    (folder / "brushstroke.json").unlink()
    named = {"default": kit.OTHER_TEMPLATE, "tool_use": CALLS}
    if "file" in where:
        (folder / "chat_template.jinja").write_text(kit.OTHER_TEMPLATE)
    if where == "named files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CALLS)
    if "settings" in where:
        listed = [{"name": name, "template": text} for name, text in named.items()]
        stored = {"chat_template": listed if where == "named settings" else kit.OTHER_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    chat = ChatFormat(base.tokenizer, load(folder).card.chat_template)
    assert base.tokenizer.decode(chat.prompt_tokens("hi")) == "[user]hi<|end|>[assistant]"
    if "named" in where:
        with_tools = base.tokenizer.decode(chat.prompt_tokens("hi", tools=TOOLS))
        assert with_tools.startswith('[{"type": "function"')


def test_rows_with_tools_use_the_tool_template():
    tokenizer = kit.tokenizer()
    tokenizer.chat_template = {"default": kit.OTHER_TEMPLATE, "tool_use": CALLS, "rag": "{{ nothing }}"}
    plain, tooled = ({**ROWS[0]}, {**ROWS[0], "tools": TOOLS})
    texts = [tokenizer.decode(encode([row], tokenizer)[0].tokens) for row in (plain, tooled)]
    assert texts[0] == "[user]n0<|end|>[assistant]0<|end|>"
    assert texts[1].startswith('[{"type": "function"')
    # What is saved chooses as transformers does.
    merged = kit.tokenizer(ChatFormat(tokenizer).template)
    assert [merged.decode(encode([row], merged)[0].tokens) for row in (plain, tooled)] == texts
    tokenizer.chat_template = {"rag": "{{ nothing }}"}
    with pytest.raises(DataError, match="none has the name default"):
        encode([plain], tokenizer)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "alpaca"])
def test_included_templates_write_conversations(name):
    tokenizer = kit.tokenizer(None)
    messages = [
        {"role": "system", "content": "Be short."},
        *({"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")),
    ]
    (example,) = encode([{"messages": messages}], tokenizer, chat_template=name)
    learnt = [tokenizer.decode(example.tokens[a:b]) for a, b, trained in segments(example) if trained]
    assert [text.startswith(f"assistant {i}") for i, text in enumerate(learnt)] == [True, True]
    assert len({text.removeprefix(f"assistant {i}") for i, text in enumerate(learnt)}) == 1
    assert "Be short." in tokenizer.decode(example.tokens)


def test_included_chatml_writes_tools_and_reasoning():
    tokenizer = kit.tokenizer(None)
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [call, call]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    data = encode([{"messages": messages, "tools": TOOLS}], tokenizer, chat_template="chatml")
    (example,) = data
    learnt = [tokenizer.decode(example.tokens[a:b]) for a, b, trained in segments(example) if trained]
    call_text = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
    assert learnt == [f"<think>\nask\n</think>\n\n{call_text}\n{call_text}<|im_end|>", "Noon.<|im_end|>"]
    reply = ChatFormat(tokenizer, None).read_reply(learnt[0])
    assert reply.tool_calls == ()  # without the template nobody knows what a call is


def test_unknown_template_file_or_name_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no chat template 'chatm'.*did you mean 'chatml'"):
        encode(ROWS, kit.tokenizer(), chat_template="chatm")
    file = tmp_path / "own.jinja"
    file.write_text(kit.OTHER_TEMPLATE)
    tokenizer = kit.tokenizer()
    (example,) = encode(ROWS[:1], tokenizer, chat_template=file)
    assert tokenizer.decode(example.tokens) == "[user]n0<|end|>[assistant]0<|end|>"


def test_evaluate_compares_tool_calls_by_value():
    base = kit.base(template=CALLS)
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC", "n": 1}}}
    row = {
        "messages": [
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": TOOLS,
    }
    found = evaluate(base, [row], max_new_tokens=4)
    assert found.exact_match == 0.0
    (record,) = found.answers
    assert record["expected_calls"] == [{"name": "clock", "arguments": {"zone": "UTC", "n": 1}}]
    assert record["calls"] == []
    chat = ChatFormat(base.tokenizer)
    expected, written = chat.last_answer(
        bs.data.read_row(row, bs.data.find_columns(bs.data.read_rows([row])), "r"), where="r"
    )
    assert chat.read_reply(written, TOOLS).calls_like(expected)
    other = '<call>{"arguments": {"n": 1, "zone": "UTC"}, "name": "clock"}</call>'
    assert not chat.read_reply(other.replace("UTC", "CET"), TOOLS).calls_like(expected)


def test_empty_expected_answer_is_not_scored():
    row = {"messages": [{"role": "user", "content": "time?"}, {"role": "assistant", "content": ""}]}
    assert evaluate(kit.base(), [row], max_new_tokens=2).exact_match is None


def test_generate_accepts_tools_and_conversations_with_tools():
    base = kit.base(template=CALLS)
    with_tools = bs.data.read_conversation([{"role": "user", "content": "hi"}], tools=TOOLS, where="it")
    plain, given, own = (
        generate(base, prompts, max_new_tokens=4, **options)
        for prompts, options in ((["hi"], {}), (["hi"], {"tools": TOOLS}), ([with_tools], {}))
    )
    assert given == own != plain


def test_merged_folder_uses_the_training_prompt(tmp_path: Path):
    base = kit.base(template=OPENS)
    trained = bs.train(base, ROWS, bs.LoraConfig(rank=2), bs.TrainConfig(max_steps=1)).adapter
    bs.merge_folder(base, trained, tmp_path / "merged", verify=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "n1"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    example = encode(ROWS[1:2], base.tokenizer)[0]
    assert prompt == list(example.tokens[: example.first_target])


def test_unused_date_is_reported():
    with pytest.warns(DataWarning, match="2026-01-31 is not used"):
        ChatFormat(kit.tokenizer(), date="2026-01-31")


def test_template_is_read_from_json_and_empty_file_is_refused(tmp_path: Path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": kit.TEMPLATE}))
    assert find_template(tmp_path / "chat_template.json") == kit.TEMPLATE
    for name, text in (("empty.jinja", ""), ("other.json", "{}"), ("bad.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match="contains no chat template"):
            find_template(tmp_path / name)


def test_generation_and_training_read_rows_equally():
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "a"}]
    row = {"prompt": "other", "messages": messages}
    assert read_prompt(row, "row 1").messages == ({"role": "user", "content": "first"},)


def test_plain_transformers_stop_where_the_adapters_answers_end(tmp_path: Path):
    base = kit.base(template=kit.OTHER_TEMPLATE)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    trained = bs.train(base, ROWS, bs.LoraConfig(rank=2), bs.TrainConfig(max_steps=1)).adapter
    report = merge_folder(tmp_path / "base", trained, tmp_path / "out", verify=False)
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    ends = base.tokenizer.convert_tokens_to_ids(list(trained.card.stop_tokens))
    assert set(ends) <= set([stops] if isinstance(stops, int) else stops)
    assert "<|end|>" in report.stop_tokens_saved


def test_evaluate_scores_extra_calls_and_other_values_as_wrong():
    tokenizer = kit.tokenizer(CALLS)
    chat = ChatFormat(tokenizer)
    expected = chat.read_reply('<call>{"name": "clock", "arguments": {"city": "New York"}}</call>')
    other = chat.read_reply('<call>{"name": "clock", "arguments": {"city": "NewYork"}}</call>')
    assert not other.calls_like(expected)
    assert not expected.calls_like(chat.read_reply("Let me look."))
