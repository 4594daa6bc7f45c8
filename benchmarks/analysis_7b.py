"""`relate` and `intruders` on the shape of a 7B model, with and without kept directions, as a user runs them.

python benchmarks/analysis_7b.py FOLDER                all 32 layers: 13 GB in FOLDER, a few GB of memory
python benchmarks/analysis_7b.py FOLDER --layers 2     0.8 GB, and the times of 32 layers by proportion

FOLDER keeps the random weights for the next time; the directions in it are kept for one run only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import brushstroke as bs
from _common import keep
from analysis_speed import SHAPES_7B
from brushstroke.adapter import Card

LAYERS, RANK, VOCABULARY, SIDE = 32, 16, 256, 4096
STD = 0.02  # of the weights, whose largest singular values are then about 2.6 to 3.4
SIZES = {"weak": 0.3, "strong": 8.0}  # of σ of ΔW: below the bulk of W, and above it, where all are intruders
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": SIDE,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    asked = parser.parse_args()
    base = asked.folder / f"base{asked.layers}"
    if not (base / "model.safetensors.index.json").exists():
        write_base(base, asked.layers)
    for size in asked.sizes:
        adapter = asked.folder / f"{size}{asked.layers}"
        write_adapter(adapter, asked.layers, SIZES[size])
        for command in ("relate", "intruders"):
            shutil.rmtree(asked.folder / "cache", ignore_errors=True)
            for directions in ("computed", "kept"):
                seconds = run(command, adapter, base, asked.folder / "cache")
                whole = seconds * LAYERS / asked.layers
                print(f"{command}, {size} adapter, directions {directions}: {seconds:.1f} s", end="")
                print("" if asked.layers == LAYERS else f" for {asked.layers} layers, {whole:.0f} s for 32")
                reported = {"adapter": size, "directions": directions, "layers": asked.layers}
                keep(f"analysis of a 7B shape: {command}", **reported, seconds=seconds)


def modules() -> dict[str, tuple[int, int]]:
    """Path below a layer → (d, h)."""
    return {
        f"{'self_attn' if (d, h) == (SIDE, SIDE) else 'mlp'}.{name}": (d, h)
        for name, (d, h) in SHAPES_7B.items()
    }


def write_base(folder: Path, layers: int) -> None:
    """A shard a layer, so that one layer is in memory at a time; the index last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}), "utf-8")
    generator, where = torch.Generator().manual_seed(0), {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    def weight(*shape: int) -> torch.Tensor:
        return (STD * torch.randn(*shape, generator=generator)).bfloat16()

    ends = {f"{name}.weight": weight(VOCABULARY, SIDE) for name in ("model.embed_tokens", "lm_head")}
    write("model-ends.safetensors", {**ends, "model.norm.weight": torch.ones(SIDE).bfloat16()})
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": weight(h, d) for name, (d, h) in modules().items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{prefix}.{name}.weight": torch.ones(SIDE).bfloat16() for name in norms}
        write(f"model-{layer:02}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), "utf-8")


def write_adapter(folder: Path, layers: int, sigma: float) -> None:
    """Random factors whose ΔW has singular values of about sigma."""
    generator, updates = torch.Generator().manual_seed(1), {}
    for layer in range(layers):
        for name, (d, h) in modules().items():
            U = torch.randn(d, RANK, generator=generator) / d**0.5
            V = torch.randn(RANK, h, generator=generator) * (sigma / h**0.5)
            updates[f"model.layers.{layer}.{name}"] = bs.LowRank(U, V)
    bs.save(bs.Adapter(updates, Card(base_name="random")), folder, overwrite=True)


def run(command: str, adapter: Path, base: Path, cache: Path) -> float:
    """Seconds of a whole command, in a process of its own."""
    words = [sys.executable, "-m", "brushstroke", command, str(adapter), str(base), "--json"]
    environment = {**os.environ, "BRUSHSTROKE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    seconds = time.perf_counter() - began
    if command == "intruders":
        totals = json.loads(done.stdout)
        print(
            f"  { ({key: totals[key] for key in ('intruders', 'undecided', 'directions') if key in totals}) }"
        )
    return seconds


if __name__ == "__main__":
    main()
