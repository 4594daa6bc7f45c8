"""Examples as flat arrays: the tokens of all examples in one array, in memory or in files.

It tokenises nothing.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, overload

import numpy as np

from brushstroke.data.examples import EncodingReport, Example
from brushstroke.errors import DataError

_TOKENS, _WEIGHTS, _ROLE = "tokens", "weights", "role-"
_OF_EXAMPLES = {"length": "i8", "row": "i8", "cut": "i8", "trained": "i8", "reach": "i8"}
_AT_ONCE = 2**22  # tokens


class TokenArrays(Sequence[Example]):
    """A sequence of examples that are stored as arrays.

    Args:
        arrays: name → array. "tokens" (int32) and "weights" (uint8 if all are 0 or 1, else float64) have an
            entry for each token; "length", "row", "cut", "trained", "reach" (int64) and "role-NAME" (int32,
            the number of tokens of that role) an entry for each example.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "TokenArrays":
        """The arrays of some examples.

        Raises:
            DataError: a token does not fit into 32 bits.
        """
        if isinstance(examples, TokenArrays):
            return examples
        examples = tuple(examples)
        roles = dict.fromkeys(role for example in examples for role in example.roles)
        weights = np.array([w for example in examples for w in example.weights], "f8")
        if np.isin(weights, (0.0, 1.0)).all():
            weights = weights.astype("u1")
        facts = [(len(e), e.row, e.cut, e.trained, e.reach) for e in examples]
        columns = np.array(facts, "i8").reshape(-1, len(_OF_EXAMPLES)).T
        return cls(
            {
                _TOKENS: _all_tokens(examples),
                _WEIGHTS: weights,
                **dict(zip(_OF_EXAMPLES, columns, strict=True)),
                **{_ROLE + role: np.array([e.roles.get(role, 0) for e in examples], "i4") for role in roles},
            }
        )

    @classmethod
    def joined(cls, parts: Sequence["TokenArrays"]) -> "TokenArrays":
        """The examples of all parts, in order, in memory."""
        names = dict.fromkeys(name for part in (EMPTY, *parts) for name in part.arrays)
        return cls({name: np.concatenate([part.column(name) for part in (EMPTY, *parts)]) for name in names})

    def column(self, name: str) -> np.ndarray:
        """An array by name; zeros for a role that no example has."""
        found = self.arrays.get(name)
        return np.zeros(len(self), "i4") if found is None else found

    @property
    def roles(self) -> dict[str, int]:
        """The number of tokens of each role."""
        return {
            name.removeprefix(_ROLE): int(counts.sum())
            for name, counts in self.arrays.items()
            if name.startswith(_ROLE) and counts.any()
        }

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of all arrays."""
        digest = hashlib.sha256()
        for name, values in sorted(self.arrays.items()):
            digest.update(f"{name} {values.dtype.str[1:]} {len(values)};".encode())
            for part in _parts(values):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def suspects(self, limit: int | None) -> tuple[Example, ...]:
        """The first example without tokens, and the first with a token that is not in 0 to limit - 1."""
        found = set(np.flatnonzero(self.arrays["length"] == 0)[:1].tolist())
        before = 0
        for part in _parts(self.arrays[_TOKENS]) if limit is not None else ():
            outside = (part < 0) | (part >= limit)
            if outside.any():
                position = before + int(outside.argmax())
                found.add(int(np.searchsorted(self._starts, position, side="right")) - 1)
                break
            before += len(part)
        return tuple(self[index] for index in sorted(found))

    def __len__(self) -> int:
        return len(self.arrays["length"])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(map(self._example, range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no example {index} among {len(self)}")
        return self._example(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenArrays):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.arrays["length"])])

    def _example(self, index: int) -> Example:
        span = slice(int(self._starts[index]), int(self._starts[index + 1]))
        roles = ((name, int(n[index])) for name, n in self.arrays.items() if name.startswith(_ROLE))
        return Example(
            tuple(self.arrays[_TOKENS][span].tolist()),
            tuple(self.arrays[_WEIGHTS][span].astype("f8").tolist()),
            int(self.arrays["row"][index]),
            {name.removeprefix(_ROLE): count for name, count in roles if count},
            int(self.arrays["cut"][index]),
        )


@dataclass(frozen=True, slots=True)
class EncodedData(Sequence[Example]):
    """A sequence of examples, with the report of their encoding and the hash of their rows."""

    examples: TokenArrays
    report: EncodingReport
    name: str
    hash: str

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example."""
        return self.examples.arrays["length"]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return int(self.lengths.max(initial=0))

    def fits(self, max_length: int | None, need_trained: bool) -> bool:
        """Whether all examples are within a limit, and have a trained token if they need one."""
        is_trained = not need_trained or bool((self.examples.arrays["trained"] > 0).all())
        return is_trained and self.longest <= (max_length or self.longest)

    @property
    def largest_reach(self) -> int:
        """The largest number of input tokens that an example's loss needs."""
        return int(self.examples.arrays["reach"].max(initial=1))

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)


