"""What --data-path names: one folder of rows, several, or several with weights, in Megatron's form."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path


def split_blend(values: Sequence[str]) -> tuple[tuple[str, ...], tuple[Fraction, ...] | None]:
    """The folders that --data-path names, and their weights, exactly as they are written; None without weights.

    A number is a weight wherever there is more than one value: a folder of such a name is `./7`.

    >>> split_blend(["0.7", "books", "0.3", "code"])
    (('books', 'code'), (Fraction(7, 10), Fraction(3, 10)))
    >>> split_blend(["books", "code"])
    (('books', 'code'), None)

    Raises:
        ValueError: not weights and folders in turn, a weight that is not positive and finite, a folder named twice.
    """
    if not values:
        raise ValueError("--data-path: expected one folder or more, got none")
    weights: list[Fraction] | None = None
    folders = list(values)
    if len(values) > 1 and any(_number(value) is not None for value in values):
        folders, numbers = list(values[1::2]), [_number(value) for value in values[::2]]
        if len(values) % 2 or None in numbers or any(_number(folder) is not None for folder in folders):
            raise ValueError(
                f"--data-path: expected folders, or WEIGHT FOLDER WEIGHT FOLDER ..., got {' '.join(values)}"
            )
        for value, number in zip(values[::2], numbers, strict=True):
            if not 0 < (number or 0) < float("inf"):
                raise ValueError(f"--data-path: expected positive weights, got {value}")
        weights = [Fraction(value.strip()) for value in values[::2]]  # not of the float: 0.7 and 0.3 are 7 to 3
    places = [Path(folder).resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"--data-path: expected each folder once, got {folder} {places.count(place)} times")
    return tuple(folders), None if weights is None else tuple(weights)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
