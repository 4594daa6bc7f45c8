"""Put one adapter into a live model, and take it out again bit for bit.

Several adapters at once are the bank's part.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from brushstroke.adapter import Adapter, Card, LoraConfig, Site, TargetPlan, Verdict, resolve_targets
from brushstroke.adapter.fingerprint import Fingerprint
from brushstroke.adapter.targets import short_names
from brushstroke.errors import AttachError, BaseMismatchError, ShapeError, did_you_mean
from brushstroke.layers.adapted import AdaptedLinear, restore_class, swap_class
from brushstroke.layers.route import Route
from brushstroke.layers.walk import find_sites, site_module, unwrap, weight_dxh
from brushstroke.lowrank import LowRank, Update
from brushstroke.lowrank.init import INITS

PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative; half precision gets the last line
HALF_PROBE_TOLERANCE = 0.1


class QuantisedBaseWarning(UserWarning):
    """The adapter is used on a quantised form of its base, or was trained on one."""


class Attachment:
    """One adapter inside a model; a context manager that detaches at its end.

    Made by `attach`. `model` is the module that it sits in, `plan` the resolved targets of a new adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, AdaptedLinear],
        card: Card | None,
        plan: TargetPlan | None,
    ) -> None:
        self.model = model
        self.plan = plan
        self._modules = dict(modules)
        self._card = card
        self._undo: list[Callable[[], None]] = []
        self._route: Route = next(iter(modules.values()))._route

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the adapted sites."""
        return tuple(self._modules)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Path → adapted module."""
        return self._modules

    @property
    def attached(self) -> bool:
        """Whether the adapter is still in the model."""
        return bool(self._modules)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors, for an optimiser: of each site Uᵀ (r×d), then V (r×h)."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, factor) pairs, such as ("fc1.lora_V", …)."""
        for path, module in self._modules.items():
            yield f"{path}.lora_U_rows", module.lora_U_rows
            yield f"{path}.lora_V", module.lora_V

    def adapter(self, card: Card | None = None) -> Adapter:
        """The adapter as it is now, as a value of its own: later training does not change it."""
        self._check_attached()
        updates = {
            path: LowRank(m.lora_U_rows.detach().clone().mT, m.lora_V.detach().clone(), m.lora_scale)
            for path, m in self._modules.items()
        }
        return Adapter(updates, card or self._card)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is its base again, bit for bit."""
        self._check_attached()
        restore = self._route.set((0,))
        try:
            yield
        finally:
            restore()

    def detach(self) -> None:
        """Take the adapter out: classes, parameters, buffers and flags are as `attach` found them.

        Raises:
            AttachError: it is detached already, or something else changed a module's class since.
        """
        self._check_attached()
        for path, module in self._modules.items():
            restore_class(module, path)
            del module.lora_U_rows, module.lora_V, module.lora_scale, module.lora_dropout
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._modules.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.attached:
            self.detach()

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError("this attachment was detached already; attach the adapter again")


def attach(
    model: Any,
    what: Adapter | LoraConfig,
    *,
    trainable: bool = False,
    seed: int = 0,
    dropout: float | None = None,
    allow_different_base: bool = False,
) -> Attachment:
    """Put an adapter, or a fresh one by a config, into a model; it takes effect at once.

    Every adapted module's class is swapped for a subclass whose forward is x·W + scale·(x·U)·V. No module is
    wrapped, no hook is installed and no base weight is touched. A fresh adapter starts with V = 0, so that the model
    computes exactly what it did before.

    Args:
        model: an nn.Module or a Base.
        what: an adapter, or the config of a new one.
        trainable: freeze the base and let the factors have gradients; detaching restores the base's flags.
        seed: for the starting factors of a fresh adapter.
        dropout: on the low-rank path; the config's own where one is given.
        allow_different_base: attach although the fingerprint says that the adapter belongs to another base.

    Raises:
        TargetError: a target pattern matches nothing, or a rank does not fit.
        BaseMismatchError: the adapter belongs to another base, or is merged into this one.
        ShapeError: sites are missing or have other shapes.
        AttachError: a site has an adapter already, or cannot take one.
    """
    root = unwrap(model)
    sites = {site.path: site for site in find_sites(root)}
    plan: TargetPlan | None = None
    if isinstance(what, LoraConfig):
        plan = resolve_targets(what, list(sites.values()))
        card = _new_card(root, sites, what, plan, getattr(model, "name", None))
        updates, dropout = _fresh_updates(sites, what, plan, seed), what.dropout
    elif isinstance(what, Adapter):
        check_base(root, what, allow_different_base=allow_different_base)
        card = what.card
        updates = {_canonical(path, sites): _low_rank(path, update) for path, update in what.items()}
    else:
        raise AttachError(f"expected an Adapter or a LoraConfig; got {type(what).__name__}")

    undo: list[Callable[[], None]] = []
    modules: dict[str, AdaptedLinear] = {}
    route = Route((1,))
    try:
        for path, update in updates.items():
            module = site_module(root, path)
            swap_class(module, path, AdaptedLinear, route)
            modules[path] = module  # type: ignore[assignment]
            _install(module, update, trainable, dropout or 0.0)
        undo += guard_model(root, modules)
        for path in {(type(module), sites[p].kind): p for p, module in modules.items()}.values():
            _probe(modules[path], path)
    except BaseException:
        for path, module in modules.items():
            restore_class(module, path)
            for name in ("lora_U_rows", "lora_V", "lora_scale", "lora_dropout"):
                if hasattr(module, name):
                    delattr(module, name)
        for step in reversed(undo):
            step()
        raise
    attachment = Attachment(root, modules, card, plan)
    attachment._undo = undo
    if trainable:
        attachment._undo.append(_freeze(root, {id(p) for p in attachment.parameters()}))
    return attachment


def check_base(
    model: Any,
    adapter: Adapter,
    *,
    allow_different_base: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Check an adapter against a base: every site is there, with its shape, and the weights are the ones it knows.

    Args:
        model: an nn.Module or a Base (also one on the meta device, where `weights` is given).
        adapter: the adapter.
        allow_different_base: pass over the verdict of the fingerprint.
        weights: site → W (d×h) to judge by, instead of the model's own.

    Raises:
        ShapeError: sites that are missing or have other shapes, all of them listed.
        BaseMismatchError: another base, or one that holds this adapter already.
    """
    root = unwrap(model)
    sites = {path: site for site in find_sites(root) for path in site.paths}
    problems = []
    for path, update in adapter.items():
        if path not in sites:
            near = did_you_mean(path, sites, count=1)
            problems.append(f"{path}: the base has no such site{near}")
        elif sites[path].bypassed:
            problems.append(f"{path}: {sites[path].bypassed}")
        elif sites[path].shape != update.shape:
            problems.append(f"{path}: the base's weight is {sites[path].shape}, the update {update.shape}")
    if problems:
        shown = "\n  ".join(problems[:10]) + (
            f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        )
        raise ShapeError(
            f"this adapter does not fit the base at {len(problems)} of {len(adapter)} sites:\n  {shown}"
        )
    fingerprint = adapter.card.fingerprint if adapter.card else None
    if fingerprint is None or allow_different_base:
        return
    if weights is None:
        weights = _plain_weights(root, {path: sites[path] for path in fingerprint.samples if path in sites})
    sampled = [path for path in fingerprint.samples if path in weights and path in adapter]
    if not sampled:
        return
    # Weights read from files come one at a time, unless some of them must be left out.
    known = weights if len(sampled) == len(fingerprint.samples) else {path: weights[path] for path in sampled}
    verdict, difference = fingerprint.judge(known, _delta_reader(adapter), _is_quantised(root))
    name = (adapter.card.base_name if adapter.card else None) or "unknown"
    if verdict is Verdict.MERGED:
        raise BaseMismatchError(
            "this adapter is merged into the base already; use the base as it is, or load the original weights "
            f"({name})"
        )
    if verdict is Verdict.FOREIGN:
        raise BaseMismatchError(
            f"this adapter was trained on another base ({name}): the weights differ by {difference:.1%} at the sampled "
            "positions; load the right base, or allow a different one (--allow-different-base, allow_different_base=True)"
        )
    if verdict is Verdict.QUANTISED:
        warnings.warn(
            f"the base is a quantised form of the one that this adapter was trained on ({difference:.1%} apart)",
            QuantisedBaseWarning,
            stacklevel=3,
        )


