"""Replaces a model's norms, feed-forward blocks and attention projections by fused functions for a session.

A module's class is swapped only if a probe shows that its output and gradients equal those of its original
forward; `Fusion.remove` restores it. It changes no weight and no other module.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from brushstroke.base import CACHE_NAMES
from brushstroke.layers.adapted import Adapted, hooked
from brushstroke.layers.linear import shared_parts
from brushstroke.lowrank.apply import lowrank_linears
from brushstroke.packed.attention import AttentionName, packed_attention
from brushstroke.packed.layout import Layout, build_layout
from brushstroke.packed.mlp import GELU, GELU_TANH, SILU, Activation, mlp
from brushstroke.packed.norm import rms_norm
from brushstroke.packed.pack import Row, unshared
from brushstroke.packed.rotary import rotate
from brushstroke.packed.workspace import Scratch
from brushstroke.sites import require_kind
from brushstroke.sites.kinds import compute_dtype

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of a probe's output and of each gradient
HALF_TOLERANCE = 3e-2
NOISE_FACTOR = 3.0  # half precision: the tolerated error, as a multiple of the effect of rounding the input
MOST_NOISE = 0.3  # with more noise, a probe could not distinguish two functions
MAGNITUDES = (1e-3, 30.0, *[1.0] * 6)  # of a probe's rows: small rows reveal an eps, large rows a clamp
PROBED = [  # the small and the large row are separate examples: otherwise they dominate the softmax
    Row((0,) * count, ()) for count in (1, 1, 6)
]  # only their lengths matter: modules see no tokens

ACTIVATIONS = {
    "SiLU": SILU,
    "SiLUActivation": SILU,
    "GELUActivation": GELU,
    "GELUTanh": GELU_TANH,
    "NewGELUActivation": GELU_TANH,
    "PytorchGELUTanh": GELU_TANH,
}
MLP_NAMES = (  # (gate, up, down) of the model families
    ("gate_proj", "up_proj", "down_proj"),
    (None, "c_fc", "c_proj"),
    (None, "fc1", "fc2"),
    (None, "up_proj", "down_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATION_NAMES = ("act_fn", "act", "activation_fn")


class Fused(nn.Module):
    """Mixin of a swapped module: stores its original class and the settings of the fused function."""

    _base_class: ClassVar[type[nn.Module]]
    _fusion: Any
    _scratch: Scratch

    @staticmethod
    def candidates(module: nn.Module) -> Sequence[Any]:
        """Settings with which the fused function may equal the module's forward; the closest one is used."""
        raise NotImplementedError

    @staticmethod
    def trial(module: nn.Module, settings: Any) -> tuple[Tensor, dict[str, Any]]:
        """An input for the probe, and further keyword arguments."""
        raise NotImplementedError


