"""A rank for test_heartbeat.py: `heartbeat_rank.py HOW`. Rank 1 stops in step 7, in the way that is named; "late": it
starts late, and does not stop."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_tw.parallel.contact import now_at
from megatron_tw.parallel.heartbeat import watched

BEAT_SECONDS, GONE_SECONDS, HANG_MINUTES = 0.1, 2.0, 0.05


def read_rows() -> None:
    time.sleep(600)


def main(how: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    if how == "late" and dist.get_rank() == 1:
        time.sleep(3 * GONE_SECONDS)
    minutes = HANG_MINUTES if how == "hangs" else 60
    with watched(minutes, beat_seconds=BEAT_SECONDS, gone_seconds=GONE_SECONDS):
        dist.barrier()
        now_at("step 7")
        if dist.get_rank() == 1 and how != "late":
            if how == "hangs":
                read_rows()
            os.kill(os.getpid(), {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}[how])
        if how == "killed":  # a collective would fail at once under gloo, but need not under NCCL
            time.sleep(600)
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
