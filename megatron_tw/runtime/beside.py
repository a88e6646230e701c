"""Files of a checkpoint that are written beside the training, by a process of each rank.

    the rank     copies what lies on the GPU, forks -> trains on -> asks all ranks whether they are done -> finishes
    the process  writes the files -> makes their checksums -> leaves results and checksums in a temporary file

The forked process sees the host's memory as it was, whatever the training does to its own; but for what is pinned, as
copies from a GPU are: that memory is shared, so the rank holds the copies until the process is done with them.
"""

import os
import pickle
import queue
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_tw.parallel.launcher import end_with, kill_with_children
from megatron_tw.runtime.checksums import Entry, entries_of

_NICE = 10
"""By how much the processes that write beside the training yield to it."""


class WriterBeside:
    """A process that writes a rank's files of a checkpoint, from what they are to hold now, and makes their checksums.
    Megatron-Core's, but for what the two tell each other: there a queue, which takes a third process.

    request: what there is to do, by dist_checkpointing.save.
    """

    def __init__(self, request: AsyncRequest, folder: Path) -> None:
        self._calls = AsyncCallsQueue()
        self._results = None
        self._copies: Any = None
        if (preload := request.preload_fn) is not None:

            def preload_and_hold() -> Any:
                self._copies = preload()
                return self._copies

            request = request._replace(preload_fn=preload_and_hold)
        if request.async_fn is not None:  # else this rank has nothing to write
            self._results, self._answer = request.async_fn_args[2], tempfile.TemporaryFile()  # noqa: SIM115
            write = partial(_write_beside, request.async_fn, folder, os.getpid(), self._answer)
            request = request._replace(async_fn=write)
        self._calls.schedule_async_request(request)

    def is_done(self) -> bool:
        """Whether those of all ranks are. Collective over the world."""
        [call] = self._calls.async_calls
        return bool(call.async_caller.is_current_async_call_done())

    def finish(self) -> dict[str, Entry]:
        """Wait for all ranks' and write what the files have in common. The checksums of this rank's files, as far as
        they could be made. Collective over the world.

        Raises:
            CheckpointException: a file could not be written.
        """
        [call] = self._calls.async_calls
        call.async_caller.is_current_async_call_done(blocking=True)
        digests: dict[str, Entry] = {}
        if self._results is not None:
            try:
                self._answer.seek(0)
                results, digests = pickle.load(self._answer)
            except (EOFError, pickle.UnpicklingError):
                results = OSError(f"the process that wrote the files of rank {dist.get_rank()} was killed")
            self._results.put(results)
        self._calls.maybe_finalize_async_calls(blocking=True)
        self._copies = None
        return digests

    def abandon(self) -> None:
        """End the process."""
        for call in self._calls.async_calls:
            if call.async_caller.process is not None:
                kill_with_children(call.async_caller.process.pid)
                call.async_caller.process.join()


def _write_beside(
    write: Callable[[int, Any, Any], None],
    folder: Path,
    trainer: int,
    answer: BinaryIO,
    rank: int,
    buckets: Any,
    results: queue.SimpleQueue[Any],
) -> None:
    """In a process of its own: write a rank's files, then Megatron-Core's results and their checksums into `answer`. It
    ends with the rank, for which alone signals are meant, and yields the processors to it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with(trainer)
    os.nice(_NICE)
    write(rank, buckets, results)
    digests: dict[str, Entry] = {}
    with suppress(OSError):  # the rank, which then has to make them, will meet the same and tell it
        digests = entries_of(folder, [path.name for path in folder.glob(f"__{rank}_*.distcp")])
    pickle.dump((results.get(), digests), answer)
    answer.flush()
