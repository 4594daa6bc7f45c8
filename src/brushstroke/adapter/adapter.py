"""Defines `Adapter`, an immutable mapping from sites to updates, with algebra over all sites.

Does not attach adapters to models (`layers` does) and does not read or write files (`formats` does).
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from brushstroke.adapter.card import Card
from brushstroke.adapter.fingerprint import Fingerprint
from brushstroke.errors import BaseMismatchError, ShapeError, did_you_mean
from brushstroke.lowrank.update import Update


class Adapter(Mapping[str, Update]):
    """An immutable mapping from site paths to updates.

    `a + b`, `a - b`, `0.5 * a` and `-a` are exact in factor form; a site that only one of the two adapters
    has keeps its update. Every operation returns a new adapter.

    Args:
        updates: site path → update; at least one.
        card: where the adapter comes from. Algebra keeps the fields that still hold for the result, such as
            the base and the chat template.
        copies: weights of the base that were stored with the adapter, by parameter name. They do not belong
            to the update: they are compared with the base's weights before the adapter is used on that base.

    >>> import torch
    >>> from brushstroke.lowrank import LowRank
    >>> a = Adapter({"fc": LowRank(torch.ones(3, 1), torch.ones(1, 2))})
    >>> (a + 0.5 * a)["fc"].dense()[0]
    tensor([1.5000, 1.5000])
    """

    def __init__(
        self,
        updates: Mapping[str, Update],
        card: Card | None = None,
        *,
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not updates:
            raise ShapeError("an adapter needs at least one site; got none")
        self._updates = dict(updates)
        self._card = card
        self._copies = dict(copies or {})

    def __getitem__(self, site: str) -> Update:
        try:
            return self._updates[site]
        except KeyError:
            raise KeyError(f"this adapter has no site {site!r}{did_you_mean(site, self._updates)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)

    def __repr__(self) -> str:
        base = f" of {self.card.base_name}" if self.card and self.card.base_name else ""
        copies = f", with copies of {', '.join(self.copies)}" if self.copies else ""
        return f"Adapter({len(self)} sites, rank {self.rank}, {self.parameters:,} parameters{base}{copies})"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def card(self) -> Card | None:
        """Where the adapter comes from, if known."""
        return self._card

    @property
    def copies(self) -> Mapping[str, Tensor]:
        """Weights of the base that were stored with the adapter: parameter name → values."""
        return MappingProxyType(self._copies)

    @property
    def rank(self) -> int:
        """The largest rank of any site; 0 where no update has a rank."""
        return max((getattr(update, "rank", 0) for update in self.values()), default=0)

    @property
    def parameters(self) -> int:
        """The number of values that the adapter holds; Σ r·(d + h) for low-rank updates."""
        return sum(update.parameters for update in self.values())

    @property
    def bytes(self) -> int:
        """The size of its tensors in bytes."""
        return sum(
            t.numel() * t.element_size() for update in self.values() for t in update.tensors().values()
        )

    def with_card(self, card: Card | None) -> "Adapter":
        """The same updates with another card."""
        return type(self)(self._updates, card, copies=self.copies)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Adapter":
        """The same adapter in another dtype or on another device."""
        updates = {site: update.to(dtype, device) for site, update in self.items()}
        return type(self)(updates, self.card, copies=self.copies)

    def norm(self) -> float:
        """√Σ‖ΔW‖_F² over all sites, in float64."""
        return sum(update.delta_norm() ** 2 for update in self.values()) ** 0.5

    def inner(self, other: "Adapter") -> float:
        """Σ⟨ΔW₁, ΔW₂⟩ over the sites that both adapters have, in float64."""
        return sum((update.inner(other[site]) for site, update in self.items() if site in other), 0.0)

    def truncate(self, rank: int) -> "Adapter":
        """An adapter with the best approximation of at most this rank at each site."""
        return self.derived({site: update.truncate(rank) for site, update in self.items()})

    def __add__(self, other: "Adapter") -> "Adapter":
        if not isinstance(other, Adapter):
            return NotImplemented
        mismatched = [
            f"{site}: {self[site].shape} and {other[site].shape}"
            for site in self
            if site in other and not self[site].fits(other[site].shape)
        ]
        if mismatched:
            raise ShapeError(
                "these adapters belong to bases of different shapes:\n  " + "\n  ".join(mismatched)
            )
        updates = dict(self._updates)
        for site, update in other.items():
            updates[site] = updates[site] + update if site in updates else update
        fingerprint, copies = self._shared_fingerprint(other), self._shared_copies(other)
        return type(self)(updates, self._derived_card(fingerprint), copies=copies)

    def __sub__(self, other: "Adapter") -> "Adapter":
        return self + (-other)

    def __neg__(self) -> "Adapter":
        return self * -1.0

    def __mul__(self, factor: float) -> "Adapter":
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return self.derived({site: update * factor for site, update in self.items()})

    __rmul__ = __mul__

    def _shared_fingerprint(self, other: "Adapter") -> Fingerprint | None:
        """The fingerprint of the base that both adapters belong to.

        Raises:
            BaseMismatchError: the adapters were trained on different bases.
        """
        known = [a.card.fingerprint for a in (self, other) if a.card and a.card.fingerprint]
        return known[0].joined(known[1]) if len(known) == 2 else (known or [None])[0]

    def _shared_copies(self, other: "Adapter") -> dict[str, Tensor]:
        """The base's weights that were stored with either adapter.

        Raises:
            BaseMismatchError: both adapters have a copy of one weight, and the copies differ.
        """
        for name in self.copies.keys() & other.copies.keys():
            if not torch.equal(self.copies[name], other.copies[name]):
                raise BaseMismatchError(
                    f"these adapters come with different copies of {name}: they were trained on different "
                    "bases, or trained that weight too"
                )
        return {**other.copies, **self.copies}

    def derived(self, updates: Mapping[str, Update]) -> "Adapter":
        """An adapter with other updates for the same base; its card keeps no record of the training."""
        return type(self)(updates, self._derived_card(), copies=self.copies)

    def _derived_card(self, fingerprint: Fingerprint | None = None) -> Card | None:
        if self.card is None and fingerprint is None:
            return None
        card = (self.card or Card()).with_changes(lora=None, target_modules=(), training={})
        return card.with_changes(fingerprint=fingerprint) if fingerprint else card
