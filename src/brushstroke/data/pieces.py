"""Pieces of text that are tokenised each on its own, so that training sees the boundaries of generation.

It does not decide where the pieces begin and end: `chat` and `encode` do.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BATCH = 8192


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an example with one fate.

    `after` says what it follows: None where the example begins, the text of a token, or "" for any text.
    `marks` are (role, start, stop) in characters; what no mark covers counts as `role`. `ids` are tokens
    given as such.
    """

    text: str
    trained: bool
    role: str
    after: str | None = ""
    marks: tuple[tuple[str, int, int], ...] = ()
    ids: tuple[int, ...] | None = None


class PieceTokenizer:
    """Tokenises pieces in batches, as continuations of what they follow."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._shared: dict[int, int] = {}  # one int object per token id, or a large set would hold millions
        newline, letter, both = self._encode(["\n", "x", "\nx"])["input_ids"]
        # Tokenizers of the SentencePiece kind put a space before every text they are given.
        self._adds_prefix = newline + letter != both
        self._anchors: dict[str, list[int]] = {"": []}

    def tokens(self, pieces: Iterable[Piece]) -> list[int]:
        """The tokens of one row of pieces."""
        return [token for ids, _ in self.batch([tuple(pieces)])[0] for token in ids]

    def batch(self, rows: Sequence[Sequence[Piece]]) -> list[list[tuple[tuple[int, ...], Counter[str]]]]:
        """For each row, for each piece: its tokens, and how many of them belong to each role."""
        wanted = dict.fromkeys(
            (self._anchor(piece), piece.text, piece.marks, piece.role)
            for row in rows
            for piece in row
            if piece.ids is None
        )
        keys, found = list(wanted), {}
        for start in range(0, len(keys), _BATCH):
            chunk = keys[start : start + _BATCH]
            found.update(zip(chunk, self._encode_chunk(chunk), strict=True))
        return [
            [
                found[self._anchor(piece), piece.text, piece.marks, piece.role]
                if piece.ids is None
                else (piece.ids, Counter({piece.role: len(piece.ids)}))
                for piece in row
            ]
            for row in rows
        ]

    def _anchor(self, piece: Piece) -> str:
        if piece.after is None:
            return ""
        return piece.after or ("\n" if self._adds_prefix else "")

    def _encode_chunk(self, chunk: Sequence[tuple]) -> list[tuple[tuple[int, ...], Counter[str]]]:
        encoded = self._encode([anchor + text for anchor, text, _, _ in chunk])
        results = []
        for index, (anchor, text, marks, role) in enumerate(chunk):
            ids, batch, at, shift = encoded["input_ids"][index], encoded, index, len(anchor)
            if anchor:
                lead = self._anchor_ids(anchor)
                if ids[: len(lead)] == lead:
                    ids = ids[len(lead) :]
                else:  # the text grew together with its anchor: take it alone
                    batch, at, shift = self._encode([text]), 0, 0
                    ids = batch["input_ids"][0]
            results.append((self._share(ids), self._roles(batch, at, shift, marks, role, len(ids))))
        return results

    def _anchor_ids(self, anchor: str) -> list[int]:
        if anchor not in self._anchors:
            self._anchors[anchor] = self._encode([anchor])["input_ids"][0]
        return self._anchors[anchor]

    def _encode(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)

    def _share(self, ids: Iterable[int]) -> tuple[int, ...]:
        shared = self._shared
        return tuple([shared.setdefault(token, token) for token in ids])

    @staticmethod
    def _roles(batch: Any, at: int, shift: int, marks: tuple, role: str, total: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        if getattr(batch, "is_fast", False):
            for name, start, stop in marks:
                first = batch.char_to_token(at, shift + start)
                last = batch.char_to_token(at, shift + stop - 1)
                if first is not None and last is not None:
                    counts[name] += last - first + 1
        counts[role] += total - counts.total()
        return +counts
