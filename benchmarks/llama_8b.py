"""Training speed on a GPU: the shape of Llama 3.1 8B with random weights, bf16, r = 16 on all projections.

Rows of 4,096 random tokens, every one trained and none of them padding. brushstroke and its peer take turns,
each run in a process of its own. Needs 17 GB of room for the model's folder.

    python benchmarks/llama_8b.py --scratch /dev/shm
"""

import argparse
import random
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from _common import SIDES, describe, interleaved, keep, medians, prepared
from large_models import SHAPES, Shape, random_llama

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="brushstroke,peft", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--layers", type=int, help="fewer of them, to try this file out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scratch", help="a folder for the model, on a fast disk or in memory")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: skipped")
        return
    shape = SHAPES["Llama 3.1 8B"]
    if options.layers:
        shape = shape._replace(layers=options.layers)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        make(shape, folder, options)
        chosen = {name: getattr(options, name) for name in ("batch_size", "steps", "device", "dtype")}
        rows = random_rows(options.steps * options.batch_size, options.tokens, shape.vocabulary)
        with prepared(rows, base=folder, rank=RANK, **chosen) as settings:
            runs = interleaved(options.sides.split(","), options.rounds, settings)
    middle = {side: medians(found) for side, found in runs.items()}
    for side, run in middle.items():
        flops = per_token(shape) * run["real_tokens_per_second"]
        print(f"{SIDES[side]:26} {describe(run)}   {flops / 1e12:.0f} TFLOP/s in products")
    if {"brushstroke", "peft"} <= middle.keys():
        ours, peer = middle["brushstroke"], middle["peft"]
        print(
            f"brushstroke: {ours['real_tokens_per_second'] / peer['real_tokens_per_second']:.2f}x the speed, "
            f"{ours['peak_bytes'] / peer['peak_bytes']:.2f}x the memory"
        )
    keep("llama_8b", tokens=options.tokens, shape=shape._asdict(), **chosen, medians=middle)


def per_token(shape: Shape) -> int:
    """FLOP of the frozen products for a trained token: forward, and the gradient of the input."""
    return 4 * (shape.layers * sum(d * h for d, h in shape.sites) + shape.hidden * shape.vocabulary)


def random_rows(count: int, tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """Rows of random tokens, all of them trained."""
    draw = random.Random(0)
    rows = [[draw.randrange(2, vocabulary) for _ in range(tokens)] for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def make(shape: Shape, folder: str, options: argparse.Namespace) -> None:
    """Save the model with random weights, and a tokenizer that knows how to pad."""
    model = random_llama(shape, 2 * options.tokens, options.dtype, options.device)
    model.save_pretrained(folder)
    del model
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    ).save_pretrained(folder)
    if options.device == "cuda":
        torch.cuda.empty_cache()  # the runs are processes beside this one


if __name__ == "__main__":
    main()
