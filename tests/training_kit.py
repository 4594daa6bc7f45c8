"""Examples and references for the tests of training."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from brushstroke.adapter import Adapter
from brushstroke.data import Example
from brushstroke.lowrank import LowRank

VOCABULARY = 64


def examples(count: int = 9, *, shared: int = 12, seed: int = 0) -> list[Example]:
    """Prompts and answers of random tokens, some with tokens behind them that nothing is learnt from.

    Two thirds of them begin with the same `shared` tokens.
    """
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(3, VOCABULARY) for _ in range(n)]  # noqa: E731
    prefix = draw(shared)
    made = []
    for i in range(count):
        prompt = (prefix if i % 3 else draw(10)) + draw(3)
        answer, tail = draw(rng.randrange(3, 20)), draw(i % 4)
        weights = (0.0,) * len(prompt) + (1.0,) * len(answer) + (0.0,) * len(tail)
        made.append(Example(tuple(prompt + answer + tail), weights, row=i + 1))
    return made


def padded_loss(model: nn.Module, batch: list[Example]) -> torch.Tensor:
    """What the Trainer computes: right-padded tokens, labels of −100, mean over all trained tokens."""
    width = max(len(example) for example in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    mask = torch.zeros_like(tokens)
    for i, example in enumerate(batch):
        row = torch.tensor(example.tokens)
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, : len(row)] = torch.where(torch.tensor(example.weights) != 0, row, -100)
    logits = model(input_ids=tokens, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def randomise(parameters: list[nn.Parameter], seed: int = 1, size: float = 0.1) -> None:
    """Fill factors with normal numbers, so that no gradient is zero by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def peft_twin(
    model: nn.Module, adapter: Adapter
) -> tuple[nn.Module, dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """PEFT on a copy of the model with the same factors; path → (its lora_A, its lora_B)."""
    import copy
    import warnings

    from peft import LoraConfig, get_peft_model

    first = next(iter(adapter.values()))
    assert isinstance(first, LowRank)
    config = LoraConfig(
        r=first.rank, lora_alpha=first.scale * first.rank, target_modules=list(adapter), lora_dropout=0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out for Conv1D with a warning
        twin = get_peft_model(copy.deepcopy(model), config).eval()
    factors = {}
    for path, update in adapter.items():
        assert isinstance(update, LowRank)
        layer = twin.base_model.model.get_submodule(path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            a.copy_(update.U.mT)
            b.copy_(update.V.mT)
        factors[path] = (a, b)
    return twin, factors
