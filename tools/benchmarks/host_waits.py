"""How often the host waits for the device in a block of code, and where.

On a GPU PyTorch says it of each operation that does (`torch.cuda.set_sync_debug_mode`). On a CPU nothing waits: there
the operations are counted that would, because a number or a shape on the host comes from what they compute.
"""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tw.parallel.devices import Device

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "repeat_interleave")
"""Operations whose result the host has to know; an index by a mask is one with `nonzero` in it."""
PACKAGES = ("megatron_tw", "megatron/core", "transformer_engine")


@dataclass
class Waits:
    """source: what was counted, in words. places: how many by line of code."""

    source: str
    places: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.places.values())


def host_waits(device: Device, work: Callable[[], object]) -> Waits:
    """Waits of the host while `work` runs."""
    if device.type == "cuda":
        return _gpu_waits(work)
    waits = Waits("operations that a GPU's host would wait for")
    with _CountReads(waits.places):
        work()
    return waits


def _gpu_waits(work: Callable[[], object]) -> Waits:
    waits = Waits("waits of the host")
    shown, mode = warnings.showwarning, torch.cuda.get_sync_debug_mode()

    def count(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            waits.places[_place()] += 1
        else:
            shown(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return waits


class _CountReads(TorchDispatchMode):
    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_", "index_put") and any(
            torch.is_tensor(index) and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.places[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The line of code that waits: the innermost one of the project, else of Megatron-Core, else any."""
    frames = [
        frame
        for frame in traceback.extract_stack(sys._getframe(1))
        if frame.filename != __file__ and "/torch/" not in frame.filename
    ]
    for package in PACKAGES:
        for frame in reversed(frames):
            if f"/{package}/" in frame.filename:
                return f"{package}/{frame.filename.rsplit(f'/{package}/', 1)[1]}:{frame.lineno}"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
