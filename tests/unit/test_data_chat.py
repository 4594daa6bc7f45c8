import data_tokenizers as have
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brushstroke.data import ChatFormat, encode, segments
from brushstroke.errors import DataError

CONVERSATION = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "It is noon."},
    {"role": "user", "content": "what is the time?"},
    {"role": "assistant", "content": "noon"},
]
STOCK = {
    "chatml": (have.CHATML, "<|im_end|>"),
    "llama3": (have.LLAMA3, "<|eot_id|>"),
    "gemma": (have.GEMMA, "<end_of_turn>"),
}


def trained_texts(tokenizer, example):
    return [tokenizer.decode(example.tokens[a:b]) for a, b, trained in segments(example) if trained]


def whole_text(tokenizer, example):
    return tokenizer.decode(example.tokens)


def one(tokenizer, messages, **options):
    (example,) = encode([{"messages": messages}], tokenizer, **options)
    return example


def refused(tokenizer, messages, *fragments, before=()):
    rows = [{"messages": turns} for turns in (*before, messages)]
    with pytest.raises(DataError) as caught:
        encode(rows, tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in (f"row {len(rows)}", *fragments):
        assert fragment in message, message


@pytest.mark.parametrize("name", STOCK)
def test_every_assistant_turn_and_its_end_is_trained_and_nothing_else(name):
    template, end = STOCK[name]
    tokenizer = have.byte_level(template)
    example = one(tokenizer, CONVERSATION)
    assert trained_texts(tokenizer, example) == [f"It is noon.{end}", f"noon{end}"]
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert whole_text(tokenizer, example) == rendered
    assert list(example.tokens) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_the_end_token_is_trained_though_it_is_the_pad_token():
    tokenizer = have.byte_level(have.CHATML)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = one(tokenizer, CONVERSATION)
    ends = [i for i, token in enumerate(example.tokens) if token == tokenizer.eos_token_id]
    assert [example.weights[i] for i in ends] == [0.0, 0.0, 1.0, 0.0, 1.0]


def test_tokens_after_the_end_of_turn_are_not_trained():
    tokenizer = have.byte_level(have.CHATML)
    example = one(tokenizer, CONVERSATION[:2])
    assert tokenizer.decode(example.tokens[-1:]) == "\n"
    assert example.weights[-2:] == (1.0, 0.0)


def test_an_answer_that_spells_the_end_token_is_trained_to_its_true_end():
    tokenizer = have.byte_level(have.CHATML)
    answer = "write <|im_end|> at the end"
    example = one(tokenizer, [CONVERSATION[0], {"role": "assistant", "content": answer}])
    assert trained_texts(tokenizer, example) == [answer + "<|im_end|>"]


@pytest.mark.parametrize("name", STOCK)
@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(
        st.tuples(*[st.text(st.sampled_from("ab \n{<|'"), max_size=8)] * 2), min_size=1, max_size=3
    )
)
def test_training_and_generation_use_the_same_prompts(name, turns):
    tokenizer = have.byte_level(STOCK[name][0])
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    example = one(tokenizer, messages)
    chat = ChatFormat(tokenizer)
    starts = [start for start, _, trained in segments(example) if trained]
    prompts = [chat.prompt_tokens(messages[: 2 * i + 1]) for i in range(len(turns))]
    assert [list(example.tokens[:start]) for start in starts] == prompts


def test_reasoning_that_a_template_drops_later_is_refused_or_split_by_turns():
    tokenizer = have.byte_level(have.QWEN3)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nIt is noon."},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "noon"},
    ]
    refused(tokenizer, messages, "reasoning of message 2", "once the conversation continues", "--split-turns")
    data = encode([{"messages": messages}], tokenizer, split_turns=True)
    assert [trained_texts(tokenizer, example) for example in data] == [
        ["<think>\nhmm\n</think>\n\nIt is noon.<|im_end|>"],
        ["<think>\n\n</think>\n\nnoon<|im_end|>"],
    ]
    assert [example.row for example in data] == [1, 1]
    assert "hmm" not in whole_text(tokenizer, data[1])
    chat = ChatFormat(tokenizer)
    for example, index in zip(data, (1, 3), strict=True):
        assert list(example.tokens[: example.first_target]) == chat.prompt_tokens(messages[:index])
    assert data.report.rows == 1
    assert data.report.examples == 2


