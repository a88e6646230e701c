"""When a run ends before its last step: at an interval, when its time is up, or on a job scheduler's SIGTERM.

All ranks must leave after the same step, so what one rank knows it tells the others.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_tw.config import TrainConfig
from megatron_tw.parallel.devices import Device


class Exits:
    """The reasons for which a run ends early. A context manager: SIGTERM is caught inside, if the options say so."""

    def __init__(self, config: TrainConfig, device: Device) -> None:
        self._config = config
        self._device = device
        self._started = time.monotonic()
        self._signalled = False
        self._previous: Any = None

    def __enter__(self) -> "Exits":
        if self._config.exit_signal_handler:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._config.exit_signal_handler:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def reason(self, iteration: int) -> str | None:
        """Why the run ends after `iteration` steps, None to go on; the same on every rank. Collective over the world
        where a signal or the time may end the run."""
        config, minutes = self._config, self._config.exit_duration_in_mins
        if config.exit_interval is not None and iteration % config.exit_interval == 0:
            return f"--exit-interval {config.exit_interval}"
        if not config.exit_signal_handler and minutes is None:
            return None
        late = minutes is not None and time.monotonic() - self._started >= 60 * minutes
        flags = torch.tensor([self._signalled, late], dtype=torch.int32, device=self._device.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        signalled, late = flags.tolist()
        if signalled:
            return "SIGTERM"
        return f"--exit-duration-in-mins {minutes}" if late else None
