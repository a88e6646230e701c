"""Which short windows a row of N tokens is cut into, and which targets each of them scores. Plain integers, no tensors.

Targets are numbered by the position of the predicted token: 1 .. N - 1. A window of n tokens that starts at `start`
gives the target at position p a context of p - start tokens (its first token stands for BOS when the row begins with
BOS).
"""

from typing import NamedTuple


class Window(NamedTuple):
    """Tokens [start, start + length) of a row, and the targets scored there, first_target .. last_target inclusive."""

    start: int
    length: int
    first_target: int
    last_target: int


def plan_windows(seq_length: int, window: int, stride: int, *, include_first: bool) -> tuple[Window, ...]:
    """The windows of a row: window k >= 1 starts at k * stride and scores its last `stride` targets.

    Every target beyond `window` is scored once, with a context of `window - stride` to `window - 1` tokens. The last
    window ends at the row's end and scores the targets that are left, which may be fewer than `stride`.

    Args:
        seq_length: N, tokens of the row.
        window: n, tokens of a window.
        stride: s, 1 .. n - 1.
        include_first: window 0 too, which scores targets 1 .. n - 1 (a frozen scorer). Else (the model in training is
            its own scorer) targets 1 .. n take their long NLL: see `unfrozen_short_nll`.

    >>> for window in plan_windows(16, 8, 4, include_first=True):
    ...     print(window)
    Window(start=0, length=8, first_target=1, last_target=7)
    Window(start=4, length=8, first_target=8, last_target=11)
    Window(start=8, length=8, first_target=12, last_target=15)

    A ragged end: the last window is moved back to end at the row's end.

    >>> for window in plan_windows(17, 8, 6, include_first=False):
    ...     print(window)
    Window(start=6, length=8, first_target=8, last_target=13)
    Window(start=9, length=8, first_target=14, last_target=16)

    Raises:
        ValueError: window longer than the row, or stride outside 1 .. n - 1.
    """
    if not 2 <= window <= seq_length:
        raise ValueError(f"`window`: expected 2 to {seq_length}, the tokens of a row, got {window}")
    if not 1 <= stride < window:
        raise ValueError(
            f"`stride`: expected 1 to {window - 1} (below `window` {window}: targets need context), got {stride}"
        )
    windows = [Window(0, window, 1, window - 1)] if include_first else []
    for first_target in range(window, seq_length, stride):
        last_target = min(first_target + stride, seq_length) - 1
        windows.append(Window(last_target + 1 - window, window, first_target, last_target))
    return tuple(windows)
