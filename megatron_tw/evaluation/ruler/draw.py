"""Random choices that are the same on every machine and in every version of Python and numpy.

Python promises that `random.Random(text).random()` goes on giving the same numbers; of `shuffle`, `sample` and
`randrange`, and of numpy's generators, nobody promises it. So everything is made of `random()` here.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random choices that follow from `names`: the seed, and whatever else tells this stream from others."""

    def __init__(self, *names: object) -> None:
        self._random = random.Random(" ".join(map(str, names)))

    def below(self, bound: int) -> int:
        """One of 0 .. bound - 1 (bound at most 2^53)."""
        return int(self._random.random() * bound)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different places of `items`, in random order: the first steps of a shuffle, of which only the
        places that change are kept."""
        assert count <= len(items), f"{count} of {len(items)}"
        moved: dict[int, int] = {}
        chosen = []
        for done in range(count):
            place = done + self.below(len(items) - done)
            chosen.append(items[moved.get(place, place)])
            moved[place] = moved.get(done, done)
        return chosen

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))

    def letters(self, alphabet: str, count: int) -> str:
        return "".join(self.choice(alphabet) for _ in range(count))

    def digits(self, count: int) -> str:
        """A number of `count` digits, of which the first is not 0."""
        lowest = 10 ** (count - 1)
        return str(lowest + self.below(9 * lowest))

    def uuid(self) -> str:
        """A random UUID (version 4, RFC 9562)."""
        bits = "".join(f"{self.below(1 << 32):08x}" for _ in range(4))
        return f"{bits[:8]}-{bits[8:12]}-4{bits[13:16]}-{'89ab'[int(bits[16], 16) % 4]}{bits[17:20]}-{bits[20:32]}"
