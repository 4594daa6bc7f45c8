import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from inference_kit import OTHER_TEMPLATE, adapter, base, gpt2, llama, tokenizer

from brushstroke.base import Base
from brushstroke.data import encode
from brushstroke.errors import ConfigError, DataError
from brushstroke.inference import (
    evaluate,
    evaluate_loss,
    generate,
    json_object,
    loss,
    score,
)
from brushstroke.layers import attach, bank
from brushstroke.merging import merge

NATS = 1e-5  # fp32 logits, summed in another order
PAIRS = [{"prompt": f"q{i}" * (i + 1), "completion": f"answer {i}"} for i in range(5)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "second"},
        ]
    }
]


def plain_loss(model, examples) -> tuple[float, int]:
    """Each example alone, full logits, by the definition."""
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.tokens])).logits[0].double()
        nll = F.cross_entropy(logits[:-1], torch.tensor(example.tokens[1:]), reduction="none")
        total += float((nll * torch.tensor(example.weights[1:])).sum())
        count += example.trained
    return total, count


@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("budget", [2048, 60])
def test_the_loss_is_that_of_each_example_alone(model, budget, monkeypatch):
    monkeypatch.setattr(loss, "CPU_PASS_TOKENS", budget)
    examples = encode(PAIRS, tokenizer()).examples
    examples = (*examples, dataclasses.replace(examples[0], weights=(0.0, 0.5, *examples[0].weights[2:])))
    done = []
    got = evaluate_loss(model, examples, on_done=done.append)
    total, count = plain_loss(model, examples)
    assert got.total == pytest.approx(total, rel=NATS)
    assert got.trained_tokens == count
    assert got.mean == pytest.approx(total / count, rel=NATS)
    assert (done[-1], len(done) > 1) == (len(examples), budget == 60)
    assert evaluate_loss(model, []).mean is None


