"""From an nn.Module to the sites that an adapter can have in it.

It changes nothing in the module.
"""

from typing import Any, cast

from torch import Tensor, nn

from brushstroke.adapter import Site, is_conv1d
from brushstroke.errors import AttachError, did_you_mean

_LAZY_REASON = "its weight gets its shape from the first batch; run one through the model, then attach"
_MAMBA_REASON = "the mixer around it reads its weight directly and does not run its forward"
_MHA_REASON = "nn.MultiheadAttention reads this module's weight directly and never runs its forward"


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
    plain = type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"
    return plain and "forward" not in module.__dict__


def weight_dxh(module: nn.Module, kind: str) -> Tensor | None:
    """W (d×h) of a site as a view, or None where it is stored in another form (packed, quantised)."""
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        return None
    if kind == "linear" and tuple(weight.shape) != (module.out_features, module.in_features):
        return None
    return weight.mT if kind == "linear" else weight


def find_sites(model: Any) -> list[Site]:
    """Every adaptable weight of the model, in model order; a shared module once, with its aliases."""
    root = unwrap(model)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    owners: dict[int, list[str]] = {}
    for module, found in paths.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(found[0])
    output = _output_layer(root)
    bypassed = {
        id(child): _MHA_REASON
        for module in paths
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    bypassed |= {
        id(module._modules["dt_proj"]): _MAMBA_REASON
        for module in paths
        if hasattr(module, "A_log") and "dt_proj" in module._modules
    }
    sites = []
    for module, (path, *aliases) in paths.items():
        kind = site_kind(module)
        if kind is None:
            continue
        if isinstance(module, nn.Linear):
            d, h = module.in_features, module.out_features
        else:
            d, h = cast(Tensor, module.weight).shape
        reason = bypassed.get(id(module))
        if isinstance(module.weight, nn.UninitializedParameter):
            reason = _LAZY_REASON
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
            )
        )
    return sites


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


def _output_layer(root: nn.Module) -> nn.Module | None:
    getter = getattr(root, "get_output_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
