"""What brushstroke and gradience say of the same adapters, written by PEFT: singular values, time.

python benchmarks/against_gradience.py         needs: pip install 'brushstroke[bench]'

The reference is the dense SVD of PEFT's own ΔW.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from _common import keep

BIN = Path(sys.executable).parent
KINDS = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rsLoRA": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "rank_pattern": {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}},
    "alpha_pattern": {"r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 4}},
}
ROUNDS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for kind, settings in KINDS.items():
            folder = Path(place) / kind
            expected = write(folder, settings)
            sides = {"brushstroke": by_brushstroke(folder), "gradience": by_gradience(folder)}
            for name, (found, seconds) in sides.items():
                missing = sorted(set(expected) - set(found))
                ratios = [found[site] / expected[site] for site in expected if site in found]
                worst = max(abs(ratio - 1) for ratio in ratios)
                reported = (
                    f"σ₁ is {min(ratios):.4f} to {max(ratios):.4f} of PEFT's own, at worst off by {worst:.1e}"
                )
                print(f"{kind:14} {name:12} {reported}; {len(missing)} sites missing; {seconds:.1f} s")
                keep(
                    "against gradience",
                    kind=kind,
                    side=name,
                    worst=worst,
                    seconds=seconds,
                    missing=len(missing),
                )


def write(folder: Path, settings: dict) -> dict[str, float]:
    """An adapter by PEFT with random factors on a model of SmolLM2's widths; site → σ₁ of PEFT's own ΔW."""
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3))
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", **settings))
    expected = {}
    with torch.no_grad():
        for name, module in tuned.named_modules():
            if hasattr(module, "lora_B") and "default" in module.lora_B:
                torch.nn.init.normal_(module.lora_B["default"].weight, std=0.02)
                delta = module.get_delta_weight("default").double()
                expected[name.removeprefix("base_model.model.")] = float(torch.linalg.svdvals(delta)[0])
    tuned.save_pretrained(folder)
    return expected


def by_brushstroke(folder: Path) -> tuple[dict[str, float], float]:
    reported, seconds = run("brushstroke", "spectrum", folder, "--json")
    (adapter,) = reported["adapters"]
    return {row["site"]: row["sigma"][0] for row in adapter["sites"]}, seconds


def by_gradience(folder: Path) -> tuple[dict[str, float], float]:
    words = ("--peft-dir", folder, "--json", "--layers", "--no-udr")
    reported, seconds = run("gradience", "audit", *words)
    found = {
        str(row["name"]).removeprefix("base_model.model."): float(row["sigma_max_scaled"])
        for row in reported["layer_data"]["layer_rows"]
    }
    return found, seconds


def run(*words: object) -> tuple[dict, float]:
    """The JSON of a command, and the median of its wall times."""
    times, reported = [], {}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        done = subprocess.run(
            [BIN / str(words[0]), *map(str, words[1:])], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - began)
        reported = json.loads(done.stdout[done.stdout.index("{") :])
    return reported, statistics.median(times)


if __name__ == "__main__":
    main()
