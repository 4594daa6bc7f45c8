"""DoRA against PEFT's: logits, gradients, merged weights, files both ways, a short training."""

import copy
import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import brushstroke as bs
import toys
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.cli.app import main
from brushstroke.errors import AttachError, ConfigError, ShapeError
from brushstroke.layers import attach, bank
from brushstroke.layers.adapted import Adapted
from brushstroke.layers.dora import DoRA
from brushstroke.lowrank import LowRank
from brushstroke.merging import merge

GRADIENT = 1e-4  # each tensor's difference to its own norm, float32
LOGITS = 1e-5  # relative

peft = pytest.importorskip("peft")
CONFIG = LoraConfig(rank=4, alpha=8, targets=["attention", "mlp"], variant="dora")


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (3, 11))


def random_adapter(model: nn.Module, size: float = 0.3) -> Adapter:
    """A fresh adapter with V not zero, and other magnitudes than W's norms."""
    with attach(model, CONFIG) as attachment:
        fresh = attachment.adapter()
    updates = {}
    for path, update in fresh.items():
        assert isinstance(update, DoRA)
        magnitude = update.magnitude * (1 + 0.2 * torch.rand(len(update.magnitude)))
        updates[path] = DoRA(update.U, size * torch.randn(update.V.shape), magnitude, update.scale)
    return Adapter(updates, fresh.card)


