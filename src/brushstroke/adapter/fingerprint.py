"""Samples of a base's weights, which identify the base that an adapter was trained on.

Compares samples only; does not read weights from a live model or from files.
"""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.errors import AdapterFileError, BaseMismatchError

SAMPLES = 256
QUANTISED_TOLERANCE = 0.15  # relative difference of the samples: int8 differs by about 1 %, 4-bit by 8 %
_STEP = 2_654_435_761  # Knuth's multiplicative hash: spreads the positions over both rows and columns
_BF16_ULP = 2.0**-7  # the largest relative distance between two neighbouring bf16 numbers


class Verdict(Enum):
    """The result of comparing a base with the samples."""

    SAME = "the same base"
    MERGED = "this adapter is merged into the base already"
    QUANTISED = "the same base, quantised"
    FOREIGN = "another base"


def sample_positions(d: int, h: int) -> tuple[Tensor, Tensor]:
    """The fixed row and column indices (i, j) at which a weight W (d×h) is sampled."""
    numel = d * h
    flat = (
        torch.arange(min(SAMPLES, numel))
        if numel <= SAMPLES
        else torch.arange(1, SAMPLES + 1) * _STEP % numel
    )
    return flat // h, flat % h


def sample(W: Float[Tensor, "d h"]) -> Float[Tensor, " n"]:
    """The values of W at the fixed positions, rounded to bf16, on the CPU."""
    return _values(W).to(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """For each adapted site the shape of W (d×h) and up to 256 of its values, rounded to bf16.

    Args:
        shapes: path → (d, h).
        samples: path → the sampled values.
        quantised: whether the base was marked as quantised when the samples were taken.
        half: the paths whose weight was stored in fp16, which rounds differently from bf16.
    """

    shapes: Mapping[str, tuple[int, int]]
    samples: Mapping[str, Float[Tensor, " n"]]
    quantised: bool = False
    half: frozenset[str] = frozenset()

    @classmethod
    def of(cls, weights: Mapping[str, Float[Tensor, "d h"]], quantised: bool = False) -> "Fingerprint":
        """Take the samples of these weights."""
        shapes = {path: (W.shape[0], W.shape[1]) for path, W in weights.items()}
        half = frozenset(path for path, W in weights.items() if W.dtype == torch.float16)
        return cls(shapes, {path: sample(W) for path, W in weights.items()}, quantised, half)

    def joined(self, other: "Fingerprint") -> "Fingerprint":
        """The samples of both fingerprints, which must belong to one base.

        Raises:
            BaseMismatchError: the samples of a site differ by more than quantisation can explain.
        """
        for path in self.samples.keys() & other.samples.keys():
            first, second = (f.samples[path].double() for f in (self, other))
            same_shape = self.shapes[path] == other.shapes[path]
            if not same_shape or (first - second).norm() > QUANTISED_TOLERANCE * first.norm():
                raise BaseMismatchError(
                    f"these adapters were trained on different bases: the weights at {path} differ; combine "
                    "adapters of one base, or drop a card with adapter.with_card(None) to combine them anyway"
                )
        return Fingerprint(
            {**other.shapes, **self.shapes},
            {**other.samples, **self.samples},
            self.quantised or other.quantised,
            self.half | (other.half - self.samples.keys()),
        )

    def compare(
        self,
        weights: Mapping[str, Float[Tensor, "d h"]],
        delta_at: Callable[[str, Tensor, Tensor], Tensor],
        quantised: bool = False,
    ) -> tuple[Verdict, float]:
        """Compare a base with these samples.

        Args:
            weights: path → W (d×h) of the base to compare, for at least one of the sampled paths.
            delta_at: (path, i, j) → the adapter's ΔW at those positions.
            quantised: whether that base is marked as quantised.

        Returns:
            The verdict, and the relative difference ‖current − stored‖ / ‖stored‖ over all samples.
        """
        current: list[Tensor] = []
        exact: list[Tensor] = []
        stored: list[Tensor] = []
        paths = [path for path in self.samples if path in weights]
        same = True
        for path in paths:
            W = weights[path]  # read once: weights may come from files
            if tuple(W.shape) != tuple(self.shapes[path]):
                return Verdict.FOREIGN, float("inf")
            same = same and self._same(path, W)
            current.append(sample(W).double())
            exact.append(_values(W).double())
            stored.append(self.samples[path].double())
        now, then = torch.cat(current), torch.cat(stored)
        difference = float((now - then).norm() / then.norm().clamp_min(1e-30))
        if same:
            return Verdict.SAME, difference
        deltas = [delta_at(path, *sample_positions(*self.shapes[path])) for path in paths]
        delta = torch.cat([values.cpu().double() for values in deltas])
        merged, found = then + delta, torch.cat(exact)
        # A merge rounds to either neighbour of the sum: at most one step away, and on average not at all.
        rounding = _BF16_ULP * (then.abs() + merged.abs()) + 2.0**-14 * float(then.abs().mean())
        near = bool(((found - merged).abs() <= rounding).all())
        if near and (found - merged).norm() < (found - then).norm():
            return Verdict.MERGED, difference
        if (quantised or self.quantised) and difference <= QUANTISED_TOLERANCE:
            merged_in = _contains_delta(now - then, delta)
            return (Verdict.MERGED if merged_in else Verdict.QUANTISED), difference
        return Verdict.FOREIGN, difference

    def _same(self, path: str, W: Float[Tensor, "d h"]) -> bool:
        """Whether W and the sampled weight can be the same weight, each rounded to its stored dtype."""
        then, now = self.samples[path], _values(W)
        if (path in self.half) == (W.dtype == torch.float16):
            return torch.equal(sample(W), then)
        if path in self.half and W.dtype != torch.bfloat16:
            return torch.equal(now.to(torch.float16).to(torch.float32).to(torch.bfloat16), then)
        # Rounded to fp16 and to bf16: a value midway between two bf16 numbers may round to either of them.
        power = torch.exp2(torch.frexp(then.double()).exponent.double())
        of_bf16, of_fp16 = 2.0**-9 * power, (2.0**-12 * power).clamp_min(2.0**-25)
        slack = of_bf16 + of_fp16 + (of_bf16 if W.dtype == torch.bfloat16 else 0)
        return bool(((now.double() - then.double()).abs() <= slack).all())

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON types; the samples are bf16 bit patterns, little endian, in base64."""
        return {
            "quantised": self.quantised,
            "sites": {
                path: {
                    "shape": list(self.shapes[path]),
                    "half": path in self.half,
                    "bf16": base64.b64encode(
                        values.view(torch.int16).numpy().astype("<i2").tobytes()
                    ).decode(),
                }
                for path, values in self.samples.items()
            },
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Fingerprint":
        """The inverse of `as_dict`.

        Raises:
            AdapterFileError: the stored data is damaged.
        """
        shapes: dict[str, tuple[int, int]] = {}
        samples: dict[str, Tensor] = {}
        half: set[str] = set()
        try:
            for path, entry in stored["sites"].items():
                d, h = entry["shape"]
                raw = bytearray(base64.b64decode(entry["bf16"], validate=True))
                values = torch.frombuffer(raw, dtype=torch.int16).view(torch.bfloat16)
                if values.numel() != min(SAMPLES, d * h):
                    raise ValueError(f"{path} has {values.numel()} samples")
                shapes[path], samples[path] = (d, h), values
                if entry.get("half", False):
                    half.add(path)
            return cls(shapes, samples, bool(stored["quantised"]), frozenset(half))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterFileError(
                f"the fingerprint in the adapter's card is damaged ({error}); delete the field to use the "
                "adapter without a check of its base"
            ) from error


def _values(W: Float[Tensor, "d h"]) -> Float[Tensor, " n"]:
    i, j = sample_positions(*W.shape)
    return W[i.to(W.device), j.to(W.device)].detach().cpu()


def _contains_delta(change: Float[Tensor, " n"], delta: Float[Tensor, " n"]) -> bool:
    """Whether a change is ΔW plus noise, not noise alone; true only if the noise is small next to ΔW."""
    size = float(delta.square().sum())
    if not size:
        return False
    share = float((change * delta).sum()) / size
    noise = float((change - share * delta).square().mean().sqrt()) / size**0.5
    return share > 0.5 and noise < 0.1
