"""torchrun, but that a signal ends it without a traceback, and with the status that a shell would give it.

python tools/launch.py --nproc-per-node 4 tools/train.py OPTIONS
"""

import os
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.run import main


def leave_time_to_save() -> None:
    """Let ranks live TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds after a signal, which torch before 2.13 does not read; and
    30 where one of them has failed, though newer ones read it there too."""
    close, seconds = PContext.close, int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))

    def close_in_time(self: PContext, death_sig: Any = None, timeout: int = 30) -> None:
        close(self, death_sig, seconds if isinstance(sys.exception(), SignalException) else 30)

    PContext.close = close_in_time  # type: ignore[method-assign]


if __name__ == "__main__":
    leave_time_to_save()
    try:
        main()
    except SignalException as error:  # the ranks have ended by then
        sys.exit(128 + int(error.sigval))
