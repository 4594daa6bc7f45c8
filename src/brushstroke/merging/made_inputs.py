"""Generates inputs for a model's forward from its config: text, images and sound, without a processor.

It does not check whether the model accepts them; the caller tries them.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from brushstroke.base import context_length, embedding_rows, hidden_size, model_dtype, vocabulary_size

Inputs = dict[str, Tensor]

TOKENS = 32
IMAGES = 5  # if an input is a series of images
IMAGE_SIZE = 64  # pixels, if the config names no size
SOUND_FRAMES = 64  # of a spectrogram, if the config names no length
SAMPLES = 40  # multiplied by the strides of the model's convolutions
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_BINS = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")


def candidate_inputs(model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    """Inputs to try on a model, those that use most of it first; the numbers are the same every time.

    First images and sound with a text that has placeholders for them, then each alone, then only text. Making
    inputs may fail, because the model's code counts the placeholders.
    """
    made = _Maker(model)
    texts, media, decoder = made.texts(), [*made.images(), *made.sound()], made.decoder()
    for medium, text in itertools.product(media, texts):
        yield partial(made.together, medium, text, decoder)
    for one in (*media, *texts):
        yield partial(dict, **one, **decoder)


class _Maker:
    """Makes the arguments of a model's forward."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._takes = inspect.signature(model.forward).parameters
        config: Any = getattr(model, "config", None)
        parts = vars(config).values() if config is not None else ()
        self._configs = [*(part for part in parts if hasattr(part, "to_dict")), config]  # its parts, then it
        self._random = torch.Generator().manual_seed(0)

    def texts(self) -> list[Inputs]:
        """A row of tokens, and the same as the one choice of a multiple-choice model."""
        if "input_ids" not in self._takes:
            return []
        row = self._tokens()
        return [self._with_mask(row), self._with_mask(row[None])]

    def decoder(self) -> Inputs:
        """The tokens that the decoder of an encoder-decoder has generated so far."""
        return {"decoder_input_ids": self._tokens()} if "decoder_input_ids" in self._takes else {}

    def images(self) -> list[Inputs]:
        """An image as pixels, the same among several or as frames, or in patches with their grid."""
        if "pixel_values" not in self._takes:
            return []
        channels = self._number(_CHANNELS, 3)
        if "image_grid_thw" in self._takes:
            patch, merge = self._number(("patch_size",), 1), self._number(("spatial_merge_size",), 1)
            width = channels * self._number(("temporal_patch_size",), 1) * patch**2
            grid = torch.tensor([[1, 2 * merge, 2 * merge]])
            return [{"pixel_values": self._noise(int(grid.prod()), width), "image_grid_thw": grid}]
        height, width = self._sides()
        frames = self._number(("num_frames",), IMAGES)
        shapes = [(1, channels, height, width), (1, frames, channels, height, width)]
        made = [{"pixel_values": self._noise(*shape)} for shape in shapes]
        if "image_sizes" in self._takes:
            made += [{**one, "image_sizes": torch.tensor([[height, width]])} for one in made]
        return made

    def sound(self) -> list[Inputs]:
        """A spectrogram, with the bins before or after the frames, or a wave."""
        bins = self._number(_BINS, 0)
        halved = self._number(("max_source_positions",), 0)  # as Whisper does
        frames = 2 * halved or self._number(("max_length",), SOUND_FRAMES)
        made: list[Inputs] = []
        if "input_features" in self._takes and bins:
            made += [{"input_features": self._noise(1, *shape)} for shape in ((bins, frames), (frames, bins))]
            if "feature_attention_mask" in self._takes:
                made = [{**one, "feature_attention_mask": torch.ones(1, frames).long()} for one in made]
        if "input_values" in self._takes:
            made += [{"input_values": self._noise(1, frames, bins)}] if bins else []
            strides = self._value("conv_stride") or (320,)
            made.append({"input_values": self._noise(1, SAMPLES * math.prod(strides))})
        return made

    def together(self, medium: Inputs, text: Inputs, decoder: Inputs) -> Inputs:
        """A medium with a text that has one placeholder token for each feature that the model computes."""
        ids = text["input_ids"]
        for kind in ("image", "audio"):
            token = self._number((f"{kind}_token_id", f"{kind}_token_index"), -1)
            if token >= 0:
                place = torch.full((*ids.shape[:-1], self._features(kind, medium)), token)
                text = self._with_mask(torch.cat([ids[..., :1], place, ids[..., 1:]], -1), token)
                break
        return {**medium, **text, **decoder}

    def _features(self, kind: str, medium: Inputs) -> int:
        """The number of placeholder tokens of a medium: one, or as many as the model makes features."""
        make = getattr(self._model, f"get_{kind}_features", None)
        if not callable(make):
            return 1
        takes = inspect.signature(make).parameters
        device = next(self._model.parameters()).device
        with torch.no_grad():
            found = make(**{name: value.to(device) for name, value in medium.items() if name in takes})
        return _numbers_in(getattr(found, "pooler_output", found)) // (hidden_size(self._model) or 1)

    def _with_mask(self, ids: Tensor, place: int = -1) -> Inputs:
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made["mm_token_type_ids"] = (ids == place).long()
        return {name: value for name, value in made.items() if name in self._takes}

    def _tokens(self) -> Tensor:
        """Random tokens without special ones; the end token is last, because some heads read it."""
        count = min(TOKENS, context_length(self._model) or TOKENS)
        vocabulary = min(n for n in (vocabulary_size(self._model), embedding_rows(self._model), 2**16) if n)
        special = {token for part in self._configs for token in _special_tokens(part)}
        free = [token for token in range(vocabulary) if token not in special] or [0]
        ids = torch.tensor(free)[torch.randint(len(free), (1, count), generator=self._random)]
        end = self._number(("eos_token_id",), -1)
        if 0 <= end < vocabulary:
            ids[0, -1] = end
        return ids

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random).to(model_dtype(self._model))

    def _number(self, names: Sequence[str], default: int) -> int:
        """The first whole number that a config has under one of the names."""
        values = (getattr(part, name, None) for part in self._configs for name in names)
        return next((value for value in values if isinstance(value, int)), default)

    def _value(self, name: str) -> Any:
        """The first value that a config has under a name."""
        return next((value for part in self._configs if (value := getattr(part, name, None))), None)

    def _sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self._value("image_size") or IMAGE_SIZE
        if isinstance(size, Mapping):
            return size["height"], size["width"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])


def _special_tokens(config: Any) -> Iterator[int]:
    for name, value in vars(config).items() if config is not None else ():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            yield from value if isinstance(value, list | tuple) else (value,)


def _numbers_in(features: Any) -> int:
    """How many numbers there are in a tensor or in several."""
    return features.numel() if isinstance(features, Tensor) else sum(map(_numbers_in, features))
