"""Bases in 4 and 8 bits (bitsandbytes): loaded, trained, attached, banked, merged, recognised."""

import dataclasses
import warnings

import inference_kit
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import brushstroke as bs
from brushstroke.base import quantisation
from brushstroke.data import encode
from brushstroke.errors import ConfigError, MissingPackageError
from brushstroke.layers.linear import shared_parts
from brushstroke.merging import MergeReport
from brushstroke.sites import QuantisedBaseWarning, weights_of
from brushstroke.training import PlanWarning

LORA = bs.LoraConfig(rank=4, targets="all-linear")
TOKENS = torch.arange(12)[None]
ROWS = [{"prompt": f"say {i}", "completion": f"number {i}"} for i in range(8)]
CONFIG = bs.TrainConfig(max_steps=4, batch_size=4, learning_rate=1e-2)
CLOSE = {"rtol": 1e-5, "atol": 3e-5}  # fp32 products, summed in another order


def model() -> nn.Module:
    return inference_kit.llama(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in fp32, and the same as bitsandbytes stores it in 4 and in 8 bits."""
    place = tmp_path_factory.mktemp("quantised")
    configs = {
        "dense": None,
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    model().save_pretrained(place / "dense")
    for name, config in configs.items():
        if config is not None:
            options = {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.float32}
            AutoModelForCausalLM.from_pretrained(place / "dense", **options).save_pretrained(place / name)
        inference_kit.tokenizer().save_pretrained(place / name)
    return {name: place / name for name in configs}


def load(folder, **options) -> bs.Base:
    return bs.load_base(folder, **{"dtype": "float32", "device": "cpu"} | options)


def dense_twin(base: bs.Base) -> bs.Base:
    """The same model with plain layers that hold the dequantised weights."""
    twin = model()
    twin.load_state_dict(load_state(base), strict=False)
    return bs.Base(twin.eval().requires_grad_(False), base.tokenizer, "twin")


def load_state(base: bs.Base) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in base.model.state_dict().items() if value.is_floating_point()}
    return state | {f"{site}.weight": W.mT for site, W in weights_of(base).items() if "embed" not in site}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def trained(base: bs.Base) -> bs.TrainResult:
    with warnings.catch_warnings():  # in 8 bits, an example changes those that run with it
        warnings.simplefilter("ignore", PlanWarning)
        return bs.train(base, ROWS, LORA, CONFIG)


@pytest.mark.parametrize("name", ["nf4", "dense"])
def test_a_model_in_4_bits_is_one_with_the_dequantised_weights(folders, name):
    base = load(folders[name], quantize="nf4" if name == "dense" else None)
    assert base.quantised
    assert isinstance(base.model.model.layers[0].mlp.up_proj, Linear4bit)
    assert type(base.model.lm_head) is nn.Linear
    assert base.model.model.layers[0].mlp.up_proj.weight.quant_state.nested is (name == "dense")
    twin = dense_twin(base)
    torch.testing.assert_close(logits(base.model), logits(twin.model), **CLOSE)
    found, expected = trained(base), trained(twin)
    assert found.summary["mean_loss"] == pytest.approx(expected.summary["mean_loss"], rel=1e-5)
    assert found.summary["final_loss"] < found.summary["mean_loss"]
    for site, update in found.adapter.items():
        assert update.U.dtype == torch.float32
        torch.testing.assert_close(update.dense(), expected.adapter[site].dense(), rtol=1e-3, atol=1e-5)


def test_adapters_on_4_bits_attach_bank_and_merge_alike(folders, tmp_path):
    base = load(folders["nf4"])
    adapter = trained(base).adapter
    with bs.attach(base, adapter):
        expected = logits(base.model)
    assert (expected - logits(base.model)).abs().max() > 0.01
    with bs.bank(base, {"a": adapter}) as bank:
        bank.use("a")
        torch.testing.assert_close(logits(base.model), expected, **CLOSE)
    before = base.model.model.layers[0].mlp.up_proj.weight
    reports: list[MergeReport] = []
    merged = bs.merge(base, adapter, report=reports)
    torch.testing.assert_close(logits(merged.model), expected, **CLOSE)
    assert base.model.model.layers[0].mlp.up_proj.weight is before
    assert not any(isinstance(module, Linear4bit) for module in merged.model.modules())
    assert reports[0].survived > 0.999
    report = bs.merge_folder(folders["nf4"], adapter, tmp_path / "merged", dtype="float32")
    assert report.logit_drift < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(plain.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(plain), expected, **CLOSE)


def test_a_merge_into_half_precision_rounds_the_sum_once(folders):
    base = load(folders["nf4"], dtype="bfloat16")
    wide = weights_of(base)
    adapter = trained(load(folders["nf4"])).adapter
    merged = bs.merge(base, adapter, rounding="nearest")
    for site, update in adapter.items():
        expected = (wide[site].float() + update.dense()).to(torch.bfloat16)
        assert torch.equal(weights_of(merged)[site], expected), site
    for model in (merged.model, load(folders["int8"], dtype="bfloat16").model):
        kept = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        assert kept == {torch.bfloat16}  # also where the folder has other weights in fp32


def test_adapters_know_that_their_base_was_quantised(folders, tmp_path):
    base = load(folders["nf4"])
    adapter = trained(base).adapter
    assert adapter.card.fingerprint.quantised
    assert set(adapter.card.fingerprint.shapes) == set(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bs.attach(load(folders["nf4"]), adapter):
            pass
        bs.relate(adapter, base)
    with (
        pytest.warns(QuantisedBaseWarning, match="a quantised form of the one"),
        bs.attach(load(folders["dense"]), adapter),
    ):
        pass


def test_a_model_in_8_bits_trains_and_merges(folders, tmp_path):
    base = load(folders["int8"])
    layer = base.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, Linear8bitLt)
    W = weights_of(base)["model.layers.0.self_attn.q_proj"]
    original = weights_of(load(folders["dense"]))["model.layers.0.self_attn.q_proj"]
    assert (W - original).norm() < 0.01 * original.norm()
    x = torch.randn(20, 64)
    torch.testing.assert_close(layer(x) - layer.bias, x @ W, rtol=0, atol=0.02 * float((x @ W).abs().max()))
    torch.testing.assert_close(weights_of(base)["model.layers.0.self_attn.q_proj"], W)  # after a forward pass
    adapter = trained(base).adapter
    with bs.attach(base, adapter):
        expected = logits(base.model)
    merged = bs.merge(base, adapter)
    assert (logits(merged.model) - expected).norm() < 0.05 * expected.norm()  # inputs have 8 bits there
    assert not any(isinstance(module, Linear8bitLt) for module in merged.model.modules())


def test_projections_and_mlps_in_4_bits_run_fused(folders):
    base = load(folders["nf4"])
    with bs.Training(base, LORA) as session:
        session.forward_backward(encode(ROWS, base.tokenizer).examples)
        classes = {type(module).__name__ for module in base.model.modules()}
        assert {"FusedMLPLlamaMLP", "FusedAttentionLlamaAttention"} <= classes
        x = torch.randn(1, 5, 64)
        layer = base.model.model.layers[0].mlp
        assert shared_parts(x, [layer.gate_proj, layer.up_proj]) is not None
        assert shared_parts(x.bfloat16(), [layer.gate_proj, layer.up_proj]) is None  # it computes in fp32


def test_bitsandbytes_must_not_repack_weights(folders):
    own = AutoModelForCausalLM.from_pretrained(folders["nf4"], device_map={"": "cpu"})
    layers = [module for module in own.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on a processor with AVX-512 and bf16
    with bs.attach(bs.Base(own), LORA):
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    loaded = load(folders["nf4"]).model.modules()
    assert not any(m.support_avx512bf16_for_cpu for m in loaded if isinstance(m, Linear4bit))
    layers[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(bs.errors.BaseLoadError, match="has repacked the base's weights"):
        bs.attach(bs.Base(own), LORA, trainable=True)


def test_what_cannot_be_quantised_is_refused(folders, monkeypatch):
    with pytest.raises(ConfigError, match="quantised already; leave quantize"):
        load(folders["nf4"], quantize="nf4")
    with pytest.raises(ConfigError, match="quantize must be"):
        load(folders["dense"], quantize="nf5")
    with pytest.raises(ConfigError, match="does not support mps"):
        quantisation.quantisation("nf4", torch.float32, torch.device("mps"))
    base = load(folders["nf4"])
    with pytest.raises(bs.errors.BrushstrokeError, match=r"packed \(quantised\), and DoRA needs its norms"):
        bs.attach(base, dataclasses.replace(LORA, variant="dora"), trainable=True)

    def missing(module: str, *, extra: str) -> None:
        raise MissingPackageError(f"no {module}, install {extra}")

    monkeypatch.setattr(quantisation, "require", missing)
    for name, options in (("nf4", {}), ("dense", {"quantize": "nf4"})):
        with pytest.raises(MissingPackageError, match="no bitsandbytes, install quant"):
            load(folders[name], **options)
