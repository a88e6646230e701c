"""When a run ends before its last step: at an interval, when its time is up, on Ctrl-C, on a job scheduler's SIGTERM.

All ranks must leave after the same step, so what one rank knows it tells the others.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_tw.config import TrainConfig
from megatron_tw.parallel.devices import Device

CTRL_C = "Ctrl-C"
_NAMES = {signal.SIGINT: CTRL_C, signal.SIGTERM: "SIGTERM"}
_ENDING = b"\nCtrl-C: the run ends after this step, with a checkpoint if it has a folder; once more ends it at once\n"


class Exits:
    """The reasons for which a run ends early. A context manager: inside, Ctrl-C (SIGINT) is caught, and SIGTERM if the
    options say so. A second Ctrl-C ends the process at once.

    started: when the time of --exit-duration-in-mins began, by time.monotonic.
    """

    def __init__(self, config: TrainConfig, device: Device, started: float) -> None:
        self._config = config
        self._device = device
        self._started = started
        self._signalled = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Exits":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            caught = [signal.SIGINT] + [signal.SIGTERM] * self._config.exit_signal_handler
            self._previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = max(self._signalled, number)
        if number == signal.SIGINT:
            # The default action and not a KeyboardInterrupt, which would wait until the collective returns.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.environ.get("RANK", "0") == "0":
                os.write(2, _ENDING)

    def reason(self, iteration: int) -> str | None:
        """Why the run ends after `iteration` steps, None to go on; the same on every rank. Collective over the
        world."""
        config, minutes = self._config, self._config.exit_duration_in_mins
        late = minutes is not None and time.monotonic() - self._started >= 60 * minutes
        flags = torch.tensor([self._signalled, late], dtype=torch.int32, device=self._device.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        signalled, late = flags.tolist()
        if signalled:
            return _NAMES[signal.Signals(signalled)]
        if config.exit_interval is not None and iteration % config.exit_interval == 0:
            return f"--exit-interval {config.exit_interval}"
        return f"--exit-duration-in-mins {minutes}" if late else None
