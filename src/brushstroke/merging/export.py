"""Merges a base and an adapter into a model folder that plain transformers loads.

It does not compute the sums: `in_memory` and `stream` do.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from brushstroke.adapter import Adapter
from brushstroke.base import Base, FolderWeights, load_base, quiet_transformers
from brushstroke.base.device import DTYPES
from brushstroke.errors import BaseLoadError, ConfigError, MergeError, OutputError
from brushstroke.files import read_json
from brushstroke.formats.peft import CONFIG as ADAPTER_CONFIG
from brushstroke.merging.in_memory import MergeReport, SiteDrift, merge, require_adapter
from brushstroke.merging.rounding import Mode, Rounding
from brushstroke.merging.side_files import (
    CONFIG,
    GENERATION,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    copy_beside,
    loaded_files,
    save_stop_tokens,
    save_template,
)
from brushstroke.merging.stored import stored_dtypes, widest_dtype
from brushstroke.merging.stream import merge_files
from brushstroke.merging.verify import CheckResult, check_merged
from brushstroke.outputs import OwnFiles, clear_leftovers, refuse_existing, replace_folder
from brushstroke.sites import check_base

MODEL_KEYS = {"model_type", "architectures"}  # keys that identify the config of a model
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportReport:
    """The result of a merge to a folder.

    Args:
        out: the folder.
        merged: the drift of each site, and the ties that had to be undone.
        logit_drift: ‖merged − adapted‖ / ‖adapted‖ on generated inputs, of the float output that differs
            most; None if not measured.
        effect: the share of the adapter's change of these outputs that the merged model has, at the output
            that keeps least; None if not measured. `survived` is the share of ΔW, not of the outputs.
        logit_drift_skipped: what was not measured, and why: the whole check, or sites that no input reached.
        compared: the names of these outputs.
        rounding: how weights in half precision were rounded, and the seed.
        chat_template_saved: whether the adapter's chat template replaced another one, or none.
        stop_tokens_saved: the tokens that end the adapter's answers and were added to the base's stop tokens.
        left_out: files of the base's folder that were not copied: weights in a form that was not merged,
            hidden files, links to folders.
        streamed: whether the files were merged one tensor at a time, without loading the model.
        seconds: wall time.
    """

    out: Path
    merged: MergeReport
    logit_drift: float | None
    effect: float | None
    logit_drift_skipped: str | None
    compared: tuple[str, ...]
    rounding: Rounding
    chat_template_saved: bool
    stop_tokens_saved: tuple[str, ...]
    left_out: tuple[str, ...]
    streamed: bool
    seconds: float

    @property
    def sites(self) -> Mapping[str, SiteDrift]:
        """Site path → drift."""
        return self.merged.sites

    @property
    def survived(self) -> float:
        """The smallest share of an update that survived the rounding at any site."""
        return self.merged.survived

    @property
    def output(self) -> float:
        """The largest relative output error of any site."""
        return self.merged.output

    @property
    def untied(self) -> tuple[tuple[str, str], ...]:
        """(site, the module that it shared its weight with before)."""
        return self.merged.untied

    def as_dict(self) -> dict[str, Any]:
        """JSON types; the sites in numbers only."""
        return {
            "out": str(self.out),
            "sites": len(self.sites),
            "survived": self.survived,
            "output_drift": self.output,
            "logit_drift": self.logit_drift,
            "effect": self.effect,
            "logit_drift_skipped": self.logit_drift_skipped,
            "compared": list(self.compared),
            "rounding": self.rounding.mode,
            "rounding_seed": self.rounding.seed,
            "stochastic_sites": self.merged.stochastic,
            "untied": [list(pair) for pair in self.untied],
            "chat_template_saved": self.chat_template_saved,
            "stop_tokens_saved": list(self.stop_tokens_saved),
            "left_out": list(self.left_out),
            "streamed": self.streamed,
            "seconds": self.seconds,
        }


def merge_folder(
    base: Base | str | Path,
    adapter: Adapter,
    out: str | Path,
    *,
    overwrite: bool = False,
    allow_different_base: bool = False,
    dtype: str = "auto",
    rounding: Mode = "auto",
    rounding_seed: int = 0,
    verify: bool | None = None,
    max_shard_size: int | str | None = None,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Merge an adapter into a base and write the result as a folder; the base does not change.

    A folder of safetensors is merged file by file, one tensor in memory at a time: file names, tensor names,
    metadata and dtypes stay, and every other file is copied. Any other base is loaded and merged in memory.
    The folder appears when it is complete; the numbers are summed in fp32 and rounded once.

    Args:
        base: a model folder, a `.gguf` file, a hub id, or a loaded Base.
        adapter: the adapter.
        out: the folder to write.
        overwrite: replace the files of an earlier merge in a model folder; files with other names stay.
        allow_different_base: accept an adapter whose fingerprint shows another base.
        dtype: of the merged weights; "auto" keeps the dtype in which each weight is stored, or, if the base
            must be loaded, uses one that holds all of them (float32 for GGUF). Another dtype loads the base.
        rounding, rounding_seed: see `brushstroke.merge`; the same seed gives the same bytes.
        verify: compare the merged model with the adapted one on generated inputs and report the drift of the
            outputs. None does so only if it needs no more memory than two of the folder's files and a quarter
            of the machine's memory.
        max_shard_size: of the files, if the model has to be loaded.
        trust_remote_code: run code that is part of the model's folder.

    Raises:
        ConfigError: dtype differs from that of a loaded Base, or the rounding is invalid.
        BaseMismatchError: the base is another one, or already contains this adapter.
        BaseLoadError, ShapeError: the base cannot be read or lacks weights, or the adapter does not fit it.
        MergeError: see `brushstroke.merge`.
        OutputError: the folder cannot be written, or holds files that may not be replaced.
    """
    require_adapter(adapter)
    how = Rounding(rounding, rounding_seed)
    started, out = time.perf_counter(), Path(out).expanduser()
    folder = _folder_of(base)
    clear_leftovers(out, _is_weights)
    _check_output(out, folder, overwrite)
    weights = None
    if folder is not None and (dtype == "auto" or {DTYPES.get(dtype)} == stored_dtypes(folder)):
        weights = _readable(folder, adapter, trust_remote_code)
    loaded = base if isinstance(base, Base) else None
    if loaded is not None and dtype not in ("auto", str(loaded.dtype).removeprefix("torch.")):
        raise ConfigError(
            f"the base is loaded in {loaded.dtype} already; load it in {dtype}, or leave dtype out"
        )
    if weights is not None:
        weights.check_complete()
        check_base(
            weights,
            adapter,
            allow_different_base=allow_different_base,
            weights=weights,
            parameter=weights.parameter,
        )
    elif loaded is None:
        chosen = widest_dtype(str(base), folder) if dtype == "auto" else dtype
        loaded = load_base(str(base), dtype=chosen, device="cpu", trust_remote_code=trust_remote_code)
    before = _identity(out)

    def recheck() -> None:
        _check_output(out, folder, overwrite)
        if _identity(out) != before:
            raise OutputError(
                f"{out} is not the folder that was there when the merge began: another process has replaced "
                "it; look at it, then repeat the command or choose another folder"
            )

    with replace_folder(out, _is_weights, check=recheck) as staging:
        skipped: tuple[str, ...] = ()
        if folder is not None:
            files = loaded_files(folder) if weights is None else {*weights.shards(), _INDEX}
            skipped = copy_beside(folder, staging, files)
        if weights is not None:
            merged = merge_files(weights, adapter, staging, how)
            if dtype != "auto":
                _declare_dtype(staging / CONFIG, dtype)
        else:
            assert loaded is not None
            merged = _merge_loaded(loaded, adapter, staging, allow_different_base, how, max_shard_size)
        template = adapter.card.chat_template if adapter.card else None
        replaced = bool(template) and save_template(staging, template)
        stops = save_stop_tokens(staging, adapter.card.stop_tokens if adapter.card else ())
        source = loaded if loaded is not None else str(folder)
        check = _not_asked()
        if verify is not False:
            check = check_merged(source, adapter, staging, verify, trust_remote_code=trust_remote_code)
    return ExportReport(
        out=out,
        merged=merged,
        logit_drift=check.drift,
        effect=check.effect,
        logit_drift_skipped=check.skipped,
        compared=check.outputs,
        rounding=how,
        chat_template_saved=replaced,
        stop_tokens_saved=stops,
        left_out=skipped,
        streamed=weights is not None,
        seconds=time.perf_counter() - started,
    )


