"""From an nn.Module to the sites that an adapter can have in it.

It changes nothing in the module.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from brushstroke.adapter import Other, Site, is_conv1d
from brushstroke.errors import AttachError, did_you_mean
from brushstroke.layers.bypass import run_without_gradients_by, weights_read_by

_LAZY_REASON = "its weight gets its shape from the first batch; run one through the model, then attach"
TRIAL_ROWS = 2


def unwrap(model: Any) -> nn.Module:
    """The nn.Module in a Base, a compiled module, or the module itself.

    Raises:
        AttachError: there is none.
    """
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise AttachError(f"expected an nn.Module or a Base; got {type(model).__name__}")
    return getattr(inner, "_orig_mod", inner)


def site_kind(module: nn.Module) -> str | None:
    """ "linear", "conv1d" (HF's, told by its class name), or None for what cannot be adapted yet."""
    if isinstance(module, nn.Linear):
        return "linear"
    if is_conv1d(module):
        return "conv1d"
    return None


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a module runs nn.Linear's forward or HF Conv1D's, and no other of its class or its own."""
    return _is_plain(type(module)) and "forward" not in module.__dict__


def weight_dxh(module: nn.Module, kind: str) -> Tensor | None:
    """W (d×h) of a site as a view, or None where it is stored in another form (packed, quantised)."""
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        return None
    if kind == "linear" and tuple(weight.shape) != (module.out_features, module.in_features):
        return None
    return weight.mT if kind == "linear" else weight


def find_sites(model: Any, *, trial: bool = True) -> list[Site]:
    """Every adaptable weight of the model, in model order; a shared module once, with its aliases.

    Args:
        model: an nn.Module or a Base.
        trial: run one module of each class that has a forward of its own on a few rows, to find those whose
            output is not x·W.
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
        kind = site_kind(module)
        if kind is None:
            continue
        if isinstance(module, nn.Linear):
            d, h = module.in_features, module.out_features
        else:
            d, h = cast(Tensor, module.weight).shape
        reason = bypassed.get(module)
        if isinstance(module.weight, nn.UninitializedParameter):
            reason = _LAZY_REASON
        elif reason is None and trial:
            cls = _own_class(module)
            if cls not in unfit:
                unfit[cls] = _unfit(module, d, h)
            reason = unfit[cls]
        tied = [owner for owner in owners.get(id(module.weight), []) if owner != path]
        sites.append(
            Site(
                path=path,
                d=d,
                h=h,
                kind=kind,
                aliases=tuple(aliases),
                tied_to=tied[0] if tied else None,
                is_output=module is output,
                bypassed=reason,
                frozen=frozen.get(module),
            )
        )
    return sites


def find_others(model: Any, sites: Sequence[Site]) -> list[Other]:
    """Every module that is no site, and every bare parameter of two or more axes, in model order.

    What is below a site belongs to it; the weight of a shared module counts under its first path.
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
        weighs = new and "weight" in axes and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        others.append(Other(path, type(module).__name__, weighs, tuple(below.get(path, ()))))
        for name in (name for name in axes if name != "weight"):
            full = f"{path}.{name}".lstrip(".")
            others.append(Other(full, f"bare {axes[name]}-D parameter", weighs=new))
    return others


def site_module(root: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        AttachError: there is none, with near misses.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        near = did_you_mean(path, [name for name, _ in root.named_modules()])
        raise AttachError(f"the model has no module {path!r}{near}") from None


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without the adapter that may be in it."""
    return getattr(type(module), "_base_class", type(module))


def _is_plain(cls: type[nn.Module]) -> bool:
    return cls.forward is nn.Linear.forward or cls.__name__ == "Conv1D"


def _bypassed(modules: Mapping[nn.Module, Sequence[str]]) -> dict[nn.Module, str]:
    """Module → why an adapter in it would have no effect: the weight is read without calling the module."""
    found: dict[nn.Module, str] = {}
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):  # `block_bypasses` closes its fast path
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
    """Module → why it gets no gradient: the model itself runs it without."""
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


def _unfit(module: nn.Module, d: int, h: int) -> str | None:
    """Why a module with a forward of its own cannot be adapted: it does not map rows of d to rows of h."""
    cls, weight = _own_class(module), cast(Tensor, module.weight)
    if _is_plain(cls) or weight.is_meta:
        return None
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.ones(TRIAL_ROWS, d, device=weight.device, dtype=dtype)
    was_training, module.training = module.training, False
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            y = cls.forward(module, x)
    except Exception as error:  # whatever a stranger's forward raises
        return f"{cls.__name__} fails in a trial on rows of {d} ({type(error).__name__}: {str(error)[:100]})"
    finally:
        module.training = was_training
    if not isinstance(y, Tensor):
        return f"{cls.__name__} gives a {type(y).__name__} and no tensor, so that x·W cannot be told in it"
    if y.shape != (TRIAL_ROWS, h):
        return f"{cls.__name__} gives {tuple(y.shape)} for rows of {d}, where x·W has {(TRIAL_ROWS, h)}"
    return None


def _output_layer(root: nn.Module) -> nn.Module | None:
    getter = getattr(root, "get_output_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