def test_another_end_for_the_last_answer_makes_an_example_of_every_turn():
    tokenizer = have.byte_level(have.LAST_IS_DIFFERENT)
    data = encode([{"messages": CONVERSATION}], tokenizer)
    assert [trained_texts(tokenizer, example) for example in data] == [
        ["It is noon.<|im_end|>"],
        ["noon<|im_end|>"],
    ]


def test_prompt_ends_with_the_common_beginning_of_trained_answers():
    tokenizer = have.byte_level(have.OPENS_THOUGHT)
    example, chat = one(tokenizer, CONVERSATION), ChatFormat(tokenizer)
    assert trained_texts(tokenizer, example) == ["It is noon.<|im_end|>", "noon<|im_end|>"]
    prompt = chat.prompt_tokens(CONVERSATION[:1])
    assert list(example.tokens[: example.first_target]) == prompt
    assert tokenizer.decode(prompt).endswith("<|assistant|>")
    # The template of the adapter asks so in other programs too, and prints all else as before.
    tokenizer.chat_template = chat.template
    asked = tokenizer.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, tokenize=False)
    assert asked == tokenizer.decode(prompt)
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert whole == whole_text(tokenizer, example)
    assert ChatFormat(tokenizer).template == chat.template
    stock = ChatFormat(have.byte_level(have.OPENS_THOUGHT), as_trained=False)
    assert tokenizer.decode(stock.prompt_tokens(CONVERSATION[:1])).endswith("<|assistant|><think>\n")


def test_a_template_without_an_end_of_turn_gets_the_end_token_after_every_answer():
    tokenizer = have.byte_level(have.PLAIN, eos="<|endoftext|>")
    data = encode([{"messages": CONVERSATION}], tokenizer)
    assert [trained_texts(tokenizer, example) for example in data] == [
        ["It is noon.\n<|endoftext|>"],
        ["noon\n<|endoftext|>"],
    ]
    assert ChatFormat(tokenizer).stop_texts == ("<|endoftext|>",)


def test_leading_space_of_a_tokenizer_is_not_added_inside_a_row():
    tokenizer = have.sentencepiece_like(have.LLAMA2)
    example = one(tokenizer, CONVERSATION)
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert list(example.tokens) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert [text.strip() for text in trained_texts(tokenizer, example)] == ["It is noon. </s>", "noon </s>"]
    chat = ChatFormat(tokenizer)
    assert list(example.tokens[: example.first_target]) == chat.prompt_tokens(CONVERSATION[:1])


def test_stop_tokens_are_the_end_of_turn_and_the_end_token():
    chat = ChatFormat(have.byte_level(have.LLAMA3, eos="<|endoftext|>"))
    assert chat.stop_texts == ("<|eot_id|>", "<|endoftext|>")
    assert chat.stop_token_ids == tuple(chat.tokenizer.convert_tokens_to_ids(list(chat.stop_texts)))
    assert ChatFormat(have.byte_level(have.CHATML)).stop_texts == ("<|im_end|>",)
    assert ChatFormat(have.byte_level()).stop_texts == ("<|im_end|>",)


def test_end_marker_that_is_not_a_token_is_a_stop_string():
    tokenizer = have.byte_level(have.CHATML.replace("<|im_end|>", "<|stop|>"), eos="<|endoftext|>")
    chat = ChatFormat(tokenizer)
    assert (chat.stop_strings, chat.stop_token_ids) == (("<|stop|>",), (tokenizer.eos_token_id,))
    example = one(tokenizer, CONVERSATION)
    assert trained_texts(tokenizer, example) == ["It is noon.<|stop|>", "noon<|stop|>"]


def test_a_given_template_replaces_the_tokenizers_own():
    tokenizer = have.byte_level(have.CHATML)
    chat = ChatFormat(tokenizer, have.LLAMA3)
    assert chat.template == have.LLAMA3
    asked = chat.tokenizer.decode(chat.prompt_tokens(CONVERSATION[:1]))
    assert asked.startswith("<|begin|><|start_header_id|>")
    example = one(tokenizer, CONVERSATION[:2], chat_template=have.LLAMA3)
    assert trained_texts(tokenizer, example) == ["It is noon.<|eot_id|>"]


