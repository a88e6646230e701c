"""Fixtures for all tests. The tests folder is no package: its modules import each other by plain name."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that are made from here
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from programs import Programs
from ranks import RankPool, share_fork_server

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which any test may do
share_fork_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end one process would wait for it."""
    items.sort(key=lambda item: "test_the_whole_job_runs" not in item.nodeid)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of numbers measured with the method's public reference implementation (see its README.md)."""
    return Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(world_size)`: a running RankPool. One pool is kept at a time, because a rank holds up to 0.5 GB."""
    pools: dict[int, RankPool] = {}

    def close_others(world_size: int | None) -> None:
        for size in [size for size, pool in pools.items() if size != world_size or pool.closed]:
            pools.pop(size).close()

    def get(world_size: int) -> RankPool:
        close_others(world_size)
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield get
    close_others(None)


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """The seven programs, imported once."""
    with Programs() as server:
        yield server
