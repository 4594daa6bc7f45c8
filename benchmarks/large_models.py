"""Memory against full fine-tuning where weights dwarf activations: the arithmetic, and one run of it.

All weights under AdamW in fp32 hold 16 bytes a weight (itself, its gradient, two moments); a frozen base
holds 4, and 16 for each number of the adapter. The run: a Llama with random weights, short rows.

    python benchmarks/large_models.py
"""

import argparse
import tempfile
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import brushstroke as bs
from _common import SIDES, interleaved, keep, prepared
from brushstroke.samples import model_path

ROWS = [{"text": f"Row {i} has a few tokens."} for i in range(8)]
FROZEN, TRAINED = 4, 16  # bytes a number, in fp32 under AdamW
RANK = 8


class Shape(NamedTuple):
    """A Llama's sizes; `kv` is the width of all its key heads together."""

    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int
    tied: bool
    head: int = 128

    @property
    def sites(self) -> list[tuple[int, int]]:
        """(d, h) of the linears of a block."""
        d, f, kv = self.hidden, self.inner, self.kv
        return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]

    @property
    def weights(self) -> int:
        """Weights of the matrices."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * sum(d * h for d, h in self.sites) + embeddings

    @property
    def factors(self) -> int:
        """Numbers of an adapter of rank 8 on all linears of the blocks."""
        return self.layers * sum(RANK * (d + h) for d, h in self.sites)

    def bytes(self) -> tuple[int, int]:
        """Of weights, gradients and optimiser state: with an adapter, and with all weights trained."""
        return FROZEN * self.weights + TRAINED * self.factors, TRAINED * self.weights


MADE = Shape(18, 1536, 4096, 1536, 49_152, tied=True, head=64)
SHAPES = {
    "Llama 3.2 1B": Shape(16, 2048, 8192, 512, 128_256, tied=True, head=64),
    "Llama 3.1 8B": Shape(32, 4096, 14_336, 1024, 128_256, tied=False),
    "Llama 3.1 70B": Shape(80, 8192, 28_672, 1024, 128_256, tied=False),
    "random weights": MADE,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    for name, shape in SHAPES.items():
        adapter, whole = shape.bytes()
        print(
            f"{name:16} {shape.weights / 1e9:5.2f} billion weights: adapter {adapter / 2**30:7.1f} GiB, "
            f"all weights {whole / 2**30:7.1f} GiB, {adapter / whole:.3f}x"
        )
    with tempfile.TemporaryDirectory() as folder:
        make(MADE, folder)
        with prepared(ROWS, base=folder, batch_size=1, steps=options.steps, rank=RANK) as settings:
            runs = {
                side: found[0] for side, found in interleaved(["brushstroke", "full"], 1, settings).items()
            }
    peaks = {side: run["peak_bytes"] for side, run in runs.items()}
    for (side, peak), state in zip(peaks.items(), MADE.bytes(), strict=True):
        print(
            f"{SIDES[side]:26} peak of the process {peak / 2**30:5.2f} GiB, "
            f"{state / 2**30:5.2f} of it by the arithmetic"
        )
    print(
        f"brushstroke: {peaks['brushstroke'] / peaks['full']:.3f}x the memory; "
        f"by the arithmetic {MADE.bytes()[0] / MADE.bytes()[1]:.3f}x"
    )
    keep("large_models", shape=MADE._asdict(), arithmetic=MADE.bytes(), peaks=peaks)


def random_llama(shape: Shape, context: int, dtype: str = "float32", device: str = "cpu") -> LlamaForCausalLM:
    """A Llama of this shape with random weights."""
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.hidden // shape.head,
        num_key_value_heads=shape.kv // shape.head,
        vocab_size=shape.vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        dtype=dtype,
    )
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def make(shape: Shape, folder: str) -> None:
    """Save a Llama of this shape with random weights, and a real tokenizer."""
    random_llama(shape, context=2048).save_pretrained(folder)
    tokenizer = bs.load_base(str(model_path()), device="cpu").tokenizer
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
