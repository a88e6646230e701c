"""Peak memory of a block of code on this rank: of the CUDA allocator, or on a CPU of the process (Linux)."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tw.parallel.devices import Device


@dataclass
class Block:
    """What a block of code took at most, model and all."""

    peak_bytes: int = 0


class PeakMemory:
    """Counts from what there is when it is made: make it before the model. (On a GPU the allocator then holds
    nothing.)"""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else _settled_bytes()

    @contextmanager
    def of_block(self) -> Iterator[Block]:
        block = Block()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield block
            block.peak_bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            _settled_bytes()
            yield block
            block.peak_bytes = status_bytes("VmHWM") - self.before


def _settled_bytes() -> int:
    """Resident bytes, after memory freed earlier was given back; the peak counts from now on."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
