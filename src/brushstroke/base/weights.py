"""Maps a site to W (d×h), read lazily from a folder of safetensors files.

It changes no weight and keeps none in memory: each access reads one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from brushstroke.base.architecture import build_model
from brushstroke.base.load import Base, load_base, quiet_transformers
from brushstroke.base.surplus import require_whole
from brushstroke.errors import BaseLoadError, BrushstrokeError
from brushstroke.files import read_json
from brushstroke.hub import hub_or_cache
from brushstroke.sites import Site, find_sites, require_kind
from brushstroke.sites.weights import known_site

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERNS = ["config.json", "model*.safetensors", _INDEX, "*.py"]  # the files that `FolderWeights` reads


class FolderWeights(Mapping[str, Float[Tensor, "d h"]]):
    """The weights of a model folder with one safetensors file or several shards; reads one tensor at a time.

    The model is built from its config on the meta device, so the path and kind of every site are known. File
    keys may have the base model's prefix or not, and the files may store tied weights once.

    Args:
        folder: the model folder.
        trust_remote_code: run the model's own code, if it has any.

    Raises:
        BaseLoadError: no config, no safetensors files, a missing shard, or a model that needs remote code.
    """

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self._shards = _shards(self.folder)
        self.model = model = _skeleton(self.folder, trust_remote_code)  # parameters on the meta device
        self._sites = {site.path: site for site in find_sites(model, trial=False)}
        self._keys = _locate_keys(model, [f"{path}.weight" for path in self._sites], self._shards)

    def __getitem__(self, site: str) -> Float[Tensor, "d h"]:
        file, key = self.key(site)
        module: Any = self.model.get_submodule(site)
        stored = tuple(module.weight.shape)
        try:
            with safe_open(self.folder / file, framework="pt") as shard:
                header = shard.get_slice(key)
                found, dtype = tuple(header.get_shape()), header.get_dtype()
                if found != stored or dtype not in _FLOAT_DTYPES:
                    raise BaseLoadError(
                        f"{key} in {file} should be a float tensor of shape {stored}; it is {dtype} "
                        f"{found}: load the whole model instead"
                    )
                return require_kind(module).to_dxh(shard.get_tensor(key))
        except (SafetensorError, OSError) as error:
            if isinstance(error, BaseLoadError):
                raise
            raise BaseLoadError(
                f"cannot read {key} from {self.folder / file} ({error}); fetch the file again"
            ) from error

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def parameter(self, name: str) -> Tensor | None:
        """Any parameter as stored in the files, a tied one under its twin's name; None if it is not there."""
        key = _locate_keys(self.model, [name], self._shards).get(name)
        if key is None:
            return None
        with safe_open(self.folder / self._shards[key], framework="pt") as shard:
            return shard.get_tensor(key)

    def sites(self) -> tuple[Site, ...]:
        """Every adaptable weight of the model, in model order."""
        return tuple(self._sites.values())

    def shards(self) -> dict[str, tuple[str, ...]]:
        """Each file of the folder with its tensor keys, in file order."""
        files: dict[str, list[str]] = {}
        for key, file in self._shards.items():
            files.setdefault(file, []).append(key)
        return {file: tuple(keys) for file, keys in sorted(files.items())}

    def check_complete(self) -> None:
        """Check that the files contain the weights of the model and no others; reads only the headers.

        If weights are missing and the files have unknown tensors, these may be the same weights under other
        names. This cannot be decided without loading the model, so the check then accepts the files.

        Raises:
            BaseLoadError: weights are missing, have another shape, or do not belong to this class.
        """
        parameters = dict(self.model.named_parameters())
        prefix = getattr(self.model, "base_model_prefix", "")
        own = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        own |= {name for name, _ in self.model.named_buffers()}
        stored: dict[str, tuple[int, ...]] = {}  # the index may omit tensors that a file has
        for file in self.shards():
            with safe_open(self.folder / file, framework="pt") as shard:
                stored |= {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
        located = _locate_keys(self.model, list(parameters), stored)
        missing = self._not_declared("missing", [name for name in parameters if name not in located])
        unexpected = stored.keys() - {form for name in own for form in _forms(name, prefix)}
        if missing and unexpected:
            return
        require_whole(
            str(self.folder),
            self.model,
            missing=missing,
            mismatched=[
                (name, stored[key], parameters[name].shape)
                for name, key in located.items()
                if stored[key] != tuple(parameters[name].shape)
            ],
            unexpected=self._not_declared("unexpected", unexpected),
        )

    def _not_declared(self, what: str, keys: Iterable[str]) -> list[str]:
        """The keys without those that the class itself declares as ignorable when missing or unexpected."""
        patterns = getattr(self.model, f"_keys_to_ignore_on_load_{what}", None) or ()
        return [key for key in keys if not any(re.search(pattern, key) for pattern in patterns)]

    def key(self, site: str) -> tuple[str, str]:
        """The file and the tensor key of a site's weight; of its twin if the weight is tied.

        Raises:
            BaseLoadError: no key of the files matches this site.
        """
        known_site(self._sites, site)
        key = self._keys.get(f"{site}.weight")
        if key is None:
            raise BaseLoadError(
                f"the files in {self.folder} contain no tensor for {site}: transformers renames or fuses it "
                f"during loading; load the whole model instead (load_base) and use that"
            )
        return self._shards[key], key

    def tensor(self, name: str) -> tuple[str, str, bool]:
        """(file, key, whether the key is the parameter's own name and not that of its twin) of a parameter.

        Raises:
            BaseLoadError: no key of the files matches the parameter.
        """
        key = _locate_keys(self.model, [name], self._shards).get(name)
        if key is None:
            raise BaseLoadError(
                f"the files in {self.folder} contain no tensor {name}; fetch the folder again"
            )
        return self._shards[key], key, key in _forms(name, getattr(self.model, "base_model_prefix", ""))

    def read(self, file: str, key: str) -> Tensor:
        """A tensor of a file as it is stored."""
        with safe_open(self.folder / file, framework="pt") as shard:
            return shard.get_tensor(key)


def open_base(name: str | Path, *, trust_remote_code: bool = False) -> FolderWeights | Base:
    """The weights of a base by name: read from its files if these are plain safetensors, otherwise loaded.

    Args:
        name: a model folder, a hub id (downloaded if it is not in the cache), or a `.gguf` file.
        trust_remote_code: run the model's own code, if it has any.

    Raises:
        BaseLoadError: nothing of that name can be read.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = _snapshot(str(name)) or folder
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        config = folder / "config.json"
        plain = config.is_file() and "quantization_config" not in config.read_text("utf-8")
        if plain and ((folder / _INDEX).is_file() or (folder / _SINGLE).is_file()):
            weights = FolderWeights(folder, trust_remote_code=trust_remote_code)
            if len(weights._keys) == len(weights):
                return weights
    return load_base(str(name), dtype="float32", device="cpu", trust_remote_code=trust_remote_code)


def _snapshot(name: str) -> Path | None:
    """The folder with a hub id's config and safetensors; None on any error (`load_base` reports it)."""
    from huggingface_hub import snapshot_download

    try:
        with quiet_transformers(), hub_or_cache():
            return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception:
        return None


def _shards(folder: Path) -> dict[str, str]:
    """Tensor key → file name."""
    index, single = folder / _INDEX, folder / _SINGLE
    try:
        if index.is_file():
            shards: dict[str, str] = read_json(index)["weight_map"]
            files = sorted(set(shards.values()))
            present = {path.name for path in folder.iterdir() if path.is_file()}  # not below or above it
            missing = [file for file in files if file not in present]
            if missing:
                raise BaseLoadError(
                    f"{folder} lacks {', '.join(missing)}, which {_INDEX} names; fetch the folder again"
                )
            for file in files:
                _check_shard(folder / file, {key for key, name in shards.items() if name == file})
            return shards
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseLoadError(f"the weights in {folder} are damaged ({error}); fetch them again") from error
    raise BaseLoadError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}; only safetensors can be read tensor by tensor: "
        f"load the whole model with load_base instead"
    )


