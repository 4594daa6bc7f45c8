import dataclasses

import pytest
import torch
from inference_kit import OTHER_TEMPLATE, TEMPLATE, adapter, answered, base, gpt2, llama
from transformers import GenerationConfig

from brushstroke.base import context_length
from brushstroke.data import ChatFormat, Example
from brushstroke.errors import ConfigError, DataError, RouteError
from brushstroke.inference import Answer, generate
from brushstroke.inference.loss import evaluate_loss
from brushstroke.inference.request import Request, SamplingParams
from brushstroke.layers import attach, bank
from brushstroke.merging import merge

PROMPTS = ["hi", "a much longer prompt than the others, by far", "what?", "tell me more", "x"]
MODELS = {"llama": llama, "gpt2": gpt2}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_mixed_batch_answers_as_each_request_alone(kind, num_beams):
    b = base(MODELS[kind]())
    adapters = {"a": adapter(b, 1), "b": adapter(b, 2)}
    rows = ["a", None, "b", "a", None]
    mixed = generate(b, PROMPTS, adapters=adapters, rows=rows, max_new_tokens=12, num_beams=num_beams)
    alone = [
        generate(b, prompt, adapters=adapters, rows=[row], max_new_tokens=12, num_beams=num_beams)[0]
        for prompt, row in zip(PROMPTS, rows, strict=True)
    ]
    assert mixed == alone
    assert [answer.adapter for answer in mixed] == rows


def test_small_batches_give_the_same_answers_in_the_order_of_the_prompts():
    b = base()
    whole = generate(b, PROMPTS, max_new_tokens=8)
    assert generate(b, PROMPTS, max_new_tokens=8, batch_size=2) == whole


def test_an_adapter_answers_as_the_merged_model():
    b = base()
    a = adapter(b)
    assert [x.tokens for x in generate(b, PROMPTS, adapters=a, max_new_tokens=10)] == [
        x.tokens for x in generate(merge(b, a), PROMPTS, max_new_tokens=10)
    ]
    assert generate(b, "hi", adapters=a, max_new_tokens=3)[0].adapter == "adapter"


def test_generate_leaves_the_base_unchanged_and_uses_an_attached_adapter():
    b = base()
    a = adapter(b)
    before = {name: value.clone() for name, value in b.model.state_dict().items()}
    expected = generate(b, "hi", adapters=a, max_new_tokens=6)[0].tokens
    after = b.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with attach(b, a):
        assert generate(b, "hi", max_new_tokens=6)[0].tokens == expected


def test_given_bank_stays_and_its_active_route_is_used():
    b = base()
    a = adapter(b)
    with bank(b, {"a": a}) as loaded:
        assert generate(b, PROMPTS, adapters=loaded, max_new_tokens=4) == generate(
            b, PROMPTS, max_new_tokens=4
        )
        loaded.use("a")
        answers = generate(b, PROMPTS, adapters=loaded, max_new_tokens=4)
        assert {answer.adapter for answer in answers} == {"a"}
        assert loaded.names == ("a",)


def test_per_row_route_requires_the_bank_argument():
    b = base()
    prompts = ["hi", "what else is there", "no"]  # answered by length, the longest first
    with bank(b, {"a": adapter(b, 1), "other": adapter(b, 2)}) as loaded:
        rows = ["a", "other", None]
        expected = generate(b, prompts, adapters=loaded, rows=rows, max_new_tokens=6)
        with loaded.rows(rows):
            assert generate(b, prompts, adapters=loaded, max_new_tokens=6) == expected
            for adapters in (None, {}):
                with pytest.raises(RouteError, match="the active route assigns adapters to 3 rows"):
                    generate(b, prompts, adapters=adapters, max_new_tokens=6)
            with pytest.raises(RouteError, match="the active route assigns adapters to 3 rows"):
                evaluate_loss(b, [Example((1, 2), (0.0, 1.0))])
        loaded.use("other")
        alone = generate(b, prompts, adapters=loaded, rows="other", max_new_tokens=6)
        assert [x.tokens for x in generate(b, prompts, max_new_tokens=6)] == [x.tokens for x in alone]


def test_each_row_is_written_with_the_template_that_its_adapter_was_trained_with():
    b = base()
    a = adapter(b, 1)
    other = adapter(b, 2)
    other = other.with_card(dataclasses.replace(other.card, chat_template=OTHER_TEMPLATE))
    mixed = generate(
        b, ["hi", "hi", "hi"], adapters={"a": a, "other": other}, rows=["a", "other", None], max_new_tokens=6
    )
    for answer, adapters, template in zip(
        mixed, [a, other, None], [TEMPLATE, OTHER_TEMPLATE, TEMPLATE], strict=True
    ):
        prompt = ChatFormat(b.tokenizer, template).prompt_tokens("hi")
        request = Request(tuple(prompt), None if adapters is None else "x", (261,))
        with bank(b, {} if adapters is None else {"x": adapters}) as loaded:
            (output,) = answered(b, [request], SamplingParams(6), bank=loaded)
        assert output.tokens[: len(answer.tokens)] == answer.tokens


