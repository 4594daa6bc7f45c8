"""Several adapters in one model at the same time; a route selects the adapter of each row of a batch.

It does not train. Loading and evicting do not change the active route.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from brushstroke.adapter import Adapter, Card
from brushstroke.errors import AttachError, RouteError, did_you_mean
from brushstroke.layers.adapted import Adapted, Banked, restore_classes, swap_class
from brushstroke.layers.probe import block_bypasses, probe, require_unattached
from brushstroke.layers.registry import banked_class, variant_of
from brushstroke.layers.route import Route
from brushstroke.lowrank import LowRank, Update
from brushstroke.sites import canonical_path, check_base, find_sites, site_module, unwrap
from brushstroke.sites.kinds import compute_dtype
from brushstroke.sites.quantised import keep_packing


class Bank:
    """Named adapters in the slots of one model; a context manager that detaches them at the end.

    Made by `bank`. Slot 0 always means "no adapter". Switching changes the route, not the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._sites = {site.path: site for site in find_sites(model, trial=False)}
        self._route = Route((0,))
        self._modules: dict[str, Banked] = {}
        self._slots: dict[str, int] = {}
        self._cards: dict[str, Card | None] = {}
        self._outer: list[tuple[int, ...]] = []
        self._undo: list[Callable[[], None]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the bank."""
        return tuple(self._slots)

    @property
    def active(self) -> tuple[str | None, ...]:
        """The adapter of each row of the active route; None means the base."""
        names = {slot: name for name, slot in self._slots.items()}
        return tuple(names.get(slot) for slot in self._route.slots)

    def card(self, name: str) -> Card | None:
        """The card of an adapter in the bank.

        Raises:
            RouteError: the bank has no adapter of that name.
        """
        self.slot(name)
        return self._cards[name]

    def load(self, name: str, adapter: Adapter, *, allow_different_base: bool = False) -> None:
        """Add an adapter, or replace the one of that name.

        Raises:
            RouteError: the name is empty or not a text.
            ShapeError, BaseMismatchError: the adapter does not fit the base.
            AttachError: a site already has another adapter or another type of update, a bank cannot hold this
                type, or there are non-finite values.
        """
        if not name or not isinstance(name, str):
            raise RouteError(f"an adapter in a bank needs a name; got {name!r}")
        require_unattached(self.model, self._modules)
        check_base(self.model, adapter, allow_different_base=allow_different_base)
        updates = {canonical_path(path, self._sites): update for path, update in adapter.items()}
        classes = {path: self._banked_class(name, path, update) for path, update in updates.items()}
        fresh = {path: cls for path, cls in classes.items() if path not in self._modules}
        self._swap(fresh)
        slot = self._slots.get(name) or self._free_slot()
        for path in fresh:  # room for the adapters that do not use this site
            self._modules[path].write(max(slot, *self._slots.values(), 0), None)
        for path, module in self._modules.items():
            module.write(slot, updates.get(path))
        self._slots[name] = slot
        self._cards[name] = adapter.card

    def evict(self, name: str) -> None:
        """Remove an adapter from the bank.

        Raises:
            RouteError: the bank has no adapter of that name, or a row of the active route uses it.
        """
        slot = self.slot(name)
        if any(slot in slots for slots in (self._route.slots, *self._outer)):
            raise RouteError(
                f"adapter {name!r} is selected by the active route; leave the `with bank.rows(...)` block "
                "before evicting it"
            )
        del self._slots[name], self._cards[name]
        for module in self._modules.values():
            module.write(slot, None)

    def use(self, *names: str | None) -> None:
        """Set the route permanently: one name for the whole batch, or one per row; None means the base."""
        self._route.set([self.slot(name) for name in names])

    @contextmanager
    def rows(self, names: Sequence[str | None] | str | None) -> Iterator["Bank"]:
        """Context manager: each row of a batch uses the adapter with the given name; None means the base.

        One name fits a batch of any size. Beams and repeated samples repeat the route.
        """
        given = [names] if names is None or isinstance(names, str) else list(names)
        before = self._route.slots
        restore = self._route.set([self.slot(name) for name in given])
        self._outer.append(before)  # restored below, so its adapters must not be evicted before
        try:
            yield self
        finally:
            self._outer.pop()
            restore()

    def detach(self) -> None:
        """Remove all adapters; the model is restored to its base bit for bit."""
        restore_classes(self._modules)
        self._open()
        self._modules.clear()
        self._slots.clear()
        self._cards.clear()

    def __enter__(self) -> "Bank":
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _banked_class(self, name: str, path: str, update: Update) -> type[Banked]:
        """The layer class that can hold this update; it must match the updates already at this site."""
        cls = banked_class(name, path, variant_of(path, update, self._sites[path].kind))
        module, current = site_module(self.model, path), self._modules.get(path)
        if current is not None and not isinstance(current, cls):
            raise AttachError(
                f"adapter {name!r} has a {type(update).__name__} at {path}, where the bank holds another "
                "type of update; load it before the others, or put it into a separate bank"
            )
        if not cls.fits(update, module):
            raise AttachError(
                f"adapter {name!r} has non-finite values at {path} in {compute_dtype(module)}, the dtype of "
                "this base; do not serve it, or load the base in float32"
            )
        return cls

    def _swap(self, classes: Mapping[str, type[Banked]]) -> None:
        """Swap the classes of further modules for banked ones: all of them, or none after an error."""
        fresh: dict[str, Banked] = {}
        try:
            for path, cls in classes.items():
                fresh[path] = swap_class(site_module(self.model, path), path, cls, self._route)
                fresh[path].prepare()
            probe(fresh)
        except BaseException:
            restore_classes(fresh)
            raise
        if fresh:
            self._modules.update(fresh)
            self._open()
            self._undo = block_bypasses(self.model, self._modules)

    def _open(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def slot(self, name: str | None) -> int:
        """The slot of an adapter in the bank; for None it is 0, the base.

        Raises:
            RouteError: the bank has no adapter of that name.
        """
        if name is None:
            return 0
        if name not in self._slots:
            raise RouteError(
                f"the bank has no adapter {name!r}{did_you_mean(str(name), self._slots)}; "
                f"it has {', '.join(self._slots) or 'none'}"
            )
        return self._slots[name]

    def _free_slot(self) -> int:
        used = set(self._slots.values())
        return next(slot for slot in range(1, len(used) + 2) if slot not in used)


def bank(
    model: Any, adapters: Mapping[str, Adapter] | None = None, *, allow_different_base: bool = False
) -> Bank:
    """Put several adapters into one model; until a route is set, every row uses only the base.

    Args:
        model: an nn.Module or a Base.
        adapters: name → adapter; more can be loaded later.
        allow_different_base: accept adapters whose fingerprint shows another base.

    Raises:
        ShapeError, BaseMismatchError: an adapter does not fit the base.
        AttachError: a site already has an adapter attached.
    """
    keep_packing(unwrap(model))
    made = Bank(unwrap(model))
    given = dict(adapters or {})
    try:
        for name in sorted(given, key=lambda name: _is_plain(given[name])):
            adapter = given[name]
            made.load(name, adapter, allow_different_base=allow_different_base)
    except BaseException:
        made.detach()
        raise
    return made


def _is_plain(adapter: Any) -> bool:
    """Whether all updates are low-rank; layers for other updates hold these too, but not the reverse."""
    return isinstance(adapter, Adapter) and all(isinstance(u, LowRank) for u in adapter.values())


def require_uniform_route(model: Any) -> None:
    """Check that the active route gives all rows the same slot, for callers that reorder rows.

    Raises:
        RouteError: the rows have different slots.
    """
    route = find_route(model)
    if route is not None and route.uniform is None:
        raise RouteError(
            f"the active route assigns adapters to {len(route.slots)} rows, but here rows are reordered; "
            "pass the bank as adapters= (with rows=), or leave its rows() block first"
        )


def find_route(model: Any) -> Route | None:
    """The route that all adapted modules of a model share; None if no module is adapted."""
    return next((m._route for m in unwrap(model).modules() if isinstance(m, Adapted)), None)