def guard_model(root: nn.Module, modules: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
    """Close the ways by which a model would bypass adapted modules or write them out; returns what reopens them."""
    undo: list[Callable[[], None]] = []
    if hasattr(root, "save_pretrained"):

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise AttachError(
                "the model has an adapter in it, and save_pretrained would write its factors into the base's files; "
                "save the adapter with brushstroke.save(), or merge it and save the merged model"
            )

        root.__dict__["save_pretrained"] = refuse
        undo.append(lambda: root.__dict__.pop("save_pretrained", None))
    for path, layer in root.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(
            p.startswith(f"{path}.") or not path for p in modules
        ):
            # Its inference fast path reads linear1.weight and linear2.weight and runs no submodule's forward.
            before = layer.activation_relu_or_gelu
            layer.activation_relu_or_gelu = 0
            undo.append(lambda layer=layer, before=before: setattr(layer, "activation_relu_or_gelu", before))
    return undo


def _canonical(path: str, sites: Mapping[str, Site]) -> str:
    return path if path in sites else next(site.path for site in sites.values() if path in site.aliases)


def _low_rank(path: str, update: Update) -> LowRank:
    if not isinstance(update, LowRank):
        raise AttachError(f"{path}: a {type(update).__name__} cannot be attached to a linear layer yet")
    return update


def _fresh_updates(
    sites: Mapping[str, Site], config: LoraConfig, plan: TargetPlan, seed: int
) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for path, rank in plan.ranks.items():
        site = sites[path]
        U_rows = INITS[config.init](site.d, rank, generator)
        updates[path] = LowRank(U_rows.mT, torch.zeros(rank, site.h), plan.scales[path])
    return updates


def _install(module: nn.Module, update: LowRank, trainable: bool, dropout: float) -> None:
    weight = module.weight
    dtype = update.dtype
    if trainable:
        wide = weight.dtype == torch.float64 or dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
    for name, tensor in (("lora_U_rows", update.U.mT), ("lora_V", update.V)):
        held = tensor.detach().to(weight.device, dtype).clone(memory_format=torch.contiguous_format)
        module.register_parameter(name, nn.Parameter(held, requires_grad=trainable))
    module.lora_scale, module.lora_dropout = update.scale, dropout


def _freeze(root: nn.Module, factors: set[int]) -> Callable[[], None]:
    before = [(p, p.requires_grad) for p in root.parameters() if id(p) not in factors]
    for parameter, _ in before:
        parameter.requires_grad_(False)

    def restore() -> None:
        for parameter, flag in before:
            parameter.requires_grad_(flag)

    return restore


def _probe(module: AdaptedLinear, path: str) -> None:
    """Run one adapted module on random input with V = 1 and see that the low-rank term arrives."""
    d = module.lora_U_rows.shape[1]
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(2, d, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    V = torch.ones_like(module.lora_V)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        was_training, module.training = module.training, False
        try:
            got = torch.func.functional_call(module, {"lora_V": V}, (x,))
            with _route_off(module):
                base = module(x)
        finally:
            module.training = was_training
        expected = module.lora_scale * (x.double() @ module.lora_U_rows.double().mT) @ V.double()
    error = float((got.double() - base.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    size = float(base.double().norm() / expected.norm().clamp_min(1e-30))
    if error > PROBE_TOLERANCE.get(dtype, HALF_PROBE_TOLERANCE) * max(1.0, size):
        raise AttachError(
            f"{path} ({type(module).__mro__[2].__name__}) does not run the adapted forward: its output is off by "
            f"{error:.1e} of the low-rank term; this kind of module cannot be adapted"
        )


@contextmanager
def _route_off(module: AdaptedLinear) -> Iterator[None]:
    restore = module._route.set((0,))
    try:
        yield
    finally:
        restore()


def _plain_weights(root: nn.Module, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    found = {path: weight_dxh(site_module(root, path), site.kind) for path, site in sites.items()}
    return {path: W for path, W in found.items() if W is not None and W.device.type != "meta"}


def _is_quantised(root: nn.Module) -> bool:
    marked = getattr(root, "brushstroke_quantised", False)
    return bool(marked) or getattr(getattr(root, "config", None), "quantization_config", None) is not None


def _delta_reader(adapter: Adapter) -> Callable[[str, Tensor, Tensor], Tensor]:
    def read(path: str, i: Tensor, j: Tensor) -> Tensor:
        update = adapter[path]
        if isinstance(update, LowRank):
            U, V = update.U.to("cpu", torch.float64), update.V.to("cpu", torch.float64)
            return update.scale * (U[i] * V[:, j].mT).sum(-1)
        return update.dense()[i, j]

    return read


def _new_card(
    root: nn.Module, sites: Mapping[str, Site], config: LoraConfig, plan: TargetPlan, base_name: str | None
) -> Card:
    chosen = {path: sites[path] for path in plan.ranks}
    weights = _plain_weights(root, chosen)
    return Card(
        base_name=base_name,
        lora=config.as_dict(),
        target_modules=short_names(chosen, [path for path, _ in root.named_modules()]),
        fingerprint=Fingerprint.of(weights, _is_quantised(root)) if weights else None,
        conv1d=all(site.kind == "conv1d" for site in chosen.values()),
    )
