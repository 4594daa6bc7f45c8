"""Pieces of text that are tokenised separately, so that training has the same token boundaries as generation.

`chat` and `encode` decide where pieces begin and end.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BATCH = 8192


@dataclass(frozen=True, slots=True)
class Piece:
    """A span of an example that is trained or masked as a whole.

    `after` is what precedes it: None at the start of the example, the text of a token, or "" for any text.
    `marks` are (role, start, stop) in characters; the rest counts as `role`. `ids` are given tokens.
    """

    text: str
    trained: bool
    role: str
    after: str | None = ""
    marks: tuple[tuple[str, int, int], ...] = ()
    ids: tuple[int, ...] | None = None


class PieceTokenizer:
    """Tokenises pieces in batches, as continuations of the preceding text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._shared: dict[
            int, int
        ] = {}  # one int object per token id; otherwise a large data set would hold millions
        newline, letter, both = self._encode(["\n", "x", "\nx"])["input_ids"]
        # SentencePiece tokenizers put a space before every text.
        self._adds_prefix = newline + letter != both
        self._anchors: dict[str, list[int]] = {"": []}

    def tokens(self, pieces: Iterable[Piece]) -> list[int]:
        """Tokenise one row of pieces."""
        return [token for ids, _ in self.batch([tuple(pieces)])[0] for token in ids]

    def batch(self, rows: Sequence[Sequence[Piece]]) -> list[list[tuple[tuple[int, ...], Counter[str]]]]:
        """For each piece of each row: its tokens, and their counts by role."""
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
                else:  # the text merged with its anchor: tokenise it alone
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
