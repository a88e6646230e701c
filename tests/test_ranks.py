import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool, RankTracebackError


def describe_rank(value):
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    with open(f"/proc/{os.getppid()}/status") as status:
        server_threads = next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
    environment = tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return total, environment, torch.get_num_threads(), server_threads


def what_of_gpus():
    return os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.is_available(), torch.cuda.device_count()


def raise_on(failing_ranks):
    if dist.get_rank() in failing_ranks:
        raise ValueError(f"rank {dist.get_rank()} is not happy")
    dist.barrier()


class UntransportableError(Exception):
    def __init__(self, a, b):
        super().__init__("odd one")


def raise_untransportable():
    raise UntransportableError(1, 2)


def die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def sleep_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
def test_results_come_by_rank_from_real_ranks(ranks):
    results = ranks(2).run(describe_rank, 10)
    assert [result[0] for result in results] == [21, 21]
    assert [result[1] for result in results] == [(0, 2, 0), (1, 2, 1)]
    assert [result[2] for result in results] == [1, 1]
    assert {result[3] for result in results} == {1}, "the fork server must not have threads: forking them is undefined"


def test_ranks_see_no_gpu(ranks):
    """Of which a machine may have fewer than ranks; their device is told by LOCAL_RANK."""
    assert ranks(2).run(what_of_gpus) == [("", False, 0)] * 2


def test_exception_on_every_rank_is_raised_and_the_pool_lives_on(ranks):
    pool = ranks(2)
    with pytest.raises(ValueError, match=r"rank . is not happy") as caught:
        pool.run(raise_on, (0, 1))
    assert isinstance(caught.value.__cause__, RankTracebackError)
    assert "in raise_on" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="UntransportableError: odd one"):
        pool.run(raise_untransportable)
    pool.run(raise_on, ())
    assert ranks(2) is pool


def test_exception_on_one_rank_is_raised_and_a_new_pool_replaces_this_one(ranks):
    pool = ranks(2)
    with pytest.raises(ValueError, match="rank 1 is not happy"):
        pool.run(raise_on, (1,))
    assert pool.closed
    assert ranks(2) is not pool
    ranks(2).run(raise_on, ())


def test_a_rank_that_dies_is_named(ranks):
    pool = ranks(2)
    with pytest.raises(RuntimeError, match=r"die_on: ranks \[1\] died; ranks that did not answer: \[1\] of 2"):
        pool.run(die_on, 1)
    assert pool.closed


def test_a_rank_that_hangs_is_named():
    pool = RankPool(2, timeout_seconds=3)
    with pytest.raises(RuntimeError, match=r"no answer within 3 s; ranks that did not answer: \[0\] of 2"):
        pool.run(sleep_on, 0)
    assert pool.closed
