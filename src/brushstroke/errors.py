"""All intended errors of brushstroke.

Nothing is caught here: the command line turns errors into one message and an exit status.

BrushstrokeError
├── ConfigError (ValueError)          a setting has an invalid value
│   └── TargetError                   a target pattern matches no site, or a rank does not fit one
├── ShapeError (ValueError)           shapes of factors, updates or sites do not match
├── AttachError (RuntimeError)        an adapter cannot be attached or detached
│   └── RouteError                    a batch does not match the route of its rows
├── AdapterFileError (ValueError)     an adapter on disk is damaged, incomplete or unknown
├── BaseMismatchError (ValueError)    an adapter was trained on another base, or is already merged
├── BaseLoadError (OSError)           a base model cannot be loaded
├── DataError (ValueError)            examples cannot be read or cannot be trained on
├── TrainingError (RuntimeError)      training cannot continue
│   ├── NonFiniteError                the loss or a gradient is not finite
│   └── ResumeError                   a checkpoint does not belong to this run
├── MergeError (RuntimeError)         a merge would lose the update
├── AssetError (RuntimeError)         a sample model or data set cannot be fetched
├── OutputError (OSError)             results cannot be written to the given place
└── MissingPackageError (ImportError) a needed optional package is not installed
"""

import difflib
import importlib
import re
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from types import ModuleType


class BrushstrokeError(Exception):
    """The base class of all errors of this library."""


class ConfigError(BrushstrokeError, ValueError):
    """A setting has an invalid value."""


class TargetError(ConfigError):
    """A target pattern matches no site, or a rank does not fit one."""


class ShapeError(BrushstrokeError, ValueError):
    """Shapes of factors, updates or sites do not match."""


class AttachError(BrushstrokeError, RuntimeError):
    """An adapter cannot be attached or detached."""


class RouteError(AttachError):
    """A batch does not match the route of its rows."""


class AdapterFileError(BrushstrokeError, ValueError):
    """An adapter on disk is damaged, incomplete or unknown."""


class BaseMismatchError(BrushstrokeError, ValueError):
    """An adapter was trained on another base, or is already merged."""


class BaseLoadError(BrushstrokeError, OSError):
    """A base model cannot be loaded."""


class DataError(BrushstrokeError, ValueError):
    """Examples cannot be read or cannot be trained on."""


class TrainingError(BrushstrokeError, RuntimeError):
    """Training cannot continue."""


class NonFiniteError(TrainingError):
    """The loss or a gradient is not finite."""


class ResumeError(TrainingError):
    """A checkpoint does not belong to this run."""


class MergeError(BrushstrokeError, RuntimeError):
    """A merge would lose the update."""


class AssetError(BrushstrokeError, RuntimeError):
    """A sample model or data set cannot be fetched, or has the wrong content."""


class OutputError(BrushstrokeError, OSError):
    """Results cannot be written to the given place."""


class MissingPackageError(BrushstrokeError, ImportError):
    """A needed optional package is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or raise an error with the command that installs its extra.

    Raises:
        MissingPackageError: the package is not installed, or does not work.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails ({error})"
        raise MissingPackageError(
            f"this needs the package {module!r}, which {what}; run: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """The pip command that installs the extra's packages into this environment."""
    marker = re.compile(rf"""(.+?)\s*;\s*extra\s*==\s*['"]{extra}['"]""")
    try:
        named = [found[1] for line in metadata.requires("brushstroke") or () if (found := marker.match(line))]
    except metadata.PackageNotFoundError:  # run from its sources, without being installed
        named = []
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *(named or ["-e", f".[{extra}]"])])


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.6) -> str:
    """A hint such as " (did you mean 'q_proj'?)", or an empty string if no name is similar.

    >>> did_you_mean("q_porj", ["q_proj", "mlp"])
    " (did you mean 'q_proj'?)"
    """
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a key that a config does not have.

    Raises:
        ConfigError: the key is unknown; the message suggests similar keys.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r} in {where}{did_you_mean(key, known)}")
