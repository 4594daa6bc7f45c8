"""Merges an adapter into weights: W + ΔW in fp32, rounded once, with a report of what rounding changed.

It never changes the base, and writes no files (see `export`).
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.adapter import Adapter
from brushstroke.base import forget_quantisation, model_dtype, text_config
from brushstroke.errors import MergeError
from brushstroke.layers.adapted import Adapted
from brushstroke.layers.probe import HALF_PROBE_TOLERANCE, PROBE_TOLERANCE
from brushstroke.lowrank import Update
from brushstroke.lowrank.matmul import HALF
from brushstroke.merging.rounding import AUTO, Mode, Rounding, round_stochastically
from brushstroke.sites import (
    KINDS,
    check_base,
    dense_dxh,
    find_sites,
    has_plain_forward,
    require_kind,
    site_module,
    unwrap,
)
from brushstroke.sites.copies import Parameter
from brushstroke.sites.kinds import example_input
from brushstroke.sites.quantised import dequantised, is_packed, plain_linear

MIN_SURVIVAL = 0.5  # below it, rounding removes more of the update than it keeps
PROBE_ROWS = 16
BLOCK_ELEMENTS = 128 * 1024  # of W that are summed at a time: small enough that memory is reused, not mapped
ROWS_BLOCK_ELEMENTS = 4 * 1024 * 1024  # if W is stored in rows: a narrow block would use little of each row

ModelT = TypeVar("ModelT")


@dataclass(frozen=True)
class SiteDrift:
    """The effect of merging at one site.

    Args:
        survived: ⟨M − W, ΔW⟩ / ‖ΔW‖²: the share of the update that is in the merged weight M; 1 is all of it.
        error: ‖(M − W) − ΔW‖ / ‖ΔW‖.
        output: ‖x·M − (x·W + x·ΔW)‖ / ‖x·W + x·ΔW‖ on random x: merged against adapted.
        stochastic: whether the sum was rounded stochastically.
    """

    survived: float
    error: float
    output: float
    stochastic: bool = False


@dataclass(frozen=True)
class MergeReport:
    """Site path → drift, and the ties that had to be undone."""

    sites: Mapping[str, SiteDrift]
    untied: tuple[tuple[str, str], ...] = ()

    @property
    def survived(self) -> float:
        """The smallest share of an update that survived at any site."""
        return min(site.survived for site in self.sites.values())

    @property
    def output(self) -> float:
        """The largest relative output error of any site."""
        return max(site.output for site in self.sites.values())

    @property
    def stochastic(self) -> int:
        """The number of sites that were rounded stochastically."""
        return sum(site.stochastic for site in self.sites.values())


def merge_weight(
    W: Float[Tensor, "d h"],
    update: Update,
    path: str,
    rounding: Rounding = AUTO,
    name: str = "",
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "d h"], SiteDrift]:
    """M = round(W + ΔW), the sum in fp32 (float64 for a float64 W), rounded once.

    The bits do not depend on the number of threads.

    Args:
        W: the weight.
        update: ΔW.
        path: the site, for messages.
        rounding: how to round to half precision.
        name: of the tensor, which decides its random bits together with the seed.
        dtype: of M; by default that of W.

    Raises:
        MergeError: less than half of the update would survive rounding to nearest, or there are non-finite
            values.
    """
    dtype = dtype or W.dtype
    stochastic = partial(round_stochastically, dtype=dtype, seed=rounding.seed, name=name)
    merged, drift = _add(W, update, path, dtype, stochastic if rounding.first(dtype) else None)
    if rounding.retries(dtype, drift.survived):
        merged, drift = _add(W, update, path, dtype, stochastic)
    if drift.survived < MIN_SURVIVAL and not drift.stochastic:  # its errors are random, not a loss
        other = "round stochastically (--rounding), " if dtype in HALF else ""
        raise MergeError(
            f"{path}: only {max(drift.survived, 0.0):.0%} of the update survives the rounding to {dtype}; "
            f"{other}merge into a wider dtype (float32), or serve the adapter unmerged"
        )
    return merged, drift


def _add(
    W: Float[Tensor, "d h"],
    update: Update,
    path: str,
    dtype: torch.dtype,
    stochastic: Callable[..., Tensor] | None,
) -> tuple[Float[Tensor, "d h"], SiteDrift]:
    """W + ΔW in a dtype, rounded to nearest without `stochastic`, and how it differs from the exact sum."""
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    update = _checked(update.to(dtype=wide, device=W.device), update, W, path)
    x = torch.randn(PROBE_ROWS, W.shape[0], generator=torch.Generator().manual_seed(0)).to(W.device, wide)
    merged = torch.empty_like(W, dtype=dtype)
    size = kept = lost = output_error = output = 0.0  # squares of norms, except `kept`
    elements = BLOCK_ELEMENTS if W.stride(0) == 1 else ROWS_BLOCK_ELEMENTS
    columns = max(1, elements // W.shape[0])
    for start in range(0, W.shape[1], columns):
        stop = min(start + columns, W.shape[1])
        base, block = W[:, start:stop].to(wide), merged[:, start:stop]
        # In W's own memory layout: sums over mixed layouts are several times slower.
        part = _checked(update.columns(start, stop), update, base, path)
        delta = torch.empty_like(base).copy_(part.dense(base))
        total = base + delta
        block.copy_(total if stochastic is None else stochastic(total, column=start))
        rest = torch.sub(block, base).sub_(delta)  # the rounding error
        size += _sum(delta * delta)
        kept += _sum(rest * delta)
        lost += _sum(rest * rest)
        output_error += float((x @ rest).norm()) ** 2
        output += float((x @ total).norm()) ** 2
    if not all(map(math.isfinite, (size, kept, lost, output_error, output))):
        raise MergeError(f"{path}: {_why_not_finite(W, merged)}")
    drift = SiteDrift(
        survived=1.0 + kept / size if size else 1.0,
        error=(lost / size) ** 0.5 if size else 0.0,
        output=(output_error / max(output, 1e-60)) ** 0.5,
        stochastic=stochastic is not None,
    )
    return merged, drift


def _checked(part: Update, update: Update, W: Float[Tensor, "d n"], path: str) -> Update:
    """An update that was made of another one by `to` or `columns`, for the weight W.

    Raises:
        MergeError: it has another type or shape, as an inherited method may return.
    """
    if type(part) is not type(update) or not part.fits(W.shape):
        raise MergeError(
            f"{path}: `to` or `columns` of {type(update).__name__} returned a {type(part).__name__} of shape "
            f"{part.shape} for a weight of shape {tuple(W.shape)}; replace these methods in "
            f"{type(update).__name__}"
        )
    return part


def _sum(X: Float[Tensor, "d h"]) -> float:
    """The sum of all entries; column by column, so that it does not depend on the number of threads."""
    return sum(X.sum(0).tolist())


def _why_not_finite(W: Float[Tensor, "d h"], merged: Float[Tensor, "d h"]) -> str:
    """The cause of a non-finite sum, and what to do."""
    if not torch.isfinite(W).all():
        return (
            f"the base's weight holds non-finite values in {W.dtype}; load the base in a wider "
            "dtype (--dtype float32), or fetch it again"
        )
    if merged.dtype == torch.float16 and not torch.isfinite(merged).all():
        return (
            f"the sum of weight and update holds numbers too large for {merged.dtype}; merge into float32 or "
            "bfloat16 (--dtype), or serve the adapter unmerged"
        )
    return "the update is so large that its norm is no finite number; do not use this adapter"


def check_forward(
    module: nn.Module,
    W: Float[Tensor, "d h"],
    path: str,
    parameter: Parameter = lambda name: None,
) -> None:
    """Check that a module's output grows by x·ΔW if W becomes W + ΔW; its forward may scale or quantise W.

    A module with the standard forward needs no check. Another one is run on random x and ΔW.

    Args:
        module: of the site.
        W: its weight.
        path: of the site.
        parameter: name in the model → a tensor to use instead of the module's own.

    Raises:
        MergeError: it does not, so that the merged model would differ from the adapted one.
    """
    if has_plain_forward(module):
        return
    kind, generator, (d, h) = require_kind(module), torch.Generator().manual_seed(0), W.shape
    x = example_input(module, PROBE_ROWS, generator, W.device, W.dtype)
    u, v = torch.randn(d, 1, generator=generator).to(W) / d**0.5, torch.randn(1, h, generator=generator).to(W)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    others = {name: parameter(f"{path}.{name}") for name in tensors if name != "weight"}
    tensors |= {name: t.to(W.device) for name, t in others.items() if t is not None}
    was_training, module.training = module.training, False

    def run(weight: Tensor) -> Tensor:
        stored = kind.from_dxh(weight, tuple(module.weight.shape))  # type: ignore[union-attr]
        return torch.func.functional_call(module, {**tensors, "weight": stored}, (x,))

    try:
        base = run(W)
        v *= base.abs().mean().clamp_min(1e-3)  # as large as the base's output: no rounding hides it
        wide = W.dtype if W.dtype == torch.float64 else torch.float32
        exact = x.to(wide) if x.is_floating_point() else x
        expected = kind.product(module, exact, u.to(wide) @ v.to(wide)).double()
        error = float((run(W + u @ v).double() - base.double() - expected).norm() / expected.norm())
        reason = f"does not add x·ΔW where its weight gets ΔW (off by {error:.1e} of it)"
    except Exception as failure:  # a model's forward may raise anything, or return no tensor
        error, reason = math.inf, f"fails in a trial ({type(failure).__name__}: {failure})"
    finally:
        module.training = was_training
    if not error <= PROBE_TOLERANCE.get(W.dtype, HALF_PROBE_TOLERANCE):
        raise MergeError(
            f"{path} ({type(module).__name__}) has a forward of its own, which {reason}: merged, it would be "
            "another model; serve the adapter unmerged, or leave the site out"
        )


def require_adapter(adapter: object) -> None:
    """Check that the argument is an `Adapter`.

    Raises:
        MergeError: it is a path, an attachment or something else.
    """
    if not isinstance(adapter, Adapter):
        raise MergeError(f"expected an Adapter; got {type(adapter).__name__}: load one with load(folder)")


def merge(
    model: ModelT,
    adapter: Adapter,
    *,
    allow_different_base: bool = False,
    rounding: Mode = "auto",
    rounding_seed: int = 0,
    report: list[MergeReport] | None = None,
) -> ModelT:
    """A new model with W + ΔW in place of W: it has the base's classes and no parts of an adapter.

    Merging a Base gives a Base, merging an nn.Module an nn.Module; the argument does not change. A weight
    that is tied to another module is untied first, and the report lists it. A quantised base is dequantised:
    the merged model is dense, in the dtype of the base's other weights.

    Args:
        model: an nn.Module or a Base, with nothing attached.
        adapter: the adapter.
        allow_different_base: accept an adapter whose fingerprint shows another base.
        rounding: of weights in bf16 and fp16: nearest, stochastic, or auto, which is stochastic at sites
            where nearest keeps less than 99.5 % of ΔW.
        rounding_seed: of the random bits; the same seed gives the same weights.
        report: a list to which the `MergeReport` is appended.

    Raises:
        ConfigError: an unknown rounding, or an invalid seed.
        BaseMismatchError: the base is another one, or the adapter is already merged into it.
        MergeError: the argument is not an adapter, the model has one attached, a weight is not stored as a
            plain matrix, a module's forward does not compute x·W, there are non-finite values, or rounding
            would remove most of the update.
    """
    require_adapter(adapter)
    how = Rounding(rounding, rounding_seed)
    root = unwrap(model)
    if any(isinstance(module, Adapted) for module in root.modules()):
        raise MergeError("the model has an adapter attached; detach it, then merge")
    check_base(root, adapter, allow_different_base=allow_different_base)
    merged = copy.deepcopy(root)
    sites = {path: site for site in find_sites(merged, trial=False) for path in site.paths}
    drifts: dict[str, SiteDrift] = {}
    untied: list[tuple[str, str]] = []
    with torch.no_grad():
        for path, update in adapter.items():
            site = sites[path]
            module = site_module(merged, path)
            weight = module._parameters.get("weight")
            W = dense_dxh(module)
            if weight is None or W is None:
                raise MergeError(
                    f"{path}: its weight is not stored as a plain matrix, but {_storage(module)}; load the "
                    "base unquantised, remove parametrizations, and merge into that"
                )
            if is_packed(module):  # its forward is x·W with the dequantised W
                M, drifts[path] = merge_weight(W, update, path, how, f"{site.path}.weight", model_dtype(root))
                _replace(merged, path, plain_linear(module, M.mT.contiguous()))
                continue
            check_forward(module, W, path)
            M, drifts[path] = merge_weight(W, update, path, how, f"{site.path}.weight")
            stored = KINDS[site.kind].from_dxh(M, weight.shape).contiguous()
            if site.tied_to:
                untied.append((path, site.tied_to))
                module.weight = nn.Parameter(stored, requires_grad=weight.requires_grad)
            else:
                weight.copy_(stored)
        dequantise_others(merged, model_dtype(root))
    if untied:
        _part_other_ties(merged)
        _untie_config(merged)
    if report is not None:
        report.append(MergeReport(drifts, tuple(untied)))
    if isinstance(model, nn.Module):
        return merged  # type: ignore[return-value]
    return dataclasses.replace(model, model=merged)  # type: ignore[type-var]


def dequantise_others(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace all layers that bitsandbytes has quantised by dense ones; the model is then a plain one."""
    packed = [(path, module) for path, module in model.named_modules() if is_packed(module)]
    for path, module in packed:
        _replace(model, path, plain_linear(module, dequantised(module).to(dtype)))
    if packed or getattr(model, "hf_quantizer", None):
        forget_quantisation(model)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def _storage(module: nn.Module) -> str:
    weight = module.weight
    if "weight" not in module._parameters:
        return "computed from other tensors"
    return f"as {weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__


def _part_other_ties(model: Any) -> None:
    """Give all other tied weights of an HF model separate tensors, because its config unties all of them."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in ties.items():
        if target in parameters and parameters[target] is parameters.get(source):
            owner, _, name = target.rpartition(".")
            own = nn.Parameter(parameters[target].detach().clone(), parameters[target].requires_grad)
            setattr(model.get_submodule(owner), name, own)


def _untie_config(model: Any) -> None:
    """Set tie_word_embeddings to false in an HF model's config; otherwise loading would tie weights again."""
    config = getattr(model, "config", None)
    for part in (config, text_config(model)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
