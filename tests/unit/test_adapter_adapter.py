"""`Adapter` as a value: an immutable mapping with algebra."""

import pytest
import torch

from brushstroke.adapter import Adapter, Card, LoraConfig
from brushstroke.errors import AdapterFileError, BaseMismatchError, ShapeError
from brushstroke.lowrank import LowRank
from toys import random_adapter, tiny_llama


def update(d: int = 5, r: int = 2, h: int = 4) -> LowRank:
    return LowRank(torch.randn(d, r), torch.randn(r, h), 0.5)


@pytest.fixture
def adapter() -> Adapter:
    return Adapter({"x.q": update(), "x.v": update(6, 3, 2)}, Card(base_name="base", chat_template="t"))


def test_adapter_is_a_mapping(adapter):
    assert list(adapter) == ["x.q", "x.v"]
    assert len(adapter) == 2
    assert "x.q" in adapter
    assert dict(adapter)["x.q"] is adapter["x.q"]
    assert adapter.rank == 3
    assert adapter.parameters == 2 * 9 + 3 * 8
    assert adapter.bytes == 4 * adapter.parameters
    assert "2 sites, rank 3, 42 parameters of base" in repr(adapter)


def test_adapter_is_immutable(adapter):
    with pytest.raises(TypeError):
        adapter["x.q"] = update()  # type: ignore[index]
    with pytest.raises(AttributeError):
        adapter.card = None  # type: ignore[misc]
    given = {"a": update()}
    copy = Adapter(given)
    given["b"] = update()
    assert list(copy) == ["a"]


def test_unknown_site_error_suggests_similar_names(adapter):
    with pytest.raises(KeyError, match=r"did you mean 'x\.q'"):
        adapter["x.qq"]
    assert adapter.get("nothing") is None


def test_adapter_needs_at_least_one_site():
    with pytest.raises(ShapeError, match="at least one site"):
        Adapter({})


def test_adapter_equals_only_itself(adapter):
    assert adapter == adapter
    assert adapter != Adapter(dict(adapter))
    assert {adapter: 1}[adapter] == 1


def test_sum_keeps_sites_of_only_one_adapter(adapter):
    other = Adapter({"x.v": update(6, 1, 2), "y": update()})
    total = adapter + other
    assert list(total) == ["x.q", "x.v", "y"]
    assert total["x.q"] is adapter["x.q"]
    assert total["y"] is other["y"]
    assert total["x.v"].parameters == 4 * 8
    assert adapter.inner(Adapter({"z": update()})) == 0.0
    assert isinstance(adapter.inner(Adapter({"z": update()})), float)


def test_different_shapes_are_listed_in_one_error(adapter):
    other = Adapter({"x.q": update(7), "x.v": update(8)})
    with pytest.raises(ShapeError, match=r"(?s)x\.q: \(5, 4\) and \(7, 4\).*x\.v: \(6, 2\) and \(8, 4\)"):
        adapter + other


@pytest.mark.parametrize("what", [1, None, "x", {}])
def test_only_adapters_are_added(adapter, what):
    with pytest.raises(TypeError):
        adapter + what


@pytest.mark.parametrize("factor", ["2", None, True, torch.ones(2)])
def test_only_numbers_multiply(adapter, factor):
    with pytest.raises(TypeError):
        adapter * factor


def test_algebra_keeps_only_valid_card_fields(adapter):
    card = Card(
        "base",
        LoraConfig().as_dict(),
        ("q",),
        chat_template="t",
        stop_tokens=("</s>",),
        training={"steps": 3},
    )
    for result in (
        0.5 * adapter.with_card(card),
        adapter.with_card(card) + adapter,
        adapter.with_card(card).truncate(1),
    ):
        assert result.card.base_name == "base"
        assert result.card.chat_template == "t"
        assert result.card.stop_tokens == ("</s>",)
        assert result.card.lora is None
        assert not result.card.training
        assert result.card.target_modules == ()
    assert adapter.with_card(None).card is None
    assert (2 * adapter.with_card(None)).card is None
    assert adapter.with_card(card).to(torch.float64).card is card


def test_to_moves_every_site(adapter):
    assert {u.dtype for u in adapter.to(torch.bfloat16).values()} == {torch.bfloat16}
    assert adapter.to(device="cpu")["x.q"].dtype == torch.float32


def test_card_round_trips_through_json():
    import json

    card = Card("b", {"rank": 2}, ("q",), None, "kept elsewhere", ("</s>",), "CAUSAL_LM", True, {"steps": 1})
    stored = json.loads(json.dumps(card.as_dict()))
    assert "chat_template" not in stored
    assert Card.from_dict(stored) == card.with_changes(chat_template=None)


def test_card_with_unknown_fields_is_refused():
    stored = Card().as_dict()
    with pytest.raises(AdapterFileError, match=r"unknown field 'base_nam'.*did you mean 'base_name'"):
        Card.from_dict(stored | {"base_nam": "x"})
    with pytest.raises(AdapterFileError, match=r"format 2.*upgrade"):
        Card.from_dict(stored | {"format": 2})
    with pytest.raises(AdapterFileError, match="format None"):
        Card.from_dict({})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("lora", 5, "an object"),
        ("training", [], "an object"),
        ("fingerprint", "x", "an object"),
        ("stop_tokens", 5, "a list of texts"),
        ("stop_tokens", "</s>", "a list of texts"),
        ("stop_tokens", [1], "a list of texts"),
        ("target_modules", {"q": 1}, "a list of texts"),
        ("base_name", 5, "a text"),
        ("task", ["CAUSAL_LM"], "a text"),
        ("conv1d", "false", "true or false"),
    ],
)
def test_field_of_wrong_type_is_refused(field, value, wanted):
    with pytest.raises(AdapterFileError, match=rf"the card's '{field}' is .*, expected {wanted}; save"):
        Card.from_dict({**Card().as_dict(), field: value})
    assert Card.from_dict({**Card().as_dict(), field: None}) == Card()


def test_sum_of_adapters_of_different_bases_is_refused() -> None:
    model, other = tiny_llama(seed=0), tiny_llama(seed=1)
    a = random_adapter(model, LoraConfig(rank=2, targets="q_proj"))
    b = random_adapter(model, LoraConfig(rank=2, targets="v_proj"))
    foreign = random_adapter(other, LoraConfig(rank=2, targets="q_proj"))
    total = a + b
    assert total.card is not None
    assert total.card.fingerprint is not None
    assert set(total.card.fingerprint.samples) == {*a, *b}
    with pytest.raises(BaseMismatchError, match="different bases"):
        a + foreign
    assert (a + foreign.with_card(None)).card is not None
