"""A rank that hangs or dies is named, with its step and the collective in which the others wait for it."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_tw.config.errors import FaultError
from megatron_tw.parallel.contact import lost_ranks_named, now_at

SECONDS = 2


def sum_of_ranks() -> None:
    dist.all_reduce(torch.zeros(1), group=_impatient())


def barrier() -> None:
    dist.barrier(group=_impatient())


def objects() -> None:
    dist.broadcast_object_list([dist.get_rank()], src=0, group=_impatient())


_groups: list[dist.ProcessGroup] = []


def _impatient() -> dist.ProcessGroup:
    return _groups[-1]


def wait_for_rank_2(collective: str) -> str:
    """On a rank: a collective that rank 2 does not come to in time. What the others are told."""
    _groups.append(dist.new_group(timeout=timedelta(seconds=SECONDS)))
    dist.barrier()
    now_at("step 7" if dist.get_rank() != 2 else "the checkpoint of step 6")
    if dist.get_rank() == 2:
        time.sleep(SECONDS + 6)
        return ""
    with pytest.raises(FaultError) as caught, lost_ranks_named(SECONDS / 60):
        {"all_reduce": sum_of_ranks, "barrier": barrier, "broadcast_object_list": objects}[collective]()
    return str(caught.value)


@pytest.mark.parametrize("collective", ["all_reduce", pytest.param("broadcast_object_list", marks=pytest.mark.full)])
def test_the_rank_that_hangs_is_named(ranks, collective):
    first, second, _ = ranks(3).run(wait_for_rank_2, collective)
    for told in (first, second):
        assert told.startswith(f"{collective} (tests/test_contact.py:"), told
        assert "waited at step 7 for rank 2 (the checkpoint of step 6 on " in told
    # The second whose time is over may find that the first has left.
    assert "no answer within 0.0333333 minutes (--distributed-timeout-minutes)" in first + second


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks_named(1):
        raise RuntimeError("shapes do not fit")
    assert "RANK" not in os.environ or not dist.is_initialized()