class Whole(torch.nn.Module):
    """A model that takes nothing but a padded batch, and gives the logits of all of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask, use_cache):
        return (self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache).logits,)


def test_a_model_that_cannot_run_packed_gives_the_same_loss():
    examples = encode(PAIRS, tokenizer()).examples
    whole = Whole(llama())
    with loss.loss_forward(whole) as forward:
        assert forward.name == "padded"
    assert evaluate_loss(whole, examples).total == pytest.approx(plain_loss(llama(), examples)[0], rel=NATS)
    assert evaluate_loss(whole, []).mean is None


@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_of_each_slot_of_a_bank_is_that_of_its_merged_model(model, packed):
    examples = encode(PAIRS, tokenizer()).examples
    adapters = {name: adapter(model, seed) for seed, name in enumerate("ab", start=1)}
    expected = [plain_loss(merge(Base(model), adapters[name]).model, examples)[0] for name in "ab"]
    expected = [plain_loss(model, examples)[0], *expected]
    with bank(model, adapters) as loaded, loss.loss_forward(model if packed else Whole(model)) as forward:
        assert forward.name == ("packed" if packed else "padded")
        slots = [loaded.slot(name) for name in (None, *"ab")]
        found = [loss.total_loss(forward, examples, slot).total for slot in slots]
        assert loaded.active != (None,)
    assert loaded.active == (None,)
    assert found == pytest.approx(expected, rel=1e-4)  # fp32 weights with the update folded in
    assert len({round(value, 3) for value in found}) == 3


def test_evaluating_an_adapter_equals_evaluating_the_merged_model():
    b = base()
    a = adapter(b)
    got, merged = (
        evaluate(b, PAIRS, adapters=a, max_new_tokens=8),
        evaluate(merge(b, a), PAIRS, max_new_tokens=8),
    )
    assert got.loss == pytest.approx(merged.loss, rel=1e-4)
    assert got.loss != pytest.approx(evaluate(b, PAIRS, generate=False).loss, rel=0.01)
    assert [x["answer"] for x in got.answers] == [x["answer"] for x in merged.answers]
    assert got.as_dict().keys() == {
        *("rows", "loss", "exact_match", "choice", "contains", "final_answer", "rouge_l", "valid_json"),
        *("field_f1", "seconds"),
    }
    json.dumps(got.as_dict())
    with attach(b, a):
        assert evaluate(b, PAIRS, generate=False).loss == pytest.approx(got.loss, rel=NATS)


def test_evaluate_answers_equal_generate_and_are_scored_against_expected():
    b = base()
    said = generate(b, [row["prompt"] for row in PAIRS], max_new_tokens=8)
    rows = [{"q": row["prompt"], "a": x.text} for row, x in zip(PAIRS, said, strict=True)]
    rows[0]["a"] = "something else"
    got = evaluate(b, rows, prompt_column="q", completion_column="a", max_new_tokens=8, batch_size=2)
    assert got.rows == 5
    assert got.exact_match == 0.8
    assert got.valid_json is None
    assert got.field_f1 is None
    assert got.answers[1] == {
        "row": 2,
        "prompt": rows[1]["q"],
        "expected": rows[1]["a"],
        "answer": said[1].text,
        "adapter": None,
    }


def test_conversations_are_scored_on_their_last_answer():
    b = base()
    got = evaluate(b, TALKS, max_new_tokens=8)
    (answer,) = got.answers
    assert answer["expected"] == "second"
    assert answer["answer"] == generate(b, [TALKS[0]["messages"][:3]], max_new_tokens=8)[0].text
    trained = len("first") + len("second") + 2
    assert got.trained_tokens == trained


def test_text_and_tokenised_rows_have_a_loss_only():
    b = base()
    got = evaluate(b, [{"text": "abc"}])
    assert (got.rows, got.exact_match, got.answers) == (1, None, ())
    assert got.loss is not None
    examples = encode(PAIRS, b.tokenizer)
    for data in (examples, list(examples)):
        again = evaluate(b, data)
        assert again.answers == ()
        assert again.loss == pytest.approx(evaluate(b, PAIRS, generate=False).loss, rel=NATS)
    assert evaluate(Base(b.model), examples).loss is not None


def test_several_adapters_each_with_its_own_template():
    b = base()
    a, other = adapter(b, 1), adapter(b, 2)
    other = other.with_card(dataclasses.replace(other.card, chat_template=OTHER_TEMPLATE))
    seen = []
    results = evaluate(
        b,
        PAIRS,
        {"a": a, "other": other, "untouched": None},
        max_new_tokens=4,
        on_progress=lambda *step: seen.append(step),
    )
    for name, alone in (("a", a), ("other", other), ("untouched", None)):
        expected = evaluate(b, PAIRS, adapters=alone, max_new_tokens=4)
        assert results[name].loss == pytest.approx(expected.loss, rel=NATS)
        assert [x["answer"] for x in results[name].answers] == [x["answer"] for x in expected.answers]
    assert results["a"].answers[0]["adapter"] == "a"
    assert {step[:2] for step in seen} == {
        (name, part) for name in ("a", "other", "untouched") for part in ("loss", "answers")
    }
    assert seen[-1] == ("untouched", "answers", 5, 5)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(b, PAIRS, {})


def test_row_without_room_for_its_answer_is_named():
    rows = [PAIRS[0], {"prompt": "y" * 200, "completion": "z"}]
    with pytest.raises(DataError, match="row 2"):
        evaluate(base(), rows, max_new_tokens=100)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], (None, None, None)),
        ([(" yes \n", "yes"), ("no", "yes")], (0.5, None, None)),
        ([('{"b": 1, "a": "x"}', '{"a":"x","b":1}')], (1.0, 1.0, 1.0)),
        ([('{"a": 1.0, "b": [-0.0]}', '{"a": 1, "b": [0]}')], (1.0, 1.0, 1.0)),
        ([('{"a": "1", "b": true}', '{"a": 1, "b": 1}')], (0.0, 1.0, 0.0)),
        ([('{"a": 1} and so on', '{"a": 1}')], (0.0, 0.0, 0.0)),
        ([('{"a": 1, "c": 3}', '{"a": 1, "b": 2}'), ("?", '{"d": 4}')], (0.0, 0.5, 2 / 5)),
        ([('{"a": [1, {"y": 2, "x": 1}]}', '{"a": [1, {"x": 1, "y": 2}]}')], (1.0, 1.0, 1.0)),
        ([("{}", "{}")], (1.0, 1.0, 1.0)),
        ([("[1]", "[1]")], (1.0, None, None)),
    ],
)
def test_scores(pairs, expected):
    got = score(pairs)
    assert (got.exact_match, got.valid_json, got.field_f1) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "null", '{"a": NaN}', '{"a": 1', '{"a": 1}{"b": 2}', "[" * 100_000])
def test_answers_that_are_not_json_objects(text):
    assert json_object(text) is None