def _check_shard(file: Path, expected: set[str]) -> None:
    """Check that a file is readable and has the tensors that the index lists for it; reads only the header.

    Raises:
        BaseLoadError: the file is damaged or lacks a tensor.
    """
    try:
        with safe_open(file, framework="pt") as shard:
            lost = sorted(expected - set(shard.keys()))
    except (SafetensorError, OSError) as error:
        raise BaseLoadError(f"{file} is damaged ({error}); fetch the file again") from error
    if lost:
        raise BaseLoadError(f"{file} lacks {lost[0]!r}, which {_INDEX} lists for it; fetch the folder again")


def _skeleton(folder: Path, trust_remote_code: bool) -> nn.Module:
    """The model of a folder's config, on the meta device: shapes and names without memory."""
    where = {"pretrained_model_name_or_path": str(folder), "trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            return build_model(where)
    except BrushstrokeError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise BaseLoadError(
            f"cannot build the model of {folder} from its config ({type(error).__name__}: {detail}); "
            f"fetch it again, or use a version of transformers that supports it (in Python: load the "
            "model yourself and pass it instead)"
        ) from error


def _locate_keys(model: nn.Module, names: list[str], shards: Mapping[str, object]) -> dict[str, str]:
    """Maps each parameter name to its key in the files; omits those that are not found."""
    prefix = getattr(model, "base_model_prefix", "")
    twins: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    located = {}
    for name in names:
        tied = [twin for twin in twins[id(parameters[name])] if twin != name] if name in parameters else []
        candidates = [form for twin in (name, *tied) for form in _forms(twin, prefix)]
        key = next((form for form in candidates if form in shards), None)
        if key is not None:
            located[name] = key
    return located


def _forms(name: str, prefix: str) -> tuple[str, str, str]:
    """The names that a parameter may have in files: unchanged, without and with the base model's prefix."""
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"
