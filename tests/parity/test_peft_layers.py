"""The layers against PEFT's: the same factors give the same logits and the same gradients."""

import copy
import warnings

import pytest
import torch
from torch import nn

import toys
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.layers import attach, bank
from brushstroke.lowrank import LowRank
from brushstroke.merging import merge

GRADIENT = 1e-4  # the promise: each tensor's difference to its own norm, float32
LOGITS = 1e-5  # relative

peft = pytest.importorskip("peft")

CONFIGS = {
    "plain": LoraConfig(rank=4, alpha=8),
    "rslora": LoraConfig(rank=4, alpha=8, scale_rule="rslora"),
    "patterns": LoraConfig(
        rank=4,
        alpha=8,
        rank_pattern={r"layers\.0\.self_attn\.q_proj|h\.0\.attn\.c_attn": 2, r"mlp\..*": 3},
        alpha_pattern={r"mlp\.(up_proj|c_fc)": 32},
    ),
    "rslora patterns": LoraConfig(
        rank=4, alpha=8, scale_rule="rslora", rank_pattern={r"mlp\..*": 2}, alpha_pattern={r".*\.1\..*": 3}
    ),
    "attention": LoraConfig(rank=4, alpha=8, targets=["attention"]),
    "head": LoraConfig(rank=4, alpha=8, targets=["mlp", "lm_head"]),
}


def twin(model: nn.Module, config: LoraConfig, adapter: Adapter) -> nn.Module:
    """PEFT's model of a copy, with our factors in it; PEFT resolves the ranks and scales by itself."""
    card = adapter.card
    assert card is not None
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(card.target_modules),
        use_rslora=config.scale_rule == "rslora",
        rank_pattern={rf"(.*\.)?({k})": v for k, v in config.rank_pattern.items()},
        alpha_pattern={rf"(.*\.)?({k})": v for k, v in config.alpha_pattern.items()},
        fan_in_fan_out=card.conv1d,
        lora_dropout=0.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), settings)
    seen = set()
    for path, module in theirs.base_model.model.named_modules():
        if path in adapter:
            update = adapter[path]
            assert isinstance(update, LowRank)
            module.lora_A["default"].weight.data.copy_(update.U.mT)
            module.lora_B["default"].weight.data.copy_(update.V.mT)
            assert module.scaling["default"] == pytest.approx(update.scale, rel=1e-12)
            seen.add(path)
        else:
            assert not hasattr(module, "lora_A")
    assert seen == set(adapter)
    return theirs.eval()


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest, language_model: nn.Module) -> LoraConfig:
    if request.param == "head" and language_model.config.tie_word_embeddings:
        pytest.skip("PEFT warns of tied heads and merges them wrongly")
    return CONFIGS[request.param]


def test_logits_and_every_gradient(language_model, config):
    model = language_model
    adapter = toys.random_adapter(model, config)
    theirs = twin(model, config, adapter)
    tokens = torch.randint(1, toys.VOCABULARY, (3, 11))
    expected = theirs(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    with attach(model, adapter, trainable=True) as attachment:
        got = model(input_ids=tokens, labels=tokens)
        got.loss.backward()
        assert ((got.logits - expected.logits).norm() / expected.logits.norm()).item() < LOGITS
        modules = dict(theirs.base_model.model.named_modules())
        for path, ours in attachment.modules.items():
            a, b = modules[path].lora_A["default"].weight.grad, modules[path].lora_B["default"].weight.grad
            assert ((ours.lora_U_rows.grad - a).norm() / a.norm()).item() < GRADIENT
            assert ((ours.lora_V.grad - b.mT).norm() / b.norm()).item() < GRADIENT


def test_merged_weights(language_model):
    adapter = toys.random_adapter(language_model, CONFIGS["patterns"])
    theirs = twin(language_model, CONFIGS["patterns"], adapter).merge_and_unload()
    ours = merge(language_model, adapter)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert ((p - q).norm() <= LOGITS * q.norm()).item(), name


def test_mixed_rows_equal_peft_one_by_one(language_model):
    names = ["a", None, "b", "a"]
    adapters = {n: toys.random_adapter(language_model, CONFIGS["plain"], seed=i) for i, n in enumerate("ab")}
    twins = {n: twin(language_model, CONFIGS["plain"], a) for n, a in adapters.items()}
    tokens = torch.randint(1, toys.VOCABULARY, (4, 9))
    with torch.no_grad():
        expected = [
            (twins[name] if name else language_model)(input_ids=tokens[i : i + 1]).logits
            for i, name in enumerate(names)
        ]
        with bank(language_model, adapters) as b, b.rows(names):
            got = language_model(input_ids=tokens).logits
    assert ((got - torch.cat(expected)).norm() / torch.cat(expected).norm()).item() < LOGITS


def test_short_training_runs_agree(language_model):
    """Twenty steps of AdamW from the same start, on the same batches: one loss curve."""
    model, config = language_model, CONFIGS["rslora"]
    adapter = toys.random_adapter(model, config, size=0.02)
    theirs = twin(model, config, adapter)
    batches = [torch.randint(1, toys.VOCABULARY, (2, 10)) for _ in range(4)]
    curves = []
    with attach(model, adapter, trainable=True) as attachment:
        for net, parameters in (
            (model, list(attachment.parameters())),
            (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        ):
            optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
            curve = []
            for step in range(20):
                optimiser.zero_grad()
                batch = batches[step % 4]
                loss = net(input_ids=batch, labels=batch).loss
                loss.backward()
                optimiser.step()
                curve.append(loss.item())
            curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < 0.98 * curves[0][0]
