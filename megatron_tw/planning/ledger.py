"""The memory of a simulated rank: which storages came and went, in which phase, and what each is for.

Only the order of events is kept while the run goes on. What a storage is for may be known later (the optimizer's state
exists after the first step), so bytes by category are counted when all is over.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tw.planning.record import CATEGORIES, PHASES, Moment

_CATEGORY_OF_PHASE = {
    "build": "other",
    "scoring": "activations",
    "forward": "activations",
    "backward": "activations",
    "optimizer": "other",
}
"""Of storages that nobody named."""


@dataclass(eq=False)
class _Storage:
    """One storage, alive or gone. `alive` keeps nothing alive."""

    size: int
    category: str
    alive: "weakref.ref[torch.UntypedStorage] | None"


@dataclass(frozen=True)
class _Event:
    """`change` bytes more of a storage."""

    phase: str
    storage: _Storage
    change: int


class Ledger:
    """Storages seen so far, and a log of their coming and going since the start or the last `mark`."""

    def __init__(self) -> None:
        self.phase = "build"
        self.counting = True
        self._known: dict[int, _Storage] = {}
        self._events: list[_Event] = []

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is known and as large as before."""
        storage = tensor.untyped_storage()
        size, known = storage.nbytes(), self._known.get(storage._cdata)
        if known is not None:
            if size != known.size:
                self._events.append(_Event(self.phase, known, size - known.size))
                known.size = size
            return
        if not self.counting:
            return
        key, entry = storage._cdata, _Storage(size, _CATEGORY_OF_PHASE[self.phase], None)
        entry.alive = weakref.ref(storage, lambda _: self._gone(key))
        self._known[key] = entry
        self._events.append(_Event(self.phase, entry, size))

    def _gone(self, key: int) -> None:
        entry = self._known.pop(key)
        self._events.append(_Event(self.phase, entry, -entry.size))

    def name(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what the storages of these tensors are for, from their first moment on."""
        assert category in CATEGORIES
        for tensor in tensors:
            self.see(tensor)
            self._known[tensor.untyped_storage()._cdata].category = category

    def living(self, category: str) -> int:
        """Bytes of a category now."""
        return sum(entry.size for entry in self._known.values() if entry.category == category)

    def mark(self) -> int:
        """The place in the log that has been reached."""
        return len(self._events)

    def moments(self, start: int, stop: int) -> list[Moment]:
        """All moments between two marks: bytes by category after each event that added some."""
        in_use = dict.fromkeys(CATEGORIES, 0)
        moments = []
        for index, event in enumerate(self._events[:stop]):
            in_use[event.storage.category] += event.change
            if index >= start and event.change > 0:
                moments.append(Moment(phase=event.phase, bytes_by_category=dict(in_use)))
        return moments


def peaks(moments: Iterable[Moment]) -> dict[str, Moment]:
    """The moment of each phase at which most bytes were in use."""
    highest: dict[str, Moment] = {}
    for moment in moments:
        if moment.phase not in highest or moment.total > highest[moment.phase].total:
            highest[moment.phase] = moment
    return {phase: highest[phase] for phase in PHASES if phase in highest}


def thinned(moments: list[Moment], least: int = 200) -> list[Moment]:
    """About `least` of the moments, in order: of equally long stretches the highest and the lowest, so that no peak is
    lost; a change of phase ends a stretch."""
    step = max(1, 2 * len(moments) // least)
    kept: list[Moment] = []
    start = 0
    while start < len(moments):
        stop = start + 1
        while stop < len(moments) and stop - start < step and moments[stop].phase == moments[start].phase:
            stop += 1
        stretch = range(start, stop)
        chosen = {max(stretch, key=lambda i: moments[i].total), min(stretch, key=lambda i: moments[i].total)}
        kept += [moments[index] for index in sorted(chosen)]
        start = stop
    return kept