def _check_output(out: Path, folder: Path | None, overwrite: bool) -> None:
    """Check that a merge may write a folder.

    Raises:
        OutputError: it holds what must not be replaced, or an adapter, or is the base's.
    """
    refuse_existing(out, overwrite)
    if (out / ADAPTER_CONFIG).is_file():
        raise OutputError(
            f"{out} holds an adapter; transformers would load it on top of the merged weights: choose "
            "another folder"
        )
    if folder is not None:
        _refuse_inside(out, folder)
    written = {CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE}
    written |= {path.name for path in out.glob("*") if _is_weights(path.name)}
    if folder is not None:
        written |= {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = tuple(name for name in sorted(written) if not (out / name).is_dir())
    OwnFiles(
        names,
        {CONFIG: lambda config: bool(config.keys() & MODEL_KEYS)},
        marks=(CONFIG,),
        otherwise=f"is in a folder whose {CONFIG} does not say that it holds a model",
    ).refuse_foreign(out)


def _refuse_inside(out: Path, base: Path) -> None:
    out, base = out.resolve(), base.resolve()
    if out == base or out in base.parents or base in out.parents:
        raise OutputError(f"{out} is the base's folder, contains it or is in it; choose a separate folder")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode, which identify a folder; None if it does not exist."""
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def _not_asked() -> CheckResult:
    return CheckResult(skipped="not asked for")


def _folder_of(base: Base | str | Path) -> Path | None:
    if isinstance(base, Base):
        return None
    path = Path(base).expanduser()
    return path if path.is_dir() else None


def _readable(folder: Path, adapter: Adapter, trust_remote_code: bool) -> FolderWeights | None:
    """The weights of a folder, if each adapted one is a separate tensor in safetensors files; else None."""
    files = {entry.name for entry in folder.iterdir()}
    if CONFIG not in files or ADAPTER_CONFIG in files or not files & {_SINGLE, _INDEX}:
        return None
    weights = FolderWeights(folder, trust_remote_code=trust_remote_code)
    if "quantization_config" in json.loads((folder / CONFIG).read_text("utf-8")):
        return None
    try:
        for site in adapter:
            if site in weights:
                weights.key(site)
    except BaseLoadError:  # renamed or fused on loading
        return None
    return weights


def _merge_loaded(
    base: Base,
    adapter: Adapter,
    staging: Path,
    allow_different_base: bool,
    how: Rounding,
    max_shard_size: int | str | None,
) -> MergeReport:
    if not hasattr(base.model, "save_pretrained"):
        raise MergeError(
            f"{type(base.model).__name__} has no save_pretrained; merge it with brushstroke.merge() and save "
            "the result yourself"
        )
    reports: list[MergeReport] = []
    merged: Any = merge(
        base,
        adapter,
        allow_different_base=allow_different_base,
        rounding=how.mode,
        rounding_seed=how.seed,
        report=reports,
    ).model
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with quiet_transformers(), _as_oserrors():
        merged.save_pretrained(staging, **options)
        if base.tokenizer is not None and not (staging / TOKENIZER_CONFIG).is_file():  # else it was copied
            base.tokenizer.save_pretrained(staging)
    return reports[0]


@contextmanager
def _as_oserrors() -> Iterator[None]:
    """The writers of safetensors and tokenizers raise no OSError where the disk is full."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception or isinstance(error, SafetensorError):
            raise OSError(str(error)) from error
        raise


def _declare_dtype(config: Path, dtype: str) -> None:
    """Name the dtype of the weights in a config and its parts, under the keys that each has."""
    settings = read_json(config)
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    for part in parts:
        part |= {key: dtype for key in ("dtype", "torch_dtype") if key in part}
    if not settings.keys() & {"dtype", "torch_dtype"}:
        settings["dtype"] = dtype
    config.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _is_weights(name: str) -> bool:
    """Whether a file holds weights of an earlier merge, which must not remain next to the new ones."""
    return name == _INDEX or bool(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name))
