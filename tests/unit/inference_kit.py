"""Tiny models, tokenizers and adapters for the tests of inference."""

from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.base import Base
from brushstroke.inference import Output, SamplingParams, run_requests
from brushstroke.layers import attach
from brushstroke.lowrank import LowRank

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def answered(base: Base, requests, sampling: SamplingParams, **options) -> list[Output]:
    """`run_requests` with the same sampling parameters for all."""
    return run_requests(base, [replace(request, sampling=sampling) for request in requests], **options)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each byte; <|im_end|> ends texts and pads, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|im_start|>",
        additional_special_tokens=["<|end|>"],
    )
    made.chat_template = template
    return made


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 264,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.2,
        **changes,
    }
    return GPT2LMHeadModel(GPT2Config(**settings)).eval()


def base(model=None, template: str | None = TEMPLATE) -> Base:
    return Base(model if model is not None else llama(), tokenizer(template), "tiny")


def adapter(of, seed: int = 1, size: float = 0.3, **config) -> Adapter:
    """A random adapter with a real card; `size` is the scale of its factors."""
    model = of.model if isinstance(of, Base) else of
    with attach(model, LoraConfig(rank=4, **config)) as attachment:
        fresh = attachment.adapter()
    generator = torch.Generator().manual_seed(seed)
    updates = {
        path: LowRank(
            size * torch.randn(update.shape[0], 4, generator=generator),
            size * torch.randn(4, update.shape[1], generator=generator),
            0.5,
        )
        for path, update in fresh.items()
    }
    return Adapter(updates, fresh.card)
