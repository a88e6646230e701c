"""Where the time goes: seconds of the parts of a step on each rank, and which rank is the slowest.

Megatron-Core asks for timers around forward, backward and gradient reduction (`config.timers`); a `Clock` is these
timers, and `clock.part(...)` times what else there is. On a GPU it records events, which are read when the step is
over: nothing waits for the device in between.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_tw.parallel.devices import Device, peak_memory_bytes, synchronize

PARTS = ("data", "scoring", "forward", "backward", "gradient_reduction", "optimizer", "evaluation", "checkpoint")
_OF_MEGATRON = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "gradient_reduction",
    "non-tensor-parallel-grads-all-reduce": "gradient_reduction",
    "embedding-grads-all-reduce": "gradient_reduction",
}
"""Megatron-Core's timers that are parts of a step; the others lie within these, or within the optimizer."""
_OWN = [PARTS.index(part) for part in ("data", "forward", "backward")]
"""What a rank does before it waits for the others: but for the collectives of TP and CP inside."""


class Clock:
    """The timers of one run on this rank. What Megatron-Core times within a `part` belongs to that part."""

    def __init__(self, device: Device) -> None:
        self._device = device.device
        self._events = torch.cuda.is_available()  # not where a GPU is only planned for
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._started: dict[str, Any] = {}
        self._within: str | None = None

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        """The timer that Megatron-Core calls `name`."""
        return _Timer(self, _OF_MEGATRON.get(name) if self._within is None else None)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around one of PARTS."""
        assert name in PARTS
        assert self._within is None
        self._within = name
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)
            self._within = None

    def start(self, name: str) -> None:
        self._started[name] = self._now()

    def stop(self, name: str) -> None:
        self._spans[name].append((self._started.pop(name), self._now()))

    def metrics(self) -> dict[str, float]:
        """Of what was timed since the last call, on every rank: PART_seconds of PARTS, mean over ranks; slowest_rank,
        whose data, forward and backward took longest, and rank_spread, by which share longer than the mean's;
        peak_memory_gib so far of the rank that took most. Collective over the world; waits for the device.
        """
        synchronize()
        own = [sum(_seconds(*span) for span in self._spans.pop(part, ())) for part in PARTS]
        mine = torch.tensor([*own, peak_memory_bytes() / 2**30], dtype=torch.float64, device=self._device)
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        all_RP = torch.stack(ranks).cpu()
        busy_R = all_RP[:, _OWN].sum(dim=1)
        mean, longest = float(busy_R.mean()), float(busy_R.max())
        means = dict(zip(PARTS, all_RP.mean(dim=0).tolist(), strict=False))
        return {
            **{f"{part}_seconds": seconds for part, seconds in means.items()},
            "slowest_rank": int(busy_R.argmax()),
            "rank_spread": longest / mean - 1 if mean else 0.0,
            "peak_memory_gib": float(all_RP[:, -1].max()),
        }

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Timer:
    """What Megatron-Core does with a timer; part: None is not timed. Ranks are not synchronized, whatever it asks."""

    def __init__(self, clock: Clock, part: str | None) -> None:
        self._clock, self._part = clock, part

    def start(self, barrier: bool = False) -> None:
        if self._part is not None:
            self._clock.start(self._part)

    def stop(self, barrier: bool = False) -> None:
        if self._part is not None:
            self._clock.stop(self._part)


def _seconds(started: Any, ended: Any) -> float:
    return started.elapsed_time(ended) / 1e3 if isinstance(started, torch.cuda.Event) else ended - started
