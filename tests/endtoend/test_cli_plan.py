"""The weights that `plan` reports as left out, with their share of the base."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference_kit
import pytest
from cli_kit import PLAIN
from torch import nn

SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
}


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SMALL))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SMALL))


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(Llama4TextConfig(**SMALL, intermediate_size_mlp=24))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=264, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    return MambaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "largest", "count", "why"),
    [
        (mixtral, "model.layers.*.mlp.experts.gate_up_proj", 2, "a bare 3-D parameter"),
        (gpt_oss, "model.layers.*.mlp.experts.gate_up_proj", 2, "a bare 3-D parameter"),
        (llama4, "model.layers.*.feed_forward.experts.gate_up_proj", 2, "a bare 3-D parameter"),
        (mamba, "backbone.layers.*.mixer.x_proj", 2, "MambaMixer reads its weight directly"),
    ],
)
def test_plan_names_left_out_weights_with_their_share(
    cli: Callable[..., Any],
    train_rows: Path,
    tmp_path: Path,
    make: Callable[[], nn.Module],
    largest: str,
    count: int,
    why: str,
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    inference_kit.tokenizer().save_pretrained(tmp_path / "base")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    first, last = largest.split("*")
    named = [name for name in sizes if name.startswith(first) and name.removesuffix(".weight").endswith(last)]
    share = sum(sizes[name] for name in named) / sum(sizes.values())

    reported = cli("plan", tmp_path / "base", train_rows, *PLAIN)
    assert reported.status == 0, reported.err
    (line,) = [line for line in reported.out.splitlines() if line.startswith("  left out")]
    assert f"{largest} ({count}, {100 * share:.3g} % of the base): {why}" in line

    plan = json.loads(cli("plan", tmp_path / "base", train_rows, *PLAIN, "--json").out)
    paths = [name.removesuffix(".weight") for name in named]
    assert sum(plan["skipped_shares"][path] for path in paths) == pytest.approx(share)
    assert all(plan["skipped"][path].startswith(why) for path in paths)
    assert plan["skipped"].keys() == plan["skipped_shares"].keys()


def test_plan_names_the_largest_weights_first_and_no_unrequested_ones(
    cli: Callable[..., Any], train_rows: Path, tmp_path: Path
) -> None:
    mixtral().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    inference_kit.tokenizer().save_pretrained(tmp_path / "base")
    reported = cli("plan", tmp_path / "base", train_rows, *PLAIN)
    (line,) = [line for line in reported.out.splitlines() if line.startswith("  left out")]
    shares = [float(found) for found in re.findall(r"([\d.]+) % of the base", line)]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert "left out" not in cli("plan", tmp_path / "base", train_rows, *PLAIN, "--targets", "q_proj").out
    refused = cli("plan", tmp_path / "base", train_rows, *PLAIN, "--targets", "mlp")
    assert "experts.gate_up_proj is a bare 3-D parameter, which cannot be adapted yet" in refused.error
