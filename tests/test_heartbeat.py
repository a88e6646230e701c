"""A rank that is stopped, and one that makes no progress, end the other; one line names it."""

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from test_launch import ROOT, environment
from torch.distributed import TCPStore

SECONDS = 60


@contextlib.contextmanager
def two_ranks(how: str) -> Iterator[list[subprocess.Popen[str]]]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps it: outside the ranks
    variables = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "heartbeat_rank.py"), how],
            env=environment(**variables, RANK=str(number)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()


def test_a_rank_that_starts_late_is_waited_for():
    with two_ranks("late") as ranks:
        assert [(process.communicate(timeout=SECONDS)[0], process.returncode) for process in ranks] == 2 * [("", 0)]


@pytest.mark.parametrize("how", ["stopped", "hangs", pytest.param("killed", marks=pytest.mark.full)])
def test_a_rank_that_stops_ends_the_other_and_is_named(how):
    with two_ranks(how) as ranks:
        said = ranks[0].communicate(timeout=SECONDS)[0]
        assert ranks[0].returncode == 1
    said += ranks[1].communicate()[0]  # where it hangs, either may be the one that tells
    at = rf"rank 1 \(step 7 on {re.escape(socket.gethostname())}"
    if how == "hangs":
        place = rf"{at}, in read_rows \(tests/heartbeat_rank\.py:\d+\)\)"
        others = r"the others wait in barrier \(tests/heartbeat_rank\.py:\d+\)"
        expected = (
            rf"error: no progress for 0\.05 minutes \(--hang-timeout-in-mins\) of {place}; {others}; the job ends\n"
        )
    else:
        expected = rf"error: no sign of life for 2 s from {at}\); the job ends\n"
    assert re.fullmatch(expected, said), said
