"""Rows with planted facts, which are asked for soon or far beyond the context of a base model.

A fact is one token: "attribute 7 is value 3". A question is two: "attribute 7?", and the fact's token again, which is
the asked value. Noisy filler stands between. n = tokens of a row of the base training, R = rows, N = tokens of a row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BOS, FILLERS, ATTRIBUTES, VALUES = 0, 31, 16, 16
FIRST_QUESTION = 1 + FILLERS
FIRST_FACT = FIRST_QUESTION + ATTRIBUTES
VOCAB = FIRST_FACT + ATTRIBUTES * VALUES
FAVOURITES = 4
"""Filler tokens that often follow a given one: half of the filler is drawn from them, the other half is noise."""


@dataclass(frozen=True)
class Rows:
    """Rows of token ids [R, N], and where the asked values stand: [A, 2], row and column of the value; its distance
    [A] in tokens to the fact's value."""

    ids: npt.NDArray[np.int64]
    asked: npt.NDArray[np.int64]
    distance: npt.NDArray[np.int64]


def make_rows(*, context: int, facts: int, seq_length: int, num_rows: int, seed: int, part: int) -> Rows:
    """Random rows. `seed` decides the filler's language, `part` which rows in it.

    context: n. facts: of a row of n tokens, and far ones of a longer row.
    """
    language = np.random.default_rng([seed, 0])
    favourites = language.integers(1, FIRST_QUESTION, size=(VOCAB, FAVOURITES))
    rng = np.random.default_rng([seed, 1, part])
    ids = np.empty((num_rows, seq_length), dtype=np.int64)
    ids[:, 0] = BOS
    for i in range(1, seq_length):
        follows = favourites[ids[:, i - 1], rng.integers(FAVOURITES, size=num_rows)]
        ids[:, i] = np.where(rng.random(num_rows) < 0.5, follows, rng.integers(1, FIRST_QUESTION, size=num_rows))
    asked, distance = [], []
    for row in range(num_rows):
        places = (
            _short_places(rng, context, facts)
            if seq_length == context
            else _long_places(rng, context, facts, seq_length)
        )
        attributes = rng.permutation(ATTRIBUTES)[: len(places)]
        for attribute, value, (fact, answer) in zip(
            attributes, rng.integers(VALUES, size=len(places)), places, strict=True
        ):
            ids[row, [fact, answer]] = FIRST_FACT + attribute * VALUES + value
            ids[row, answer - 1] = FIRST_QUESTION + attribute
            asked.append((row, answer))
            distance.append(answer - fact)
    return Rows(ids, np.array(asked), np.array(distance))


def _short_places(rng: np.random.Generator, n: int, num_facts: int) -> list[tuple[int, int]]:
    """Positions of facts and of their answers in a row of n tokens: facts in the first half, answers in the other."""
    half = n // 2
    facts = 1 + rng.permutation(half - 1)[:num_facts]
    answers = half + 1 + 2 * rng.permutation((half - 1) // 2)[:num_facts]
    return list(zip(facts.tolist(), answers.tolist(), strict=True))


def _long_places(rng: np.random.Generator, n: int, num_facts: int, seq_length: int) -> list[tuple[int, int]]:
    """The same in a long row: far facts within n tokens, answered beyond 2n; a near one in every second n further
    tokens, in their first quarter, answered in the second or third."""
    starts = range(n, seq_length - n + 1, n)
    near = [(s + int(rng.integers(n // 4)), s + n // 4 + 1 + 2 * int(rng.integers(n // 4))) for s in starts[::2]]
    # Far answers at even offsets from 2n, in the last quarter of n tokens and of no other question.
    free = np.array([s + offset for s in starts[1:] for offset in range(3 * n // 4 + 2, n, 2)])
    far = zip(
        (1 + rng.permutation(n - 1)[:num_facts]).tolist(),
        rng.permutation(free)[:num_facts].tolist(),
        strict=True,
    )
    return near + list(far)