def test_a_text_as_prompt_is_a_user_turn_or_the_beginning_of_a_text():
    chat = ChatFormat(have.byte_level(have.CHATML))
    assert chat.has_template
    assert chat.prompt_tokens("hello") == chat.prompt_tokens([{"role": "user", "content": "hello"}])
    plain = have.byte_level()
    assert not ChatFormat(plain).has_template
    assert ChatFormat(plain).prompt_tokens("hello") == plain("hello")["input_ids"]
    begins = have.byte_level(adds_bos=True)
    assert ChatFormat(begins).prompt_tokens("hello") == begins("hello")["input_ids"]


def test_default_and_given_system_messages_are_counted_by_role():
    tokenizer = have.byte_level(have.CHATML)
    example = one(tokenizer, CONVERSATION[:2])
    assert set(example.roles) == {"template", "user", "assistant"}
    assert sum(example.roles.values()) == len(example)
    assert example.roles["assistant"] == example.trained
    assert example.roles["user"] == len(tokenizer("hello there", add_special_tokens=False)["input_ids"])
    own = one(tokenizer, [{"role": "system", "content": "Answer with one JSON object."}, *CONVERSATION])
    assert own.roles["system"] > 0


def test_a_conversation_may_begin_with_an_answer_and_end_with_a_question():
    tokenizer = have.byte_level(have.CHATML)
    example = one(tokenizer, [CONVERSATION[1], CONVERSATION[2]])
    assert trained_texts(tokenizer, example) == ["It is noon.<|im_end|>"]
    assert whole_text(tokenizer, example).endswith("time?<|im_end|>\n")


def test_extra_keys_and_tools_are_passed_to_the_template():
    written = "(message['content'] or '') + (message.tool_calls | tojson if message.tool_calls else '')"
    template = have.CHATML.replace("message['content']", f"{written} + (message.mood or '')")
    template = "{{ tools | tojson if tools else '' }}" + template
    tokenizer = have.byte_level(template)
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    messages = [
        {**CONVERSATION[0], "mood": "merry"},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    (example,) = encode([{"messages": messages, "tools": [{"name": "clock"}]}], tokenizer)
    assert "clock" in trained_texts(tokenizer, example)[0]
    assert "merry" in whole_text(tokenizer, example)
    assert whole_text(tokenizer, example).startswith('[{"name": "clock"}]')


@pytest.mark.parametrize(
    ("messages", "fragments"),
    [
        (
            [{"role": "asistant", "content": "a"}],
            ("message 1", "'asistant'", "did you mean 'assistant'", "developer"),
        ),
        (
            [{"role": "bot", "content": "a"}],
            ("unknown role 'bot'", "system, user, assistant, tool, developer"),
        ),
        ([{"content": "a"}], ("message 1 has no role",)),
        ([CONVERSATION[0], {"role": "assistant", "content": None}], ("message 2 (assistant)", "null")),
        ([CONVERSATION[0], {"role": "assistant"}], ("message 2 (assistant)", "no content")),
        ([CONVERSATION[0], {"role": "assistant", "content": 5}], ("message 2", "a number (5)")),
        (
            [CONVERSATION[0], {"role": "assistant", "content": [{"type": "image"}]}],
            ("message 2", "only text"),
        ),
        ([{"role": "user", "content": "\ud800"}], ("message 1", "surrogate")),
        (["hello"], ("message 1 is text",)),
        ("hello", ("'messages' is text", "list")),
        (None, ("'messages' is null",)),
        ([], ("empty",)),
        (CONVERSATION[:1], ("no assistant turn", "add the answer")),
    ],
)
def test_a_malformed_conversation_is_refused_with_its_row(messages, fragments):
    refused(have.byte_level(have.CHATML), messages, *fragments, before=[CONVERSATION])


def test_template_error_names_the_row():
    tokenizer = have.byte_level(have.GEMMA)
    system = {"role": "system", "content": "a"}
    refused(tokenizer, [system, *CONVERSATION], "System role not supported", before=[CONVERSATION])
    refused(tokenizer, [CONVERSATION[0], *CONVERSATION], "must alternate", before=[CONVERSATION])
    refused(have.byte_level("{% if %}"), CONVERSATION, "chat template refuses", "--chat-template")


def test_template_without_clear_answer_start_is_refused():
    hides = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"
    refused(
        have.byte_level(hides), CONVERSATION[:2], "the beginning of the answer in message 2 cannot be found"
    )


def test_messages_without_template_error_suggests_alternatives():
    refused(have.byte_level(), CONVERSATION, "no chat template", "prompt and completion")
