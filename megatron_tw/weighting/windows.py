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
    _check_window(seq_length, window)
    if not 1 <= stride < window:
        raise ValueError(
            f"--short-stride: expected 1 to {window - 1} (below --short-window {window}: targets need context), "
            f"got {stride}"
        )
    windows = [Window(0, window, 1, window - 1)] if include_first else []
    for first_target in range(window, seq_length, stride):
        last_target = min(first_target + stride, seq_length) - 1
        windows.append(Window(last_target + 1 - window, window, first_target, last_target))
    return tuple(windows)


def default_stride(seq_length: int, window: int, min_context: int | None = None) -> int:
    """The paper's stride (1 - n/N) * n, rounded down, where it leaves `min_context` tokens; else the largest that does.

    `min_context` is in tokens; None: n // 4.

    >>> default_stride(32768, 8192), default_stride(131072, 8192)  # the second would be 7680, with contexts down to 512
    (6144, 6144)
    """
    least = _least_context(seq_length, window, min_context)
    paper = (seq_length - window) * window // seq_length
    return max(1, min(paper, window - least))


def check_stride(seq_length: int, window: int, stride: int, min_context: int | None = None) -> None:
    """Raises a ValueError, naming strides that fit, if targets beyond `window` would see less than `min_context`.

    >>> check_stride(131072, 8192, 7680)
    Traceback (most recent call last):
    ValueError: --short-stride: 7680 leaves targets beyond --short-window 8192 as few as 512 tokens of context, \
--min-short-context asks for 2048. Strides up to 6144 fit; without a ragged last window: 6144, 5120, 4096
    """
    plan_windows(seq_length, window, stride, include_first=False)
    least = _least_context(seq_length, window, min_context)
    if seq_length == window or window - stride >= least:
        return
    largest = window - least
    even = [fit for fit in range(largest, 0, -1) if (seq_length - window) % fit == 0][:3]
    raise ValueError(
        f"--short-stride: {stride} leaves targets beyond --short-window {window} as few as {window - stride} tokens of "
        f"context, --min-short-context asks for {least}. Strides up to {largest} fit; without a ragged last window: "
        f"{', '.join(map(str, even))}"
    )


def _check_window(seq_length: int, window: int) -> None:
    if not 2 <= window <= seq_length:
        raise ValueError(f"--short-window: expected 2 to --seq-length {seq_length}, got {window}")


def _least_context(seq_length: int, window: int, min_context: int | None) -> int:
    _check_window(seq_length, window)
    least = max(1, window // 4) if min_context is None else min_context
    if not 1 <= least < window:
        raise ValueError(
            f"--min-short-context: expected 1 to {window - 1} (--short-window {window} less 1), got {least}"
        )
    return least