def test_answer_ends_at_end_of_turn_with_stop_reason():
    b = base()
    first = generate(b, "hi", max_new_tokens=5)[0].tokens
    stop = first[2]
    (output,) = answered(
        b, [Request(tuple(ChatFormat(b.tokenizer).prompt_tokens("hi")), None, (stop,))], SamplingParams(5)
    )
    assert output.tokens == first[: first.index(stop)]
    assert output.finish == "stop"
    assert generate(b, "hi", max_new_tokens=5)[0].finish == "length"


def test_rows_with_other_stop_tokens_do_not_stop_each_other():
    b = base()
    prompt = tuple(ChatFormat(b.tokenizer).prompt_tokens("hi"))
    (free,) = answered(b, [Request(prompt)], SamplingParams(6))
    requests = [Request(prompt, None, (free.tokens[1],)), Request(prompt)]
    stopped, going = answered(b, requests, SamplingParams(6))
    assert stopped.finish == "stop"
    assert going == free


def test_sampling_defaults_of_the_model_are_not_used(capfd):
    b = base()
    greedy = generate(b, PROMPTS, max_new_tokens=8)
    stops = b.model.generation_config.eos_token_id
    ours = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, num_beams=2, eos_token_id=stops
    )
    b.model.generation_config = ours
    assert generate(b, PROMPTS, max_new_tokens=8) == greedy
    assert b.model.generation_config is ours
    assert capfd.readouterr() == ("", "")


def test_sampling_depends_only_on_the_seed():
    b = base()
    state = torch.random.get_rng_state()
    draws = [generate(b, PROMPTS, max_new_tokens=8, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_in_training_mode_answers_in_evaluation_mode():
    b = base(gpt2(resid_pdrop=0.5))
    expected = generate(b, "hi", max_new_tokens=8)
    b.model.train()
    assert generate(b, "hi", max_new_tokens=8) == expected
    assert all(module.training for module in b.model.modules())


def test_without_a_template_a_prompt_is_the_beginning_of_a_text():
    b = base(template=None)
    (answer,) = generate(b, "ab", max_new_tokens=4)
    ids = b.tokenizer("ab", return_tensors="pt", add_special_tokens=False).input_ids
    out = b.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert answer.tokens == tuple(out[0, 2:].tolist())


def test_conversations_as_prompts_and_empty_list():
    b = base()
    (answer,) = generate(b, [[{"role": "user", "content": "hi"}]], max_new_tokens=4)
    assert answer == generate(b, "hi", max_new_tokens=4)[0]
    assert isinstance(answer, Answer)
    assert generate(b, []) == []


def test_prompt_without_room_for_an_answer_is_named():
    b = base()
    assert context_length(b.model) == 256
    with pytest.raises(DataError, match=r"prompt 2 has \d+ tokens; with room for 16 .* context of 256"):
        generate(b, ["hi", "y" * 250], max_new_tokens=16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens must be"),
        ({"temperature": -1.0}, ConfigError, "temperature must be"),
        ({"temperature": float("nan")}, ConfigError, "temperature must be"),
        ({"top_p": 0.0}, ConfigError, "top_p must be"),
        ({"batch_size": True}, ConfigError, "batch_size must be"),
        ({"temperature": True}, ConfigError, "temperature must be"),
        ({"rows": "nobody"}, RouteError, "none were given"),
        ({"rows": [None]}, RouteError, "2 prompts and 1 rows"),
    ],
)
def test_invalid_settings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        generate(base(), ["a", "b"], **arguments)


def test_ambiguous_adapter_names_are_refused():
    b = base()
    adapters = {"poems": adapter(b, 1), "legal": adapter(b, 2)}
    with pytest.raises(RouteError, match="say with rows="):
        generate(b, ["a"], adapters=adapters)
    with pytest.raises(RouteError, match="did you mean 'poems'"):
        generate(b, ["a"], adapters=adapters, rows="poem")
    with pytest.raises(Exception, match=r"single message|type-check"):
        generate(b, [{"role": "user", "content": "hi"}])  # type: ignore[list-item]
    with pytest.raises(Exception, match=r"single message|type-check"):
        generate(b, {"role": "user", "content": "hi"})  # type: ignore[arg-type]
    with bank(base(), {}) as loaded, pytest.raises(RouteError, match="another model"):
        generate(b, ["a"], adapters=loaded)
