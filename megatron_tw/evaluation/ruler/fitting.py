"""How much text fills a prompt: the largest number of units whose tokens stay within a limit, with few counts."""

from collections.abc import Callable
from dataclasses import dataclass

TRIES = 60


@dataclass(frozen=True)
class Fit:
    """units: how many. tokens: what they make. tokens_per_unit: of one unit more."""

    units: int
    tokens: int
    tokens_per_unit: float


def fit(tokens_of: Callable[[int], int], limit: int, *, least: int, start: Fit | None, slack: int) -> Fit:
    """The largest number of units within `limit`, to `slack` tokens or to one unit, whichever is more.

    Every count is a new prompt, so it need not grow evenly, but it grows. Each guess follows from the counts around it
    (regula falsi), and where that does not lead on, it halves what is left.

    Args:
        tokens_of: tokens with so many units.
        least: fewest units that make a prompt.
        start: a fit of a prompt of the same kind, to begin from.

    Raises:
        ValueError: `least` units are too many; the message says how many tokens they make.
    """
    low: tuple[int, int] | None = None  # the most that fitted: units, tokens
    high: tuple[int, int] | None = None  # the least that did not
    units, slope = (least, None) if start is None else (max(least, start.units), start.tokens_per_unit)
    for tried in range(TRIES):
        tokens = tokens_of(units)
        if tokens <= limit:
            low = units, tokens
        else:
            if units <= least:
                raise ValueError(f"expected at least {tokens:,} tokens, got {limit:,}")
            high = units, tokens
        if low is not None and high is not None:
            slope = (high[1] - low[1]) / (high[0] - low[0])
        elif slope is None:  # the first count: a larger prompt beside it says what a unit makes
            more = 4 * units + 8
            slope = max(0.01, (tokens_of(more) - tokens) / (more - units))
        if low is not None and (limit - low[1] <= max(slack, slope) or (high is not None and high[0] - low[0] == 1)):
            return Fit(*low, slope)
        units = _next(low, high, limit, slope, least, halve=tried > 6)
    raise AssertionError("the bracket shrinks with every try")


def _next(
    low: tuple[int, int] | None, high: tuple[int, int] | None, limit: int, slope: float, least: int, *, halve: bool
) -> int:
    """The next number to try, strictly between those that fitted and did not."""
    near = low if low is not None else high
    assert near is not None
    guess = near[0] + int((limit - near[1]) / max(slope, 0.01)) - (near is high)
    if high is None:
        return max(guess, near[0] + 1)
    if low is None:
        return max(least, min(guess, high[0] - 1))
    if halve or not low[0] < guess < high[0]:
        guess = (low[0] + high[0]) // 2
    return guess
