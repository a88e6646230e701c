"""Simulations side by side, each in a fresh process of its own.

The processes are forked from a server that has imported everything once and done nothing else: an import of torch and
Megatron-Core takes about as long as a simulation.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_tw.planning.record import Simulation
from megatron_tw.planning.simulate import Job, simulate

_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Of the processes: no GPU, and no threads beside the other processes."""
_IMPORTED = (
    "torch.testing._internal.distributed.fake_pg",
    "transformers.modeling_rope_utils",
    "megatron.core.optimizer",
)
"""What a simulation imports late."""


def simulate_all(
    jobs: Sequence[Job], *, processes: int = 2, progress: Callable[[int, int], object] = lambda done, jobs: None
) -> list[Simulation]:
    """`simulate` of each job, in their order.

    processes: that run at a time, about 0.5 GB each. progress: called with the number of jobs done, and of all.

    Raises:
        ValueError: as `simulate` does, with the job before it; the others are ended.
        RuntimeError: a process died.
    """
    assert processes > 0
    results: dict[int, Simulation] = {}
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                index, job = waiting.pop()
                connection, process = _start(job)
                running[connection] = index, process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                index, process = running.pop(ready)
                results[index] = _result(ready, process, jobs[index])
                progress(len(results), len(jobs))
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return [results[index] for index in range(len(jobs))]


def in_words(job: Job) -> str:
    """Which job, for errors."""
    parallel = job.config.parallel
    return (
        f"rank {job.rank} of {job.world_size} (TP {parallel.tensor_model_parallel_size} x PP "
        f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size}, rows of "
        f"{job.config.data.seq_length} tokens)"
    )


def _start(job: Job) -> tuple[Connection, Any]:
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *_IMPORTED])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, job), daemon=True)
    with _environment():
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _environment() -> Iterator[None]:
    """The processes' environment, which they take from this one when they start."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _answer(connection: Connection, job: Job) -> None:
    """In the process: the simulation, or the error. What it would print is of no interest."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    answer: tuple[str, Any]
    try:
        answer = "result", simulate(job).to_json()
    except ValueError as error:
        answer = "refused", str(error)
    except Exception as error:
        import traceback

        answer = "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    connection.send(answer)
    connection.close()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # nothing to say goodbye to: the process group is fake


def _result(connection: Connection, process: Any, job: Job) -> Simulation:
    try:
        kind, content = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{in_words(job)}: its process ended with status {process.exitcode} (out of memory?)"
        ) from None
    finally:
        connection.close()
    process.join()
    if kind == "refused":
        raise ValueError(f"{in_words(job)}: {content}")
    if kind == "failed":
        raise RuntimeError(f"{in_words(job)}: {content}")
    return Simulation.from_json(content)
