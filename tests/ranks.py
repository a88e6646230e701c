"""Real gloo ranks for tests: one process per rank, forked from a server that has imported torch and Megatron-Core once.

Use the `ranks` fixture (conftest.py):

    def sum_of_ranks(value):                      # top level of the test module: the ranks import it by name
        total = torch.tensor(float(value + dist.get_rank()))
        dist.all_reduce(total)
        return total

    def test_sum(ranks):
        assert ranks(2).run(sum_of_ranks, 10) == [21.0, 21.0]

A rank lives across `run` calls and keeps its default process group, so whatever a test builds on it (Megatron's groups,
patches), that test takes down.
"""

import contextlib
import gc
import importlib
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import active_children, forkserver, get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

TESTS_DIR = str(Path(__file__).resolve().parent)
TIMEOUT_SECONDS = 180.0
GRACE_SECONDS = 5.0  # what the other ranks get to answer, once one rank has failed
# Imported once, in the fork server; a name that is not installed is skipped. Inert: no process groups, no threads.
PRELOAD = [
    "numpy",
    "pytest",
    "torch",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.training.training",  # in the wheels from 0.17 on
    "megatron_tw.training.loop",
    "megatron_tw.evaluation.program",
    "megatron_tw.programs.scoring",
    "megatron_tw.programs.convert",
    "megatron_tw.planning.processes",
    "torch.testing._internal.distributed.fake_pg",
]


def share_fork_server() -> None:
    """One server forks the ranks, the planner's simulations and the runs that are killed: whoever comes first, it has
    imported what they all need."""
    server: Any = vars(forkserver)["_forkserver"]
    server.set_forkserver_preload(PRELOAD)
    server.set_forkserver_preload = lambda modules_names: None


class RankTracebackError(Exception):
    """The traceback of an exception on a rank, shown in the parent as the cause of the same exception."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


class RankPool:
    """`world_size` processes with a gloo default process group (rendezvous by file) that call functions of tests."""

    def __init__(self, world_size: int, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        context = get_context("forkserver")
        self.world_size = world_size
        self.closed = False
        self._timeout_seconds = timeout_seconds
        self._store_dir = tempfile.mkdtemp(prefix="ranks_")
        self._conns: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # Not daemons: a checkpoint writer forks children of its own.
            args = (rank, world_size, f"{self._store_dir}/store", timeout_seconds, theirs)
            process = context.Process(target=_serve, args=args, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._conns.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable, /, *args: Any, **kwargs: Any) -> list:
        """Calls `fn(*args, **kwargs)` on every rank and returns the results by rank.

        `fn` is a top-level function of an importable module; arguments and results are pickled. An exception on a rank
        is raised here, with the rank's traceback as its cause. The pool survives only if no rank or every rank raised:
        else the ranks may disagree about which collective comes next.

        Raises:
            RuntimeError: a rank died, or did not answer in time; the pool is killed.
        """
        assert not self.closed, "this pool was killed by an earlier failure: ask the `ranks` fixture for a new one"
        request = pickle.dumps((fn.__module__, fn.__qualname__, args, kwargs))
        dead: list[int] = []
        for rank, conn in enumerate(self._conns):
            try:
                conn.send_bytes(request)
            except OSError:
                dead.append(rank)
        results: dict[int, Any] = {}
        errors: dict[int, tuple[Exception, str]] = {}
        deadline = time.monotonic() + self._timeout_seconds
        while silent := [rank for rank in range(self.world_size) if rank not in (*results, *errors, *dead)]:
            if dead or errors:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            ready = wait([self._conns[rank] for rank in silent], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (rank for rank in silent if self._conns[rank] in ready):
                try:
                    error, value = pickle.loads(self._conns[rank].recv_bytes())
                except (EOFError, OSError):
                    dead.append(rank)
                    continue
                if error is None:
                    results[rank] = value
                else:
                    errors[rank] = (error, value)
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        if len(errors) < self.world_size:
            self.close()
        if errors:
            rank, (error, text) = next(iter(errors.items()))  # the first to fail; the others often fail because of it
            unheard = f"; no answer from ranks {silent + dead}" if silent + dead else ""
            raise error from RankTracebackError(f"on rank {rank} of {self.world_size}{unheard}\n{text}")
        what = f"ranks {dead} died" if dead else f"no answer within {self._timeout_seconds:.0f} s"
        unheard = f"ranks that did not answer: {sorted(silent + dead)} of {self.world_size}"
        raise RuntimeError(f"{fn.__qualname__}: {what}; {unheard}")

    def close(self) -> None:
        """Ends the ranks, by force if need be. Closing twice is fine."""
        if self.closed:
            return
        self.closed = True
        for conn in self._conns:
            conn.close()  # an idle rank ends by itself when its pipe closes
        deadline = time.monotonic() + 1.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself at any moment
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
                process.join()
        shutil.rmtree(self._store_dir, ignore_errors=True)


def _serve(rank: int, world_size: int, store_file: str, timeout_seconds: float, conn: Connection) -> None:
    """What a rank does until the parent closes its end of the pipe."""
    if TESTS_DIR not in sys.path:
        sys.path.insert(0, TESTS_DIR)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CPU ranks, also where there are GPUs, which may be fewer
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    torch.set_num_threads(1)
    store = dist.FileStore(store_file, world_size)
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    while True:
        try:
            request = conn.recv_bytes()
        except EOFError:
            for child in active_children():  # the helper process of Megatron's checkpoint writer
                child.terminate()
            os._exit(0)  # no farewell: it would wait for the other ranks
        conn.send_bytes(_answer(request))


def _answer(request: bytes) -> bytes:
    """Pickled (None, result) or (exception, traceback as text)."""
    try:
        module, qualname, args, kwargs = pickle.loads(request)
        function = getattr(importlib.import_module(module), qualname)
        torch.manual_seed(0)  # a test must not depend on those that ran before it
        gc.freeze()  # what is imported stays: a collection of all of it takes a second, and many tests ask for one
        result = function(*args, **kwargs)
        return pickle.dumps((None, result))
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(reply := pickle.dumps((error, text)))
        except Exception:
            reply = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
        return reply
