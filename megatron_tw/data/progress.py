"""How far long work has come: a bar on a terminal, and in a log file a line now and then."""

import os
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
WIDEST = 120
"""Columns of a bar."""
_COLUMNS, _LINES = 100, 24


def bar_options() -> dict[str, Any]:
    """For a `tqdm` on stderr: off where that is no terminal; as wide as the terminal, up to 120 columns; of a fixed
    size where the terminal says that it has none, which would leave the bar empty."""
    columns = 0
    if sys.stderr is not None and sys.stderr.isatty():
        size = os.get_terminal_size(sys.stderr.fileno())
        columns = size.columns if size.lines > 0 else 0
    if columns == 0:
        return {"disable": None, "ncols": _COLUMNS, "nrows": _LINES}
    if columns > WIDEST:
        return {"disable": None, "ncols": WIDEST}
    return {"disable": None, "dynamic_ncols": True}


class Progress:
    """Work of `total` units. A context manager.

    what: the work, as "scoring". unit: of what it is counted in. show: whether this process is the one that shows it.
    keep: whether the bar stays on the terminal when the work is done. scale: large counts with a prefix (12.3M). begun:
    units that were done before, by another process.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, show: bool, keep: bool = True, scale: bool = False, begun: int = 0
    ) -> None:
        options = bar_options() if show else {"disable": True}
        self._bar = tqdm(desc=what, total=total, initial=begun, unit=unit, leave=keep, unit_scale=scale, **options)
        self._lines = show and self._bar.disable and keep
        self._what, self._unit, self._scale = what, unit, scale
        self._total, self._begun, self._done = total, begun, begun
        self._started = self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._lines and kind is None:
            self._say()

    def update(self, units: int = 1) -> None:
        """So many more units are done."""
        self._done += units
        self._bar.update(units)
        finished = self._done == self._total  # the last line comes at the end
        if self._lines and not finished and time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._say()

    def _say(self) -> None:
        done, total = (
            tqdm.format_sizeof(count) if self._scale else f"{count:,}" for count in (self._done, self._total)
        )
        seconds = time.monotonic() - self._started
        left = ""
        if self._begun < self._done < self._total:
            pace = seconds / (self._done - self._begun)
            left = f", about {tqdm.format_interval(pace * (self._total - self._done))} left"
        print(
            f"{self._what}: {done} of {total} {self._unit} in {tqdm.format_interval(seconds)}{left}",
            file=sys.stderr,
            flush=True,
        )
