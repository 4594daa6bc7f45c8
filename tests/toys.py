"""Small random networks and adapters for the tests."""

import torch
from torch import nn

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.layers import attach
from brushstroke.lowrank import LowRank

VOCABULARY = 64


class Mlp(nn.Module):
    """Two linear layers with bias, one of them used under two names."""

    def __init__(self, d: int = 6, hidden: int = 10, h: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Conv1D(nn.Module):
    """HF's Conv1D in a few lines: the weight is stored d×h."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


def tiny_llama(*, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random Llama of 2 layers, weights large enough that its answers differ from prompt to prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2(*, seed: int = 0, dtype: torch.dtype = torch.float32, context: int = 128) -> nn.Module:
    """A random GPT-2 of 2 layers: HF's Conv1D, a fused c_attn and a tied head; its own dropout is off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def tiny_olmo(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, clip_qkv: float | None = None
) -> nn.Module:
    """A random OLMo of 2 layers: angles in fp32, projections clipped in place where that is asked for."""
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(seed)
    config = OlmoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        clip_qkv=clip_qkv,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return OlmoForCausalLM(config).to(dtype).eval()


def random_adapter(
    model: object, config: LoraConfig | None = None, *, seed: int = 0, size: float = 0.3
) -> Adapter:
    """An adapter of this model with V not zero, and the card of a fresh one."""
    with attach(model, config or LoraConfig(rank=4, alpha=8), seed=seed) as attachment:
        fresh = attachment.adapter()
    generator = torch.Generator().manual_seed(seed + 1)
    updates = {}
    for path, update in fresh.items():
        assert isinstance(update, LowRank)
        V = size * torch.randn(*update.V.shape, generator=generator).to(update.V)
        updates[path] = LowRank(update.U, V, update.scale)
    return Adapter(updates, fresh.card)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that detaching has to bring back: tensor bytes, flags, classes, attribute names."""
    state: dict[str, object] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}: class"] = type(module)
        state[f"{name}: attributes"] = sorted(module.__dict__)
        state[f"{name}: tensors"] = (list(module._parameters), list(module._buffers))
    for name, p in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        raw = p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        state[f"{name}: value"] = (id(p), p.dtype, p.shape, raw, p.requires_grad)
    return state
