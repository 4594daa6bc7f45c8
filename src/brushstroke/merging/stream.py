"""Merges a folder of safetensors files into another one, without loading the model.

It does not read or write the bytes of the files; `shards` does.
"""

import copy
import ctypes
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.base import FolderWeights
from brushstroke.merging.in_memory import MergeReport, SiteDrift, check_forward, merge_weight
from brushstroke.merging.rounding import Rounding
from brushstroke.merging.shards import DTYPE_NAMES, Edit, update_index, write_shard
from brushstroke.sites import KINDS, Site

_INDEX = "model.safetensors.index.json"


def merge_files(weights: FolderWeights, adapter: Adapter, target: Path, rounding: Rounding) -> MergeReport:
    """Write the merged files of a base's weights to another folder; the caller has checked the base.

    The other files of the base must already be copied (see `side_files`).

    A weight that is tied to another module gets a separate tensor, and the config says so.

    Raises:
        MergeError: the update would be lost in the rounding.
        BaseLoadError: the files are damaged.
    """
    _give_back_freed_memory()
    merging = _Merging(weights, adapter, rounding)
    for file in weights.shards():
        source = weights.folder / file
        if file in merging.edits:
            write_shard(source, target / file, merging.edits[file])
        else:
            shutil.copyfile(source, target / file)
    if (weights.folder / _INDEX).is_file():
        update_index(weights.folder / _INDEX, target / _INDEX, merging.added)
    if merging.untied:
        _untie_file(target / "config.json", type(weights.model.config))
    return MergeReport({path: merging.drifts[path] for path in adapter}, tuple(merging.untied))


class _Merging:
    """Plans the edits of each file, and collects the drifts and the untied weights."""

    def __init__(self, weights: FolderWeights, adapter: Adapter, rounding: Rounding) -> None:
        self._weights, self._adapter, self._rounding = weights, adapter, rounding
        self.edits: dict[str, list[Edit]] = {}
        self.added: dict[str, tuple[str, int, int]] = {}
        self.untied: list[tuple[str, str]] = []
        self.drifts: dict[str, SiteDrift] = {}
        sites = {path: site for site in weights.sites() for path in site.paths}
        for path in adapter:
            self._plan(path, sites[path])
        if self.untied:
            self._part_other_ties()

    def _plan(self, path: str, site: Site) -> None:
        file, key = self._weights.key(site.path)
        own = f"{site.path}.weight"
        added = False
        if site.tied_to:
            self.untied.append((path, site.tied_to))
            added = not key.endswith(own)
        dtype = DTYPE_NAMES[self._weights[site.path].dtype]
        edit = Edit(
            own if added else key,
            lambda: self._merged(path, site),
            added,
            dtype,
            self._stored_shape(site),
        )
        self.edits.setdefault(file, []).append(edit)
        if added:
            width = self._weights[site.path].dtype.itemsize
            self.added[own] = (file, width * site.d * site.h, site.d * site.h)

    def _part_other_ties(self) -> None:
        """Give all other tied weights separate tensors, because the config unties all of them."""
        ties: dict[str, str] = getattr(self._weights.model, "all_tied_weights_keys", {})
        edited = {edit.key for edits in self.edits.values() for edit in edits}
        for name in dict.fromkeys((*ties, *ties.values())):
            file, key, own = self._weights.tensor(name)
            if not own and name not in edited:
                self._add(file, name, partial(self._weights.read, file, key))

    def _add(self, file: str, name: str, make: Callable[[], Tensor]) -> None:
        tensor = make()
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        self.edits.setdefault(file, []).append(Edit(name, make, True, dtype, shape))
        self.added[name] = (file, tensor.nbytes, tensor.numel())

    def _merged(self, path: str, site: Site) -> Tensor:
        with torch.no_grad():
            W = self._weights[site.path]
            module = self._weights.model.get_submodule(site.path)
            check_forward(module, W, site.path, self._weights.parameter)
            name = f"{site.path}.weight"  # not the key in the file, which may lack the model's prefix
            M, self.drifts[path] = merge_weight(W, self._adapter[path], path, self._rounding, name)
        return KINDS[site.kind].from_dxh(M, self._stored_shape(site))

    def _stored_shape(self, site: Site) -> tuple[int, ...]:
        return tuple(self._weights.model.get_submodule(site.path).weight.shape)  # type: ignore[union-attr]


def _untie_file(path: Path, kind: Any) -> None:
    """Set tie_word_embeddings to false in the config; otherwise loading would tie the weights again."""
    config = json.loads(path.read_text("utf-8"))
    untied = {**config, "tie_word_embeddings": False}
    if text := config.get("text_config"):
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    untied |= _consequences(kind, config, untied)
    path.write_text(json.dumps(untied, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _consequences(kind: Any, config: dict[str, Any], untied: dict[str, Any]) -> dict[str, Any]:
    """What a class of configs concludes from the tie (T5 scales its outputs), as it was with the tie."""
    if getattr(kind, "model_type", None) != config.get("model_type"):  # a part of the whole config
        return {}
    before, after = (kind.from_dict(copy.deepcopy(stored)).to_dict() for stored in (config, untied))
    changed = {"tie_word_embeddings", "text_config"}
    return {name: value for name, value in before.items() if name not in changed and after.get(name) != value}


def _give_back_freed_memory() -> None:
    """Make glibc map each large tensor separately, so that freeing it lowers the process's memory at once."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, in bytes; others lack it
