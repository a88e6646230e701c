"""torchrun, but that a signal ends it without a traceback, and with the status that a shell would give it.

python tools/launch.py --nproc-per-node 4 tools/train.py OPTIONS
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as error:  # the ranks have ended by then
        sys.exit(128 + int(error.sigval))
