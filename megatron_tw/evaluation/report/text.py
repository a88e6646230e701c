"""A row of token ids as text: the characters of each token, and where the same word stood before.

A token can be a part of a character (a byte of it). Such tokens are joined into one piece, which is what can be shown.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_PARTS = 16
"""Tokens that a piece has at most: characters have 4 bytes at most, but a token can end one and begin the next."""
BEFORE = 2
"""Tokens decoded before a piece, for tokenizers whose first token's text differs from that of a later one."""
INCOMPLETE = "\ufffd"
WORD = re.compile(r"\w+")


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Piece:
    """Tokens first .. last - 1 of a row, and their text."""

    first: int
    last: int
    text: str


def pieces_of(ids_N: Sequence[int], tokenizer: Decoder) -> list[Piece]:
    """The row's tokens with their text, those of one character together."""
    pieces: list[Piece] = []
    first = 0
    while first < len(ids_N):
        start = max(0, first - BEFORE)
        # Where the tokens before end inside a character that was given up on, nothing is known of this one's text.
        known = tokenizer.decode(ids_N[start:first]) if start < first else ""
        for last in range(first + 1, min(first + MAX_PARTS, len(ids_N)) + 1):
            text = tokenizer.decode(ids_N[start:last])
            if not text.endswith(INCOMPLETE):
                break
        else:
            last = first + 1
            text = tokenizer.decode(ids_N[start:last])
        pieces.append(Piece(first, last, text.removeprefix(known)))
        first = last
    return pieces


@dataclass(frozen=True)
class Row:
    """A row's text."""

    pieces: list[Piece]
    text: str
    starts: list[int]
    """Of each piece in the text."""
    piece_of_token: list[int]

    @staticmethod
    def of(ids_N: Sequence[int], tokenizer: Decoder) -> "Row":
        pieces = pieces_of(ids_N, tokenizer)
        starts, text = [], ""
        for piece in pieces:
            starts.append(len(text))
            text += piece.text
        of_token = [number for number, piece in enumerate(pieces) for _ in range(piece.first, piece.last)]
        return Row(pieces, text, starts, of_token)

    def seen_before(self, number: int) -> int | None:
        """The piece at which the word that piece `number` stands in began when it stood before, last; for a piece in
        the middle of a word, the piece there that continues it. None: the word is new, or it is none.

        A word is a run of letters, digits and underscores: what a piece of code or text calls a thing by.
        """
        piece = self.pieces[number]
        start = self.starts[number]
        letters = WORD.search(piece.text)
        if letters is None:
            return None
        inside = start + letters.start()
        begin = inside
        while begin > 0 and WORD.fullmatch(self.text[begin - 1]):
            begin -= 1
        found = WORD.match(self.text, begin)
        assert found is not None
        # Most telling first: the whole word; what of it is known once this piece is read.
        for word, whole in ((found[0], True), (self.text[begin : start + letters.end()], False)):
            earlier = self._last(word, before=begin, whole=whole)
            if earlier is not None:
                return self.piece_at(earlier + (inside - begin))
        return None

    def _last(self, word: str, *, before: int, whole: bool) -> int | None:
        """Where a word that begins with `word`, or is it, stands last before a place."""
        place = before
        while (place := self.text.rfind(word, 0, place + len(word) - 1)) >= 0:
            begins = place == 0 or not WORD.match(self.text[place - 1])
            if begins and not (whole and WORD.match(self.text, place + len(word))):
                return place
        return None

    def piece_at(self, character: int) -> int:
        """Number of the piece that holds a character of the text."""
        low, high = 0, len(self.starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.starts[middle] <= character else (low, middle)
        return low


def best_span(values: Sequence[float], tokens: int) -> tuple[int, int]:
    """Where `tokens` values in a row have the largest sum: the first such [start, stop)."""
    tokens = min(tokens, len(values))
    total = best = sum(values[:tokens])
    start = 0
    for stop in range(tokens + 1, len(values) + 1):
        total += values[stop - 1] - values[stop - tokens - 1]
        if total > best + 1e-9:
            best, start = total, stop - tokens
    return start, start + tokens