class ArrayFiles:
    """Appends examples to the files of a folder, one file for each array; `read_arrays` reads them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._dtypes: dict[str, str] = {}
        self._count = 0
        self.append(EMPTY)

    def append(self, part: TokenArrays) -> None:
        """Append the examples of a part.

        Raises:
            OSError: a file cannot be written.
        """
        if part.arrays[_WEIGHTS].dtype.str[1:] != self._dtypes.get(_WEIGHTS, "u1"):
            self._widen_weights()
        for name in dict.fromkeys((*self._files, *part.arrays)):
            values = part.column(name)
            if name not in self._files:
                self._open(name, self._dtypes.get(name, values.dtype.str[1:]))
                if name.startswith(_ROLE):
                    self._files[name].seek(self._count * values.itemsize)
                    self._files[name].truncate()
            self._files[name].write(values.astype(f"<{self._dtypes[name]}").tobytes())
        self._count += len(part)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _open(self, name: str, dtype: str, mode: Literal["wb", "ab"] = "wb") -> None:
        self._dtypes[name] = dtype
        self._files[name] = (self._folder / f"{name}.{dtype}").open(mode)

    def _widen_weights(self) -> None:
        """Weights other than 0 and 1 need floats: write those of earlier parts again."""
        if self._dtypes.get(_WEIGHTS) == "f8":
            return
        if _WEIGHTS in self._files:
            self._files.pop(_WEIGHTS).close()
            narrow = self._folder / f"{_WEIGHTS}.u1"
            with (self._folder / f"{_WEIGHTS}.f8").open("wb") as wide:
                for part in _file_parts(narrow, np.dtype("u1")):
                    wide.write(part.astype("<f8").tobytes())
            narrow.unlink()
            self._open(_WEIGHTS, "f8", "ab")
        self._dtypes[_WEIGHTS] = "f8"


def read_arrays(folder: Path) -> TokenArrays:
    """The examples in the files of a folder, which stay on disk and are mapped into memory.

    Raises:
        OSError, ValueError: a file is missing or has another size.
    """
    found = TokenArrays({path.stem: _mapped(path) for path in folder.iterdir() if path.suffix in _SUFFIXES})
    counts = {len(values) for name, values in found.arrays.items() if name not in (_TOKENS, _WEIGHTS)}
    tokens = int(found.arrays["length"].sum())
    if len(counts) > 1 or {len(found.arrays[name]) for name in (_TOKENS, _WEIGHTS)} != {tokens}:
        raise ValueError(f"the files in {folder} do not have the same number of examples")
    return found


_SUFFIXES = (".i4", ".i8", ".u1", ".f8")


def _mapped(path: Path) -> np.ndarray:
    dtype = np.dtype(f"<{path.suffix[1:]}")
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """The values, a part at a time; those of a file are read, since mapped pages count as used memory."""
    if not isinstance(values, np.memmap):
        yield from (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))
        return
    yield from _file_parts(Path(str(values.filename)), values.dtype)


def _file_parts(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(part := np.fromfile(file, dtype, _AT_ONCE)):
            yield part


def _all_tokens(examples: Sequence[Example]) -> np.ndarray:
    try:
        return np.array([token for example in examples for token in example.tokens], "i4")
    except OverflowError:
        row, token = next((e.row, t) for e in examples for t in e.tokens if not -(2**31) <= t < 2**31)
        raise DataError(f"row {row} has the token {token}; a token is below 2**31") from None


EMPTY = TokenArrays.of(())