class FusedNorm(Fused):
    """RMSNorm as in Llama or in Gemma."""

    class Settings(NamedTuple):
        """The arguments of `rms_norm` after the weight."""

        eps: float
        offset: float

    weight: Tensor
    _fusion: Settings

    @staticmethod
    def candidates(module: nn.Module) -> Sequence[Settings]:
        """Settings for a gain equal to the weight, and to 1 + the weight."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if (
            "RMSNorm" not in type(module).__name__
            or not isinstance(eps, float)
            or not isinstance(weight, Tensor)
        ):
            return ()
        return [FusedNorm.Settings(eps, offset) for offset in (0.0, 1.0)] if weight.ndim == 1 else ()

    @staticmethod
    def trial(module: nn.Module, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
        """Rows of the norm's width."""
        weight = cast(Tensor, module.weight)
        return _random_rows(weight, weight.shape[0]), {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The fused norm if the gain is frozen and x is the only input (gated norms also take a gate)."""
        x = _only_input(args, kwargs)
        if (
            x is None
            or self.training
            or (torch.is_grad_enabled() and self.weight.requires_grad)
            or x.shape[-1] != self.weight.shape[0]  # the probe used this width, but some norms get another
            or torch.is_autocast_enabled(x.device.type)
        ):
            return super().forward(*args, **kwargs)
        return rms_norm(x, self.weight, *self._fusion)


class FusedMLP(Fused):
    """A feed-forward block with or without a gate."""

    class Settings(NamedTuple):
        """The names of the linears, the activation, and whether the inputs of the activation are saved."""

        names: tuple[str, ...]
        act: Activation
        keep: bool = True

    _fusion: Settings

    @staticmethod
    def candidates(module: nn.Module) -> Sequence[Settings]:
        """The known structure whose names are exactly those of the block's children, if any."""
        children = dict(module.named_children())
        act = next((children.pop(name) for name in ACTIVATION_NAMES if name in children), None)
        known = ACTIVATIONS.get(type(act).__name__)
        linears = {name for name, child in children.items() if not isinstance(child, nn.Dropout)}
        if known is None:
            return ()
        structures = [tuple(name for name in names if name) for names in MLP_NAMES]
        return [FusedMLP.Settings(names, known) for names in structures if set(names) == linears]

    @staticmethod
    def trial(module: nn.Module, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
        """Rows of the block's width."""
        first = getattr(module, settings.names[0])
        return _random_rows(first.weight, require_kind(first).shape(first)[0], compute_dtype(first)), {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The fused block, if all of its linears are frozen apart from low-rank updates."""
        x = _only_input(args, kwargs)
        names, act, keep = self._fusion
        linears = [getattr(self, name) for name in names]
        watched = any(hooked(child) for child in self.children())
        parts = None if x is None or self.training or watched else shared_parts(x, linears)
        if x is None or parts is None:
            return super().forward(*args, **kwargs)
        *gate, up, down = parts
        return _guarded(mlp(x, act, gate[0] if gate else None, up, down, keep, self._scratch), linears)


class FusedAttention(Fused):
    """Rotary attention in a packed pass: fuses the projections q, k and v and the rotation."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    _fusion: dict[str, Any]  # the settings that the original forward passes to its attention function

    @staticmethod
    def candidates(module: nn.Module) -> Sequence[dict[str, Any]]:
        """One empty dict, which the probe fills with the settings."""
        children = {name for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
        needed = {"q_proj", "k_proj", "v_proj", "o_proj"}
        known = needed <= children <= needed | {"q_norm", "k_norm"} and isinstance(
            getattr(module, "head_dim", None), int
        )
        return [{}] if known else ()

    @staticmethod
    def trial(module: nn.Module, settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """A packed row of examples; the module's original forward writes its settings to `settings`."""
        first = cast(Any, module).q_proj
        x = _random_rows(first.weight, require_kind(first).shape(first)[0], compute_dtype(first))
        rows = len(MAGNITUDES)
        angles = torch.linspace(0.1, 3.0, rows * (cast(Any, module).head_dim // 2)).view(rows, -1)
        angles = torch.cat([angles, angles], dim=-1)[None].to(x.device)
        return x, {
            "position_embeddings": (angles.cos().to(x.dtype), angles.sin().to(x.dtype)),
            "attention_mask": None,
            "brushstroke_layout": build_layout(unshared(PROBED), x.device),
            "brushstroke_record": settings,
        }

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Projections, rotation and packed attention; the original forward outside of packed passes."""
        projections = [self.q_proj, self.k_proj, self.v_proj]
        layout: Layout | None = kwargs.get("brushstroke_layout")
        cached = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        angles = position_embeddings or ()
        probed = all(angle.dtype == hidden_states.dtype for angle in angles)  # OLMo's are always fp32
        packed = layout is not None and not cached and not self.training and probed
        parts = shared_parts(hidden_states, projections) if packed else None
        if parts is None:
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            _guarded(y, projections).view(heads) for y in lowrank_linears(hidden_states, parts)
        )
        if "q_norm" in self._modules:
            query, key = cast(Any, self).q_norm(query), cast(Any, self).k_norm(key)
        cos, sin = (angle.unsqueeze(2) for angle in position_embeddings)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, _ = packed_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            brushstroke_layout=layout,
            **self._fusion,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


KINDS = {"norms": FusedNorm, "feed-forward blocks": FusedMLP, "attentions": FusedAttention}


class Fusion:
    """The swapped modules of a model; `remove` restores their original classes."""

    def __init__(self) -> None:
        self._modules: list[Fused] = []
        self._scratch = Scratch()
        self._failure: str | None = None

    @property
    def counts(self) -> Counter[str]:
        """How many modules of each kind are swapped."""
        return Counter(kind for m in self._modules for kind, mixin in KINDS.items() if isinstance(m, mixin))

    def add(self, module: nn.Module, mixin: type[Fused], settings: Any) -> None:
        """Swap the class of a module."""
        module.__class__ = _fused_class(type(module), mixin)
        module.__dict__.update(_fusion=settings, _scratch=self._scratch)
        self._modules.append(cast(Fused, module))

    def recompute_activations(self) -> None:
        """From now on, feed-forward blocks save only their input and recompute the rest."""
        for module in self._modules:
            if isinstance(module, FusedMLP):
                module.__dict__["_fusion"] = module._fusion._replace(keep=False)

    def drop_last(self) -> None:
        """Undo the last swap."""
        self._restore(self._modules.pop())

    def remove(self) -> None:
        """Undo all swaps: the model runs its original code again."""
        while self._modules:
            self.drop_last()

    def give_up(self, failure: str) -> None:
        """Undo all swaps, because the model fails with them."""
        self.remove()
        self._failure = failure

    def describe(self) -> str:
        """One line, such as "61 norms, 30 feed-forward blocks, 30 attentions"."""
        if self._failure:
            return f"none (the model fails with them: {self._failure})"
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "none"

    @staticmethod
    def _restore(module: Fused) -> None:
        del module.__dict__["_fusion"], module.__dict__["_scratch"]
        cast(nn.Module, module).__class__ = module._base_class


def fuse(model: nn.Module) -> Fusion:
    """Swap each module that a fused function equals; modules in training mode are not changed.

    If gradients are off, all parameters count as frozen, whether or not they have requires_grad.
    """
    with nullcontext() if torch.is_grad_enabled() else _frozen(model):
        return _fuse(model)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Context manager: no parameter requires a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _fuse(model: nn.Module) -> Fusion:
    fusion = Fusion()
    attention = AttentionName(model)
    for module in model.modules():
        if module.training or "forward" in module.__dict__ or isinstance(module, Adapted | Fused):
            continue
        for mixin in KINDS.values():
            candidates = list(mixin.candidates(module))
            errors = [_error(module, mixin, settings, attention, fusion) for settings in candidates]
            if errors and min(errors) <= 1:
                fusion.add(module, mixin, candidates[errors.index(min(errors))])
                break
    return fusion


def _error(
    module: nn.Module, mixin: type[Fused], settings: Any, attention: AttentionName, fusion: Fusion
) -> float:
    """The error of output and gradients against the original forward, as a multiple of the tolerance."""
    try:
        x, inputs = mixin.trial(module, settings)
        with attention.packed(), torch.enable_grad():
            form, expected = _outcome(module, x, inputs)
            noise = _rounding_noise(module, x, inputs, expected)
            fusion.add(module, mixin, settings)
            inputs.pop("brushstroke_record", None)
            fused_form, found = _outcome(module, x, inputs)
    except Exception:  # a module may raise anything here: it then keeps its original code
        return float("inf")
    finally:
        if isinstance(module, Fused):
            fusion.drop_last()
    if form != fused_form or len(expected) != len(found):
        return float("inf")
    limit = TOLERANCE.get(x.dtype, HALF_TOLERANCE)
    errors = [
        _relative_error(a, b) / max(limit, NOISE_FACTOR * n)
        for a, b, n in zip(expected, found, noise, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def _outcome(module: nn.Module, x: Tensor, inputs: dict[str, Any]) -> tuple[list[type], list[Tensor]]:
    """The types that a module returns; the rows of its output, and the gradients of its input and factors.

    Only rows of magnitude 1 contribute to the gradients; other rows would dominate them. Each gradient is
    compared as a whole: in attention the gradient of a single row can nearly cancel.
    """
    x = x.clone().requires_grad_(True)
    outputs = module(x, **inputs)
    parts = outputs if isinstance(outputs, tuple) else [outputs]
    form = [type(outputs), *(type(part) for part in parts)]
    y = parts[0]
    trained = [p for p in module.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    weights *= (torch.tensor(MAGNITUDES, device=y.device) == 1)[:, None]
    dx, *gradients = torch.autograd.grad((y * weights.to(y.dtype)).sum(), [x, *trained])
    return form, [*y.detach().flatten(0, -2), dx, *gradients]


def _rounding_noise(
    module: nn.Module, x: Tensor, inputs: dict[str, Any], expected: Sequence[Tensor]
) -> list[float]:
    """The relative change of each outcome if the input is rounded once more.

    It can be large because gradients through a softmax nearly cancel. Zero in full precision, where only the
    tolerance counts.
    """
    if x.dtype in TOLERANCE:
        return [0.0] * len(expected)
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(1)).to(x.device) * 2 - 1
    nudged = (x.float() * (1 + signs * torch.finfo(x.dtype).eps / 2)).to(x.dtype)
    _, moved = _outcome(module, nudged, inputs)
    limit = MOST_NOISE / NOISE_FACTOR
    return [min(_relative_error(a, b), limit) for a, b in zip(expected, moved, strict=True)]


def _relative_error(expected: Tensor, found: Tensor) -> float:
    a, b = expected.double(), found.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-12)) if a.shape == b.shape else float("inf")


def _only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input, if a module was called with exactly one tensor as in the probe; None for any other call."""
    return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None


def _guarded(y: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """y with the guard of the linears' shared route, if any of them is adapted."""
    adapted = next((module for module in linears if isinstance(module, Adapted)), None)
    return y if adapted is None else adapted._route.guard(y)


def _random_rows(like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of several magnitudes on the device of a tensor; each row is compared separately."""
    rows = torch.randn(1, len(MAGNITUDES), width, generator=torch.Generator().manual_seed(0))
    return (rows * torch.tensor(MAGNITUDES)[:, None]).to(like.device, dtype or like.dtype)


@cache
def _fused_class(base: type[nn.Module], mixin: type[Fused]) -> type[Fused]:
    """The subclass `mixin + base`, made once for each pair."""
    return type(
        f"{mixin.__name__}{base.__name__}", (mixin, base), {"_base_class": base, "__module__": __name__}
    )
