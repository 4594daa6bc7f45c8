"""Verification of merged models on generated inputs, and reports of what these do not reach."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import kinds
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.base import Base
from brushstroke.merging import merge_folder
from brushstroke.merging.verify import check_merged
from toys import random_adapter

EXACT = 1e-5


def adapter_of(model: Any, *targets: str) -> Adapter:
    return random_adapter(model, LoraConfig(rank=3, targets=targets or "all-linear")).with_card(None)


def merged(model: Any, adapter: Adapter, folder: Path) -> Path:
    """The folder of a model with an adapter merged into it, not verified."""
    model.save_pretrained(folder / "base")
    merge_folder(folder / "base", adapter, folder / "out", verify=False)
    return folder / "out"


INPUTS = (  # of each kind: text, choices, text to text, spectrograms, waves, images, and both in two ways
    *("BERT", "BERT, multiple choice", "BART, classifier", "Whisper", "wav2vec 2.0", "ViT", "CLIP"),
    *("LLaVA", "Qwen2-VL", "Gemma 3 with vision"),
)


@pytest.mark.parametrize("kind", INPUTS)
def test_wrong_merge_is_detected_on_every_kind_of_input(tmp_path: Path, kind: str) -> None:
    model = kinds.made(kind)
    adapter = adapter_of(model, *kinds.KINDS[kind][1])
    out = merged(model, adapter, tmp_path)
    right = check_merged(str(tmp_path / "base"), adapter, out)
    assert right.skipped is None
    assert right.drift is not None
    assert right.drift < EXACT
    assert right.outputs
    assert right.effect == pytest.approx(1.0, abs=1e-3)
    wrong = check_merged(str(tmp_path / "base"), adapter, tmp_path / "base")  # as if nothing were merged
    assert wrong.drift is not None
    assert wrong.drift > 100 * EXACT
    assert wrong.outputs == right.outputs
    assert wrong.effect == pytest.approx(0.0, abs=1e-3)


def test_effect_is_the_share_of_the_change_in_the_output_that_keeps_least() -> None:
    from brushstroke.merging.verify import _share

    base, change = torch.randn(50).double(), torch.randn(50).double()
    adapted = base + change
    assert _share(adapted, adapted, base) == pytest.approx(1.0)
    assert _share(base + 0.4 * change, adapted, base) == pytest.approx(0.4)
    assert _share(base, adapted, base) == 0.0
    assert _share(base, base, base) is None
    assert _share(None, adapted, base) is None
    for tensor in (base, adapted):
        tensor[3] = -math.inf
    assert _share(base, adapted, base) == 0.0


def test_a_small_effect_is_measured_in_float32_on_a_base_in_half_precision(tmp_path: Path) -> None:
    """In bf16 the adapted model itself would lose it."""
    model = kinds.made("BERT").to(torch.bfloat16)
    faint = Adapter({site: 1e-3 * update for site, update in adapter_of(model).items()})
    model.save_pretrained(tmp_path / "base")
    merge_folder(tmp_path / "base", faint, tmp_path / "out", verify=False, dtype="float32")
    found = check_merged(Base(model), faint, tmp_path / "out")
    assert found.effect == pytest.approx(1.0, abs=1e-3)
    assert model.dtype == torch.bfloat16


def test_without_a_check_the_report_says_that_only_the_update_was_compared(tmp_path: Path) -> None:
    model = kinds.made("BERT")
    model.save_pretrained(tmp_path / "base")
    report = merge_folder(tmp_path / "base", adapter_of(model), tmp_path / "out", verify=False)
    assert report.effect is None
    assert report.as_dict()["effect"] is None
    assert report.logit_drift_skipped == "not asked for"


@pytest.mark.parametrize("kind", ["LLaVA", "CLIP", "Whisper", "T5", "Qwen2-VL"])
def test_wrong_merge_is_detected_in_each_part_of_a_composite_model(tmp_path: Path, kind: str) -> None:
    """A wrong weight far from the text: in the tower of images, in the encoder."""
    model = kinds.made(kind)
    adapter = adapter_of(model, *kinds.KINDS[kind][1])
    out = merged(model, adapter, tmp_path)
    file = out / "model.safetensors"
    tensors = load_file(file)
    places = [name for name in tensors if any(part in name for part in ("vision", "visual", "encoder"))]
    adapted = [name for name in places if name.endswith(("q_proj.weight", "qkv.weight", ".q.weight"))]
    assert adapted
    for name in (adapted[0], adapted[-1]):
        save_file({**tensors, name: 1.1 * tensors[name]}, file, metadata={"format": "pt"})
        found = check_merged(str(tmp_path / "base"), adapter, out)
        assert found.drift is not None
        assert found.drift > 10 * EXACT, name


def test_report_names_all_compared_outputs(tmp_path: Path) -> None:
    model = kinds.made("T5")
    adapter = adapter_of(model, "q")
    out = merged(model, adapter, tmp_path)
    assert check_merged(Base(model), adapter, out).outputs == ("logits", "encoder_last_hidden_state")


def test_model_without_generated_inputs_is_merged_and_reported(tmp_path: Path) -> None:
    sizes = {"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4}
    body = {"d_model": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 64}
    torch.manual_seed(0)
    model = transformers.PatchTSTForPrediction(
        transformers.PatchTSTConfig(**sizes, **body, prediction_length=4)
    ).eval()
    adapter = adapter_of(model, "q_proj")
    model.save_pretrained(tmp_path / "base")
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    assert report.logit_drift is None
    assert report.compared == ()
    said = "1 of 1 sites, such as model.encoder.layers.0.self_attn.q_proj: no generated input reaches them"
    assert report.logit_drift_skipped is not None
    assert report.logit_drift_skipped.startswith(said)
    assert "PatchTSTForPrediction takes past_values, " in report.logit_drift_skipped


def test_unreached_sites_are_reported(tmp_path: Path) -> None:
    """Mllama's images come in tiles with ids of their aspect ratios, which nobody makes up."""
    body = {"hidden_size": 32, "num_hidden_layers": 2, "attention_heads": 4, "intermediate_size": 64}
    layers = {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64}
    tiles = {
        "image_size": 32,
        "patch_size": 8,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    vision = {**body, **layers, **tiles}
    text = {**kinds.DECODER, "cross_attention_layers": [1], "pad_token_id": 0}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=119)
    torch.manual_seed(0)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    adapter = adapter_of(model, "q_proj")
    model.save_pretrained(tmp_path / "base")
    report = merge_folder(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    assert report.logit_drift is not None
    assert report.logit_drift < EXACT
    assert report.logit_drift_skipped is not None
    assert f"of {len(adapter)} sites, such as model." in report.logit_drift_skipped
    assert "`aspect_ratio_ids` must be provided" in report.logit_drift_skipped


def test_random_models_are_compared_with_the_same_seed(tmp_path: Path) -> None:
    """VITS gives another sound each time."""
    flows = {"flow_size": 32, "spectrogram_bins": 17, "prior_encoder_num_flows": 1}
    waves = {"prior_encoder_num_wavenet_layers": 1, "posterior_encoder_num_wavenet_layers": 1}
    steps = {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "upsample_initial_channel": 16}
    blocks = {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "ffn_dim": 64}
    body = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.VitsModel(
        transformers.VitsConfig(**body, **flows, **waves, **steps, **blocks)
    ).eval()
    adapter = adapter_of(model, "q_proj")
    out = merged(model, adapter, tmp_path)
    found = check_merged(str(tmp_path / "base"), adapter, out)
    assert found.outputs == ("waveform", "spectrogram")
    assert found.drift is not None
    assert found.drift < EXACT


def test_non_finite_outputs_equal_only_themselves() -> None:
    from brushstroke.merging.verify import _difference

    masked = torch.tensor([1.0, -math.inf, math.nan])
    assert _difference(masked, masked) == 0
    assert _difference(torch.tensor([1.0, 0.0, math.nan]), masked) == math.inf
    assert _difference(torch.tensor([1.0, -math.inf, 0.0]), masked) == math.inf
    assert _difference(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert _difference(None, masked) == math.inf
    assert _difference(masked[:2], masked) == math.inf


def test_sites_that_never_run_are_reported_as_such(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Zamba2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=8,
        chunk_size=16,
        use_shared_attention_adapter=True,
        adapter_rank=4,
        num_mem_blocks=1,
        use_mem_eff_path=False,
    )
    model = transformers.Zamba2ForCausalLM(config)
    adapter = adapter_of(model, r"linear_q_adapter_list\..*")
    check = check_merged(str(tmp_path / "base"), adapter, merged(model, adapter, tmp_path))
    assert check.drift is not None
    assert check.drift < EXACT
    assert check.skipped is not None
    assert check.skipped.startswith("4 of 8 sites, such as ")
    assert "no generated input reaches them (Zamba2ForCausalLM takes input_ids, " in check.skipped
    assert check.skipped.endswith(", and runs without them)")
