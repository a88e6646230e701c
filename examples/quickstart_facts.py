"""Facts planted in source files: a module imports a class, and far below it is the type of a variable.

    import LazyCache
    ...                     # hundreds of tokens of the standard library
    cache: LazyCache

There are 16 things (cache, codec, ...) of 16 kinds (Lazy, Eager, ...). A row imports one cache at most, so that line
alone tells which kind follows `cache:` later. The kind is drawn at random: a model that cannot see the import can only
guess. The tokenizer is trained so that the class's name is one token, and so is `cache:` before it: a model of 0.5M
parameters learns this within minutes.

n = tokens of a row of the base training, N = tokens of a row, A = answers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_tw.data.rows import TokenRows
from megatron_tw.data.rows_format import TOKENIZER_DIR
from megatron_tw.data.tokenizer import Tokenizer, load_tokenizer

# fmt: off
THINGS = (
    "cache", "codec", "format", "filter", "hash", "index", "lock", "logger",
    "mode", "parser", "queue", "reader", "stream", "table", "timer", "writer",
)
KINDS = (
    "Amber", "Basic", "Cubic", "Delta", "Eager", "Fast", "Global", "Hybrid",
    "Inner", "Joint", "Keyed", "Lazy", "Multi", "Null", "Outer", "Plain",
)
# fmt: on


@dataclass(frozen=True)
class Fact:
    """One thing of one kind."""

    thing: str
    kind: str

    @property
    def name(self) -> str:
        """Of the class."""
        return f"{self.kind}{self.thing.capitalize()}"

    @property
    def imported(self) -> str:
        """The line that tells it."""
        return f"import {self.name}"

    @property
    def used(self) -> str:
        """The line that asks for it: the answer is the last token."""
        return f"{self.thing}: {self.name}"


FACTS = tuple(Fact(thing, kind) for thing in THINGS for kind in KINDS)


def check_tokens(tokenizer: Tokenizer) -> None:
    """Raises ValueError unless both lines of every fact are two tokens, and the second is the same."""
    for fact in FACTS:
        imported, used = tokenizer.encode(fact.imported), tokenizer.encode(fact.used)
        if len(imported) != 2 or len(used) != 2 or imported[1] != used[1]:
            raise ValueError(
                f"{tokenizer.path}: expected two tokens for {fact.imported!r} and {fact.used!r}, the second the same, "
                f"got {imported} and {used}: --vocab-size is too small"
            )


def plant(
    texts: Sequence[str], tokenizer: Tokenizer, *, seq_length: int, context: int, facts: int, num_rows: int, seed: int
) -> Iterator[str]:
    """Documents that make one row each: a piece of a text, with facts planted between its lines.

    A row of `context` (n) tokens has `facts` facts at random lines. A longer one has as many far ones, imported within
    the first n tokens and used beyond 2n, and as many near ones, used within about n / 2 tokens of their import.
    """
    rng = np.random.default_rng([seed, seq_length])
    long = seq_length > context
    planted = (2 if long else 1) * facts
    room = (
        seq_length
        - 1
        - planted * sum(len(tokenizer.encode(f"{line}\n")) for line in (FACTS[0].imported, FACTS[0].used))
    )
    pieces = list(_pieces(texts, tokenizer, room, seq_length - 1))
    if len(pieces) < num_rows:
        raise ValueError(f"expected {num_rows} pieces of {room} tokens, the documents hold {len(pieces)}")
    for piece in rng.permutation(len(pieces))[:num_rows]:
        lines, starts = pieces[piece]
        inserted: list[list[str]] = [[] for _ in lines]
        for place, thing in enumerate(rng.permutation(len(THINGS))[:planted]):
            far = long and place < facts
            first, second = _far_places(rng, starts, context) if far else _near_places(rng, starts, context, long)
            fact = Fact(THINGS[thing], KINDS[rng.integers(len(KINDS))])
            # An import comes before whatever is used at the same line.
            inserted[first].insert(0, fact.imported)
            inserted[second].append(fact.used)
        yield "".join(f"{line}\n" for before, own in zip(inserted, lines, strict=True) for line in [*before, own])


def _pieces(texts: Iterable[str], tokenizer: Tokenizer, room: int, most: int) -> Iterator[tuple[list[str], list[int]]]:
    """Consecutive lines that fill `room` tokens, the last one over its end, by less than `most`; and where each starts,
    in tokens. What is left of a text is dropped."""
    for text in texts:
        lines: list[str] = []
        starts: list[int] = []
        size = 0
        for line in text.split("\n"):
            lines.append(line)
            starts.append(size)
            size += len(tokenizer.encode(f"{line}\n"))
            if size >= room:
                if size < room + most:
                    yield lines, starts
                lines, starts, size = [], [], 0


def _far_places(rng: np.random.Generator, starts: Sequence[int], n: int) -> tuple[int, int]:
    """Lines of an import and of its use, more than n tokens apart."""
    first = rng.integers(np.searchsorted(starts, 3 * n // 4))
    return int(first), int(rng.integers(min(np.searchsorted(starts, 2 * n), len(starts) - 1), len(starts)))


def _near_places(rng: np.random.Generator, starts: Sequence[int], n: int, long: bool) -> tuple[int, int]:
    """Lines of an import and of its use: any two of a short row; within n / 2 tokens in a long one."""
    if not long:
        first, second = sorted(rng.integers(len(starts), size=2).tolist())
        return first, second
    first = int(rng.integers(len(starts)))
    return first, int(rng.integers(first, max(first + 1, np.searchsorted(starts, starts[first] + n // 2))))


def find_answers(rows: Path, output: Path) -> str:
    """Finds the uses whose import stands before them in the row, in the tokens of the rows themselves, and writes them
    as tools/report.py --answers reads them:

        row [A] int64, position [A] of the answer's token, tokens [A] (1), distance [A] in tokens from the import

    Returns what was found, in words.
    """
    dataset = TokenRows(rows)
    tokenizer = load_tokenizer(dataset.path / TOKENIZER_DIR)
    tells = {tuple(tokenizer.encode(fact.imported)) for fact in FACTS}
    asks = {tuple(tokenizer.encode(fact.used)) for fact in FACTS}
    found = []
    for row in range(len(dataset)):
        ids = dataset[row].tolist()
        told: dict[int, int] = {}
        for position, pair in enumerate(pairwise(ids), start=1):
            if pair in tells:
                told[pair[1]] = position
            elif pair in asks and pair[1] in told:
                found.append((row, position, 1, position - told[pair[1]]))
    if not found:
        raise ValueError(f"{rows}: no planted fact is asked for in these rows")
    answers_A4 = np.array(found, dtype=np.int64)
    np.savez(output, **dict(zip(("row", "position", "tokens", "distance"), answers_A4.T, strict=True)))
    nearest, farthest = answers_A4[:, 3].min(), answers_A4[:, 3].max()
    return f"{len(found):,} answers in {len(dataset):,} rows, {nearest} to {farthest} tokens after their fact"
