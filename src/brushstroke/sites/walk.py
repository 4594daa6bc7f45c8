"""Finds the sites of an nn.Module, and its modules and parameters that are not sites.

It changes nothing in the module.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from brushstroke.errors import AttachError, did_you_mean
from brushstroke.sites.bypass import run_without_gradients_by, weights_read_by
from brushstroke.sites.kinds import Kind, compute_dtype, example_input, kind_of
from brushstroke.sites.site import Other, Site

_LAZY_REASON = "its weight gets its shape from the first batch; run one batch through the model, then attach"
TRIAL_ROWS = 2


def unwrap(model: Any) -> nn.Module:
    """The nn.Module in a Base or a compiled module, or the module itself.

    Raises:
        AttachError: it contains no nn.Module.
    """
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise AttachError(f"expected an nn.Module or a Base; got {type(model).__name__}")
    return getattr(inner, "_orig_mod", inner)


def find_sites(model: Any, *, trial: bool = True) -> list[Site]:
    """Every adaptable weight of the model, in model order; a shared module once, with its aliases.

    Args:
        model: an nn.Module or a Base.
        trial: run one module of each class with a non-standard forward on a few rows, to find those whose
            output does not have the shape of x·W.
    """
    root = unwrap(model)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    owners: dict[int, list[str]] = {}
    for module, found in paths.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(found[0])
    output = _output_layer(root)
    bypassed, frozen = _bypassed(paths), _frozen(paths)
    unfit: dict[type, str | None] = {}
    sites = []
    for module, (path, *aliases) in paths.items():
        kind = kind_of(module)
        if kind is None:
            continue
        d, h = kind.shape(module)
        reason = kind.refusal(module) or bypassed.get(module)
        if isinstance(module.weight, nn.UninitializedParameter):
            reason = _LAZY_REASON
        elif reason is None and trial:
            cls = _own_class(module)
            if cls not in unfit:
                unfit[cls] = _unfit(module, kind)
            reason = unfit[cls]
        tied = [owner for owner in owners.get(id(module.weight), []) if owner != path]
        sites.append(
            Site(
                path=path,
                d=d,
                h=h,
                kind=kind.name,
                in_groups=kind.in_groups,
                aliases=tuple(aliases),
                tied_to=tied[0] if tied else None,
                is_output=module is output,
                bypassed=reason,
                frozen=frozen.get(module),
            )
        )
    return sites


def find_others(model: Any, sites: Sequence[Site]) -> list[Other]:
    """Every module that is not a site, and every bare parameter of two or more axes, in model order.

    Modules below a site are not listed. The weight of a shared module is counted only at its first path.
    """
    covered = {path for site in sites for path in site.paths}
    below: dict[str, dict[str, None]] = {}  # the names of the sites below each path
    for site in sites:
        for path in site.paths:
            while path:
                path = path.rpartition(".")[0]
                below.setdefault(path, {})[site.name] = None
    others: list[Other] = []
    seen: set[nn.Module] = set()
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        if path in covered or (path and path.rpartition(".")[0] in covered):
            covered.add(path)
            continue
        new = module not in seen
        seen.add(module)
        axes = {name: p.ndim for name, p in module.named_parameters(recurse=False) if p.ndim > 1}
        has_weight = new and "weight" in axes and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        others.append(Other(path, type(module).__name__, has_weight, tuple(below.get(path, ()))))
        for name in (name for name in axes if name != "weight"):
            full = f"{path}.{name}".lstrip(".")
            others.append(Other(full, f"bare {axes[name]}-D parameter", has_weight=new))
    return others


def site_module(root: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        AttachError: there is no such module; the message lists near misses.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        near = did_you_mean(path, [name for name, _ in root.named_modules()])
        raise AttachError(f"the model has no module {path!r}{near}") from None


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The original class of a module that may be adapted."""
    return getattr(type(module), "_base_class", type(module))


def _bypassed(modules: Mapping[nn.Module, Sequence[str]]) -> dict[nn.Module, str]:
    """Module → why an adapter in it would have no effect: the weight is read without calling the module."""
    found: dict[nn.Module, str] = {}
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):  # `block_bypasses` blocks its fast path
            continue
        for path, method in weights_read_by(module).items():
            try:
                child = module.get_submodule(path)
            except AttributeError:  # not in this instance
                continue
            reader = _own_class(module).__name__
            found[child] = f"{reader} reads its weight directly (in {method}), which bypasses an adapter"
    return found


def _frozen(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Module → why it gets no gradient: the model runs it under `torch.no_grad`."""
    found: dict[nn.Module, str] = {}
    for module in modules:
        for path, method in run_without_gradients_by(module).items():
            try:
                below = module.get_submodule(path)
            except AttributeError:  # a method of the class, or not in this instance
                continue
            reason = f"{_own_class(module).__name__} runs it without gradients (in {method})"
            found |= dict.fromkeys(below.modules(), reason)
    return found


def _unfit(module: nn.Module, kind: Kind) -> str | None:
    """Why a module with a non-standard forward cannot be adapted: its output lacks the shape of x·W."""
    cls, weight = _own_class(module), cast(Tensor, module.weight)
    if kind.is_plain(cls) or weight.is_meta:
        return None
    generator, W = torch.Generator().manual_seed(0), torch.empty(kind.shape(module), device="meta")
    x = example_input(module, TRIAL_ROWS, generator, weight.device, compute_dtype(module))
    was_training, module.training = module.training, False
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            y = cls.forward(module, x)
    except Exception as error:  # a model's forward may raise anything
        return (
            f"{cls.__name__} fails in a trial on rows of {W.shape[0]} "
            f"({type(error).__name__}: {str(error)[:100]})"
        )
    finally:
        module.training = was_training
    if not isinstance(y, Tensor):
        return f"{cls.__name__} returns a {type(y).__name__}, not a tensor"
    expected = kind.product(module, x.to("meta", W.dtype if x.is_floating_point() else None), W).shape
    if y.shape != expected:
        return (
            f"{cls.__name__} returns {tuple(y.shape)} for rows of {W.shape[0]}, but x·W has {tuple(expected)}"
        )
    return None


def _output_layer(root: nn.Module) -> nn.Module | None:
    getter = getattr(root, "get_output_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