def peft_model(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True).eval()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_a_fresh_adapter_changes_nothing(model, tokens):
    expected, before = model(input_ids=tokens).logits, copy.deepcopy(model.state_dict())
    with attach(model, CONFIG, trainable=True) as attachment:
        assert relative(model(input_ids=tokens).logits, expected) < LOGITS
        assert sum(name.endswith("lora_magnitude") for name, _ in attachment.named_parameters()) == len(
            attachment.sites
        )
        with attachment.disabled():
            assert torch.equal(model(input_ids=tokens).logits, expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_logits_gradients_and_merged_weights_are_those_of_peft(model, tokens, tmp_path):
    adapter = random_adapter(model)
    bs.save(adapter, tmp_path / "ours")
    theirs = peft_model(model, tmp_path / "ours")
    expected = theirs(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    with attach(model, adapter, trainable=True) as attachment:
        got = model(input_ids=tokens, labels=tokens)
        got.loss.backward()
        assert relative(got.logits, expected.logits) < LOGITS
        modules = dict(theirs.base_model.model.named_modules())  # type: ignore[union-attr]
        for path, ours in attachment.modules.items():
            reference = modules[path]
            pairs = (
                (ours.lora_U_rows, reference.lora_A["default"].weight.grad),
                (ours.lora_V, reference.lora_B["default"].weight.grad.mT),
                (ours.lora_magnitude, reference.lora_magnitude_vector["default"].weight.grad),
            )
            for factor, gradient in pairs:
                assert relative(factor.grad, gradient.reshape(factor.shape)) < GRADIENT
    unloaded = theirs.merge_and_unload()  # type: ignore[operator]
    for (name, p), q in zip(merge(model, adapter).named_parameters(), unloaded.parameters(), strict=True):
        assert ((p - q).norm() <= LOGITS * q.norm()).item(), name


def test_files_of_peft_are_read_and_written_alike(model, tokens, tmp_path):
    adapter = random_adapter(model)
    bs.save(adapter, tmp_path / "ours")
    peft_model(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    again = bs.load(tmp_path / "theirs")
    for path, update in adapter.items():
        found = again[path]
        assert isinstance(found, DoRA)
        assert found.scale == update.scale
        for name, tensor in update.tensors().items():
            assert torch.equal(found.tensors()[name], tensor)
    with attach(model, again):
        got = model(input_ids=tokens).logits
    assert relative(got, peft_model(model, tmp_path / "theirs")(input_ids=tokens).logits) < LOGITS


def test_a_short_training_run_agrees_with_peft(model, tmp_path):
    adapter = random_adapter(model, size=0.02)
    bs.save(adapter, tmp_path / "ours")
    theirs = peft_model(model, tmp_path / "ours")
    batches = [torch.randint(1, 64, (2, 10)) for _ in range(4)]
    curves = []
    with attach(model, adapter, trainable=True) as attachment:
        for net, parameters in (
            (model, list(attachment.parameters())),
            (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        ):
            optimizer = torch.optim.AdamW(parameters, 1e-2)
            losses = []
            for step in range(20):
                batch = batches[step % len(batches)]
                loss = net(input_ids=batch, labels=batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            curves.append(losses)
    assert sum(curves[0][-4:]) < sum(curves[0][:4])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_merged_models_give_the_logits_of_the_adapted_one(model, tokens, tmp_path):
    adapter = random_adapter(model)
    with attach(model, adapter):
        expected = model(input_ids=tokens).logits
    assert relative(merge(model, adapter)(input_ids=tokens).logits, expected) < LOGITS
    model.save_pretrained(tmp_path / "base")
    bs.merge_folder(str(tmp_path / "base"), adapter, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(merged(input_ids=tokens).logits, expected) < LOGITS


def test_operations_that_need_the_base_are_refused_with_the_reason(model):
    adapter = random_adapter(model)
    dora = next(iter(adapter.values()))
    low_rank = LowRank(torch.ones(dora.shape[0], 1), torch.ones(1, dora.shape[1]))
    for act in (
        lambda: adapter + adapter,
        lambda: low_rank + dora,
        lambda: 0.5 * adapter,
        lambda: adapter.norm(),
        lambda: adapter.inner(adapter),
        lambda: adapter.truncate(2),
    ):
        with pytest.raises(ShapeError, match="depends on W"):
            act()
    with pytest.raises(ShapeError, match=rf"{len(adapter)} of {len(adapter)} sites have another .*DoRA"):
        bs.spectrum(adapter)


def test_a_bank_gives_each_row_its_adapter(model):
    tokens = torch.randint(1, 64, (4, 9))
    adapters = {name: random_adapter(model) for name in ("a", "b")}
    adapters["low"] = toys.random_adapter(model, LoraConfig(rank=3, targets=["attention"]))
    rows, expected, before = ["b", None, "low", "a"], [], copy.deepcopy(model.state_dict())
    for row, name in zip(tokens, rows, strict=True):
        with attach(model, adapters[name]) if name else nullcontext():
            expected.append(model(input_ids=row[None]).logits[0])
    with bank(model, adapters) as held, held.rows(rows), torch.no_grad():
        assert relative(model(input_ids=tokens).logits, torch.stack(expected)) < LOGITS
        held.load("c", adapters["a"])  # a further slot
        held.evict("c")
        assert relative(model(input_ids=tokens).logits, torch.stack(expected)) < LOGITS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_bank_in_bfloat16_keeps_small_changes_of_the_magnitude():
    layer = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    x = torch.randn(200, 64).bfloat16()
    with attach(layer, LoraConfig(rank=1, variant="dora")) as attachment:
        fresh = attachment.adapter()
    dora = fresh["0"]
    assert isinstance(dora, DoRA)
    adapter = Adapter({"0": DoRA(dora.U.float(), dora.V.float(), 1.004 * dora.magnitude.float(), dora.scale)})
    with attach(layer, adapter), torch.no_grad():
        expected = layer(x)
    with bank(layer, {"a": adapter}) as held, held.rows("a"), torch.no_grad():
        assert relative(layer(x), expected) < 1e-3


def test_a_bank_that_holds_a_low_rank_update_at_a_site_refuses_dora_there(model):
    adapter = random_adapter(model)
    with (
        bank(model, {"low": toys.random_adapter(model)}) as held,
        pytest.raises(AttachError, match="another type of update; load it before the others, or put"),
    ):
        held.load("dora", adapter)


def test_a_bank_of_both_needs_no_order(model, tokens):
    adapters = {"low": toys.random_adapter(model), "dora": random_adapter(model)}
    found = []
    for names in (("low", "dora"), ("dora", "low")):
        with bank(model, {name: adapters[name] for name in names}) as held, held.rows(["low", "dora"]):
            found.append(model(input_ids=tokens[:2]).logits.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("trained", [False, True])
def test_zero_columns_of_the_weight_are_refused_by_name(llama, trained):
    adapter, path = random_adapter(llama), "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        llama.get_submodule(path).weight[3:5] = 0.0
    before = copy.deepcopy(llama.state_dict())
    if trained:
        update = adapter[path]
        assert isinstance(update, DoRA)
        update.V[:, 3:5] = 0.0
    with pytest.raises(AttachError, match=rf"{path}: 2 of 48 output columns of W \+ U·V are zero, and DoRA"):
        attach(llama, adapter if trained else CONFIG, allow_different_base=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert not any(isinstance(module, Adapted) for module in llama.modules())


def test_a_zero_column_that_the_update_fills_is_fine(llama, tokens):
    adapter, path = random_adapter(llama), "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        llama.get_submodule(path).weight[3] = 0.0
    with attach(llama, adapter, allow_different_base=True):
        expected = llama(input_ids=tokens).logits
    merged = merge(llama, adapter, allow_different_base=True)
    assert relative(merged(input_ids=tokens).logits, expected) < LOGITS


def test_show_says_that_the_norms_depend_on_the_base(llama, tmp_path, capsys):
    folder = bs.save(random_adapter(llama), tmp_path / "dora")
    assert main(["show", str(folder)]) == 0
    assert "depends on the base" in capsys.readouterr().out
    assert main(["show", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["norm"] is None
    assert all(site["norm"] is None for site in shown["sites"])


def test_other_names_and_kinds_are_refused(llama):
    with pytest.raises(ConfigError, match=r"must be one of lora, dora; got 'dorra' .did you mean 'dora'"):
        attach(llama, LoraConfig(variant="dorra"))
    with pytest.raises(ConfigError, match="'dora' cannot adapt a layer of kind 'embedding'"):
        attach(llama, LoraConfig(variant="dora", rank=1, targets=["embed_tokens"]))


@pytest.mark.usefixtures("unchecked")
def test_a_magnitude_of_another_length_is_refused():
    with pytest.raises(ShapeError, match="must hold 2 values"):
        DoRA(torch.ones(3, 1), torch.ones(1, 2), torch.ones(3))


def test_columns_of_the_changed_weight_have_the_magnitude_as_norm():
    update = DoRA(torch.ones(3, 1), torch.ones(1, 2), torch.tensor([1.0, 2.0]), 0.5)
    W = torch.randn(3, 2)
    changed = W + update.dense(W)
    assert changed.norm(dim=0).tolist() == pytest.approx([1.0, 2.0])
    i, j = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 1])
    torch.testing.assert_close(update.entries(i, j, W).float(), update.dense(W)[i, j])
    torch.testing.assert_close(update.columns(1, 2).dense(W[:, 1:]), update.dense(W)[:, 1:])
