import random

import pytest
import torch
import torch.nn.functional as F
from inference_kit import adapter, base, gpt2, llama
from rouge_score.rouge_scorer import RougeScorer

from brushstroke.data import encode
from brushstroke.errors import ConfigError, DataError
from brushstroke.inference import choices, evaluate, score, scores
from brushstroke.inference.choices import find_labels
from brushstroke.layers import attach, bank

LABELS = ("yes", "nay", "may")  # of one length, or a random model always prefers the shortest
ROWS = [{"prompt": f"is it {i}" * (i % 4 + 1), "completion": LABELS[i % 3]} for i in range(12)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "earlier answer"},
            {"role": "user", "content": "again?"},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in ROWS
]


def likeliest(b, row) -> str:
    """The label with the highest probability, each alone, by the definition."""
    found = {}
    for label in LABELS:
        if "messages" in row:
            first, *rest, last = row["messages"]
            rest = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in rest]
            asked = {"messages": [first, *rest, {**last, "content": label}]}
        else:
            asked = {**row, "completion": label}
        (example,) = encode([asked], b.tokenizer).examples
        with torch.no_grad():
            logits = b.model(torch.tensor([example.tokens])).logits[0].double()
        nll = F.cross_entropy(logits[:-1], torch.tensor(example.tokens[1:]), reduction="none")
        found[label] = float(nll[torch.tensor(example.weights[1:]) > 0].sum())
    return min(found, key=found.__getitem__)


@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("rows", "at_once"), [(ROWS, 256), (ROWS, 4), (TALKS, 256)])
def test_the_choice_is_the_label_with_the_highest_probability(model, rows, at_once, monkeypatch):
    monkeypatch.setattr(choices, "AT_ONCE", at_once)
    b = base(model)
    adapters = {"a": adapter(b, 1, size=1.0), "b": adapter(b, 2, size=1.0), "none": None}
    done = []
    results = evaluate(b, rows, adapters, max_new_tokens=2, on_progress=lambda *step: done.append(step))
    chosen = set()
    for name, given in adapters.items():
        with attach(b, given if given is not None else adapter(b, size=0.0)):
            expected = [likeliest(b, row) for row in rows]
        assert [record["choice"] for record in results[name].answers] == expected
        right = [label == LABELS[i % 3] for i, label in enumerate(expected)]
        assert results[name].choice == sum(right) / len(right)
        chosen |= set(expected)
    assert len(chosen) > 2
    assert [step for step in done if step[1] == "choices"][-1] == ("none", "choices", 12, 12)


def test_the_choice_without_a_chat_template_and_without_answers():
    b = base(gpt2(), template=None)
    found = evaluate(b, ROWS, generate=False, choices=LABELS)
    right = [likeliest(b, row) == row["completion"] for row in ROWS]
    assert found.choice == sum(right) / len(right)
    assert (found.answers, found.exact_match) == ((), None)
    assert evaluate(b, ROWS, generate=False).choice is None  # only the loss, unless it is asked for


def test_a_bank_gives_an_evaluation_for_each_of_its_adapters():
    b = base()
    adapters = {"a": adapter(b, 1), "b": adapter(b, 2)}
    expected = evaluate(b, ROWS, adapters, max_new_tokens=2)
    with bank(b, adapters) as loaded:
        found = evaluate(b, ROWS, loaded, max_new_tokens=2)
    assert [x.choice for x in found.values()] == [x.choice for x in expected.values()]
    assert list(found) == ["a", "b"]
    with pytest.raises(ConfigError, match="adapters must be an Adapter"):
        evaluate(b, ROWS, "folder")


@pytest.mark.parametrize(
    ("expected", "given", "labels"),
    [
        (["a", "b"] * 2, None, ("a", "b")),
        (["a", "b", "c"] * 2, None, ("a", "b", "c")),
        (["a", "b", "c"], None, ()),  # not repeated
        (["a", "a"], None, ()),
        (["a", " "] * 2, None, ()),
        (['{"a": 1}', "b"] * 2, None, ()),
        ([str(i) for i in range(21)] * 2, None, ()),
        (["a", "b", "c"], True, ("a", "b", "c")),
        (["a", "b"] * 2, False, ()),
        (["a"], ("a", "b"), ("a", "b")),
        ([], True, ()),
    ],
)
def test_labels_are_few_and_repeated_unless_they_are_given(expected, given, labels):
    assert find_labels(expected, given) == labels


@pytest.mark.parametrize("given", ["yes", [], ["yes"], ["yes", "yes"]])
def test_one_label_is_no_choice(given):
    with pytest.raises(ConfigError, match="two different labels"):
        evaluate(base(), ROWS, choices=given)


def test_invalid_choices_are_refused():
    with pytest.raises(DataError, match=r"row 3: the expected answer 'may' is not among the 2 choices"):
        evaluate(base(), ROWS, choices=["yes", "nay"])
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "yes", "tool_calls": [call]},
            ]
        }
    ]
    with pytest.raises(DataError, match="tool"):
        evaluate(base(), rows, choices=True)
    long = [{"prompt": "y" * 200, "completion": label} for label in ("a", "b" * 60)]
    with pytest.raises(DataError, match=r"row 1: with the label 'bbb.* tokens, and the limit is 256"):
        evaluate(base(), [long[0]], generate=False, choices=[label["completion"] for label in long])


def words(count: int, seed: int) -> str:
    chosen = random.Random(seed).choices(
        ["The", "cat", "sat", "on", "a", "mat,", "it's", "a-b", "7.5"], k=count
    )
    return " ".join(chosen)


def test_rouge_l_is_that_of_the_library():
    pairs = [(words(i, i), words(i + 3, 100 + i)) for i in range(12)]
    plain = RougeScorer(["rougeL"])
    expected = sum(plain.score(gold, answer)["rougeL"].fmeasure for answer, gold in pairs) / len(pairs)
    assert score(pairs).rouge_l == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1


def test_rouge_l_reads_every_script():
    assert score([("Кошка на столе", "кошка на столе!")]).rouge_l == 1
    assert score([("Кошка под столом", "кошка на столе!")]).rouge_l == pytest.approx(1 / 3)


@pytest.mark.parametrize("pairs", [[], [("a", '{"a": 1}')], [("a", "...")], [("a", "so #### 3")]])
def test_rouge_l_is_shown_only_for_texts(pairs):
    assert score(pairs).rouge_l is None


def test_rouge_l_needs_its_library_and_no_labels(monkeypatch):
    assert score([("yes", "yes")], are_labels=True).rouge_l is None
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    assert score([("yes", "yes")]).rouge_l is None
