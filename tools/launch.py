"""torchrun, but that a signal ends it without a traceback, and with the status that a shell would give it; and that it
waits for its ranks however often a scheduler sends the signal.

python tools/launch.py --nproc-per-node 4 tools/train.py OPTIONS
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.run import main

SECONDS_AFTER_THE_SECOND = 1
"""For what ranks do at once, after a second Ctrl-C."""


def leave_time_to_save() -> None:
    """Let ranks live TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds after a signal, which torch before 2.13 does not read; and
    30 where one of them has failed, though newer ones read it there too.

    A signal that comes while they end is handed on to them, no more: Slurm sends its SIGTERM to every process of a
    step, and again at the time limit, and a script hands its own on. torchrun would end before its ranks. A second
    Ctrl-C does end them at once.
    """
    close, seconds = PContext.close, int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    signals: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        if len(signals) == 1 or signum == signal.SIGINT:
            raise SignalException(f"signal {signum}", sigval=signal.Signals(signum))
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signum)

    def close_in_time(self: PContext, death_sig: Any = None, timeout: int = 30) -> None:
        if len(signals) > 1 and signals[-1] == signal.SIGINT:
            close(self, signal.SIGINT, SECONDS_AFTER_THE_SECOND)
        else:
            close(self, death_sig, seconds if isinstance(sys.exception(), SignalException) else 30)

    api._terminate_process_handler = end
    PContext.close = close_in_time  # type: ignore[method-assign]


if __name__ == "__main__":
    leave_time_to_save()
    try:
        main()
    except SignalException as error:  # the ranks have ended by then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + int(error.sigval))  # torchrun's threads live on, and can abort an interpreter that winds up
