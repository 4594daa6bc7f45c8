"""Tests that adapted modules apply their update, and blocks code paths that would bypass or save an adapter.

It swaps no class; every change that it makes to a model can be undone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from brushstroke.errors import AttachError
from brushstroke.layers.adapted import Adapted
from brushstroke.sites.kinds import compute_dtype, example_input

PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative; half precision gets the last line
HALF_PROBE_TOLERANCE = 0.1
_ABSENT = object()


def require_unattached(root: nn.Module, own: Mapping[str, nn.Module] | None = None) -> None:
    """Check that a model has no adapter apart from those in the given modules.

    Raises:
        AttachError: it has one; the message names the ways to use several adapters.
    """
    known = {id(module) for module in (own or {}).values()}
    for path, module in root.named_modules():
        if isinstance(module, Adapted) and id(module) not in known:
            raise AttachError(
                f"the model already has an adapter attached (at {path or 'its root'}); detach it first, add "
                "the two adapters (a + b) and attach the sum, or put both into a bank"
            )


def block_bypasses(root: nn.Module, modules: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
    """Block bypasses of these adapted modules, and `save_pretrained`; returns functions that undo this."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AttachError(
            "the model has an adapter in it, and save_pretrained would write its factors into the base's "
            "files; save the adapter with brushstroke.save(), or merge it and save the merged model"
        )

    undo: list[Callable[[], None]] = []
    for path, layer in root.named_modules():
        if not any(p == path or p.startswith(f"{path}.") or not path for p in modules):
            continue
        if hasattr(type(layer), "save_pretrained"):
            undo.append(_override(layer, "save_pretrained", refuse))
        # The inference fast path of these two classes reads the weights without calling their submodules.
        if isinstance(layer, nn.TransformerEncoderLayer):
            undo.append(_override(layer, "activation_relu_or_gelu", 0))
        if isinstance(layer, nn.TransformerEncoder):
            undo.append(_override(layer, "use_nested_tensor", False))
    return undo


def probe(modules: Mapping[str, Adapted]) -> None:
    """Run one module of each class on random input and check that its output contains the update.

    Raises:
        AttachError: the module does not run the adapted forward.
    """
    for path in {type(module): path for path, module in modules.items()}.values():
        _probe(modules[path], path)


def _probe(module: Adapted, path: str) -> None:
    dtype, generator = compute_dtype(module), torch.Generator().manual_seed(0)
    x = example_input(module, 2, generator, module.weight.device, dtype)
    was_training = module.training
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        module.training = False
        switch_back = module._route.set((0,))
        try:
            base = module(x)
            if not isinstance(base, torch.Tensor):
                raise AttachError(
                    f"{path} ({module._base_class.__name__}) returns a {type(base).__name__}, not a tensor, "
                    "so it cannot be adapted"
                )
            tensors, settings, expected = module.trial(x, base, generator)
            before = {name: module.__dict__[name] for name in settings}
            module.__dict__.update(settings)
            module._route.set((1,))
            try:
                got = torch.func.functional_call(module, tensors, (x,))
            finally:
                module.__dict__.update(before)
        finally:
            module.training = was_training
            switch_back()
    change = expected - base.double()
    error = float((got.double() - expected).norm() / change.norm())
    if not error <= PROBE_TOLERANCE.get(dtype, HALF_PROBE_TOLERANCE):
        raise AttachError(
            f"{path} ({module._base_class.__name__}) does not run the adapted forward: its output differs by "
            f"{error:.1e} of the low-rank term; this kind of module cannot be adapted"
        )


def _override(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of the instance without calling __setattr__; returns a function that restores it."""
    before = module.__dict__.get(name, _ABSENT)
    module.__dict__[name] = value

    def undo() -> None:
        if before is _ABSENT:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before

    return undo
