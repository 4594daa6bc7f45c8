"""Every error that brushstroke raises on purpose.

It does not catch anything: the command line turns these into one message and an exit status.

BrushstrokeError
├── ConfigError (ValueError)          a setting has a value that cannot work
│   └── TargetError                   a target pattern matches no site, or a rank does not fit one
├── ShapeError (ValueError)           factors, updates or sites whose shapes do not go together
├── AttachError (RuntimeError)        a model cannot take, or give back, an adapter now
│   └── RouteError                    a batch and the route of its rows do not go together
├── AdapterFileError (ValueError)     an adapter on disk is damaged, incomplete or of an unknown kind
├── BaseMismatchError (ValueError)    an adapter was trained on another base, or is merged in already
├── BaseLoadError (OSError)           a base model cannot be loaded
├── DataError (ValueError)            examples cannot be read or cannot be trained on
├── TrainingError (RuntimeError)      training cannot go on
│   ├── NonFiniteError                the loss or a gradient is not a finite number
│   └── ResumeError                   a checkpoint does not belong to this run
├── MergeError (RuntimeError)         a merge would lose the update
├── AssetError (RuntimeError)         a sample model or data set cannot be fetched
├── OutputError (OSError)             results cannot be written where they were asked for
└── MissingPackageError (ImportError) an optional package is needed and not installed
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class BrushstrokeError(Exception):
    """The root of all errors of this library."""


class ConfigError(BrushstrokeError, ValueError):
    """A setting has a value that cannot work."""


class TargetError(ConfigError):
    """A target pattern matches no site, or a rank does not fit one."""


class ShapeError(BrushstrokeError, ValueError):
    """Factors, updates or sites whose shapes do not go together."""


class AttachError(BrushstrokeError, RuntimeError):
    """A model cannot take, or give back, an adapter now."""


class RouteError(AttachError):
    """A batch and the route of its rows do not go together."""


class AdapterFileError(BrushstrokeError, ValueError):
    """An adapter on disk is damaged, incomplete or of an unknown kind."""


class BaseMismatchError(BrushstrokeError, ValueError):
    """An adapter was trained on another base, or is merged in already."""


class BaseLoadError(BrushstrokeError, OSError):
    """A base model cannot be loaded."""


class DataError(BrushstrokeError, ValueError):
    """Examples cannot be read or cannot be trained on."""


class TrainingError(BrushstrokeError, RuntimeError):
    """Training cannot go on."""


class NonFiniteError(TrainingError):
    """The loss or a gradient is not a finite number."""


class ResumeError(TrainingError):
    """A checkpoint does not belong to this run."""


class MergeError(BrushstrokeError, RuntimeError):
    """A merge would lose the update."""


class AssetError(BrushstrokeError, RuntimeError):
    """A sample model or data set cannot be fetched, or is not the one that it should be."""


class OutputError(BrushstrokeError, OSError):
    """Results cannot be written where they were asked for."""


class MissingPackageError(BrushstrokeError, ImportError):
    """An optional package is needed and not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs the package {module!r}, which is not installed; "
            f"run: pip install 'brushstroke[{extra}]'"
        ) from error


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.6) -> str:
    """A hint such as " (did you mean 'q_proj'?)", or an empty string where nothing is near.

    >>> did_you_mean("q_porj", ["q_proj", "mlp"])
    " (did you mean 'q_proj'?)"
    """
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a key that a config does not have.

    Raises:
        ConfigError: naming the key, and the one that was probably meant.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r} in {where}{did_you_mean(key, known)}")
