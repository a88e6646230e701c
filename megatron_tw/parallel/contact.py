"""Ranks that stop answering: who they are, how far they came, and where the others wait for them.

Each rank keeps in the store of the world how far it is (`now_at`). When a collective fails, because its time is over
or because a rank is gone, every rank that sees it leaves a mark there; the ranks without one are those that hang. What
ends a job whose collectives do not fail is in heartbeat.py.
"""

import os
import re
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from megatron_tw.config.errors import FaultError

SECONDS_TO_ANSWER = 5.0
"""What a rank that saw the failure waits for the others that did."""
_LOST = re.compile(r"timed out waiting|timeout|connection closed by peer|connection reset by peer|broken pipe", re.I)
_TIME_OVER = re.compile(r"timed? ?out", re.I)
_HERE = Path(__file__).resolve().parents[2]
_NAMED = 8


START = "its start"
_progress = START, time.monotonic()


def now_at(place: str) -> None:
    """Say where this rank is, as "step 12": what others tell of it should it stop answering. Not collective."""
    global _progress
    _progress = place, time.monotonic()
    if dist.is_initialized():
        with suppress(RuntimeError):
            world_store().set(f"at/{dist.get_rank()}", f"{place} on {socket.gethostname()}")


def progress() -> tuple[str, float]:
    """Where this rank said it is, and since when (time.monotonic)."""
    return _progress


@contextmanager
def lost_ranks_named(timeout_minutes: float) -> Iterator[None]:
    """Around a program's work: turn the failure of a collective into one line, on the ranks that see it.

    timeout_minutes: --distributed-timeout-minutes, for the message.

    Raises:
        FaultError: names the collective, the ranks that did not answer, and where they were.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)) or not dist.is_initialized():
            raise
        waited = f" within {timeout_minutes:g} minutes (--distributed-timeout-minutes)"
        why = f"no answer{waited if _TIME_OVER.search(str(error)) else ': the connection was lost'}"
        where = collective_of(traceback.extract_tb(error.__traceback__))
        raise FaultError(f"{where}: {why}; {_missing()}") from error


def collective_of(frames: traceback.StackSummary) -> str:
    """The collective that failed, or still waits, and who called it, as "all_reduce (training/step.py:190)"; frames:
    the outermost first."""
    name, caller = "a collective", None
    for frame in frames:
        file = frame.filename.replace(os.sep, "/")
        if "/torch/distributed/" not in file and not file.endswith("/contextlib.py"):
            name, caller = frame.line or frame.name, frame
        elif (
            caller is not None and not name.isidentifier() and "/torch/distributed/" in file and frame.name != "wrapper"
        ):
            name = frame.name
    if not name.isidentifier():
        found = re.search(r"(\w+)\(", name)
        name = found[1] if found else "a collective"
    if caller is None:
        return name
    path = Path(caller.filename)
    if path.is_relative_to(_HERE) and "site-packages" not in path.parts:
        return f"{name} ({path.relative_to(_HERE)}:{caller.lineno})"
    return f"{name} ({'/'.join(path.parts[-3:])}:{caller.lineno})"


def _missing() -> str:
    """The ranks that left no mark, and where each of them was."""
    store, me, size = world_store(), dist.get_rank(), dist.get_world_size()
    silent = set(range(size)) - {me}
    try:
        store.set(f"lost/{me}", "")
        until = time.monotonic() + SECONDS_TO_ANSWER
        while silent and time.monotonic() < until:
            silent = {rank for rank in silent if not store.check([f"lost/{rank}"])}
            time.sleep(0.1)
        if not silent:
            return "every rank waits: they do not wait for the same collective"
        said = [f"rank {rank} ({place_of(store, rank)})" for rank in sorted(silent)[:_NAMED]]
        more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
        mine = place_of(store, me).rpartition(" on ")[0]
        return f"waited at {mine} for {', '.join(said)}{more}"
    except RuntimeError:  # the store is gone with the rank or the launcher that kept it
        return "the store of the ranks is gone too"


def place_of(store: dist.Store, rank: int) -> str:
    """Where a rank said it is, and its host."""
    key = f"at/{rank}"
    return store.get(key).decode() if store.check([key]) else f"at {START}"


def world_store(*, own_connection: bool = False) -> dist.Store:
    """The part of the world's store that ranks tell each other in where they are. own_connection: for a thread; the
    main thread may hold the usual one, and wait."""
    store = dist.distributed_c10d._get_default_store()
    if own_connection and hasattr(store, "clone"):  # not in the oldest PyTorch
        store = store.clone()
    return dist.PrefixStore("megatron_tw/contact", store)
