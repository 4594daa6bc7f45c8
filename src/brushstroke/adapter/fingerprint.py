"""Samples of a base's weights, by which an adapter knows the base that it was trained on.

It compares samples; reading them from a live model or from files is the caller's part.
"""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.errors import AdapterFileError

SAMPLES = 256
QUANTISED_TOLERANCE = 0.15  # relative difference of the samples: int8 differs by about 1 %, 4-bit by 8 %
_STEP = 2_654_435_761  # Knuth's multiplicative hash: spreads the positions over rows and columns alike
_BF16_ULP = 2.0**-7  # the largest relative distance of two neighbouring bf16 numbers


class Verdict(Enum):
    """What the samples say of a base."""

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
    i, j = sample_positions(*W.shape)
    return W[i.to(W.device), j.to(W.device)].detach().to("cpu", torch.float32).to(torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """For each adapted site the shape of W (d×h) and up to 256 of its values, rounded to bf16.

    Args:
        shapes: path → (d, h).
        samples: path → the sampled values.
        quantised: whether the base was marked as quantised when the samples were taken.
    """

    shapes: Mapping[str, tuple[int, int]]
    samples: Mapping[str, Float[Tensor, " n"]]
    quantised: bool = False

    @classmethod
    def of(cls, weights: Mapping[str, Float[Tensor, "d h"]], quantised: bool = False) -> "Fingerprint":
        """Take the samples of these weights."""
        shapes = {path: (W.shape[0], W.shape[1]) for path, W in weights.items()}
        return cls(shapes, {path: sample(W) for path, W in weights.items()}, quantised)

    def judge(
        self,
        weights: Mapping[str, Float[Tensor, "d h"]],
        delta_at: Callable[[str, Tensor, Tensor], Tensor],
        quantised: bool = False,
    ) -> tuple[Verdict, float]:
        """Compare a base with these samples.

        Args:
            weights: path → W (d×h) of the base at hand, for at least one of the sampled paths.
            delta_at: (path, i, j) → the adapter's ΔW at those positions.
            quantised: whether the base at hand is marked as quantised.

        Returns:
            The verdict, and the relative difference ‖now − then‖ / ‖then‖ of all samples.
        """
        paths = [path for path in self.samples if path in weights]
        now = torch.cat([sample(weights[path]) for path in paths]).double()
        then = torch.cat([self.samples[path] for path in paths]).double()
        # A base kept in fp16 was rounded twice, which can move a value to the neighbouring bf16 number.
        twice_rounded = any(weights[path].dtype == torch.float16 for path in paths)
        slack = _BF16_ULP * then.abs() + 2.0**-14 if twice_rounded else torch.zeros_like(then)
        difference = float((now - then).norm() / then.norm().clamp_min(1e-30))
        if bool(((now - then).abs() <= slack).all()):
            return Verdict.SAME, difference
        delta = torch.cat(
            [delta_at(path, *sample_positions(*self.shapes[path])).cpu().double() for path in paths]
        )
        merged = then + delta
        rounding = _BF16_ULP * (then.abs() + merged.abs()) + 2.0**-14 * float(then.abs().mean())
        if bool(((now - merged).abs() <= rounding).all()) and (now - merged).norm() < (now - then).norm():
            return Verdict.MERGED, difference
        if (quantised or self.quantised) and difference <= QUANTISED_TOLERANCE:
            return Verdict.QUANTISED, difference
        return Verdict.FOREIGN, difference

    def as_dict(self) -> dict[str, Any]:
        """JSON types; the samples are bf16 bit patterns, little endian, in base64."""
        return {
            "quantised": self.quantised,
            "sites": {
                path: {
                    "shape": list(self.shapes[path]),
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
            AdapterFileError: the stored form is damaged.
        """
        shapes: dict[str, tuple[int, int]] = {}
        samples: dict[str, Tensor] = {}
        try:
            for path, entry in stored["sites"].items():
                d, h = entry["shape"]
                raw = bytearray(base64.b64decode(entry["bf16"], validate=True))
                values = torch.frombuffer(raw, dtype=torch.int16).view(torch.bfloat16)
                if values.numel() != min(SAMPLES, d * h):
                    raise ValueError(f"{path} has {values.numel()} samples")
                shapes[path], samples[path] = (d, h), values
            return cls(shapes, samples, bool(stored["quantised"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterFileError(
                f"the fingerprint of the base is damaged ({error}); delete the field to go without"
            ) from error
