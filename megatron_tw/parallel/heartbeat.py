"""Ranks that die, or that make no progress, end the job, and a line names them.

    a thread of each rank, every few seconds
        beats: counts up a number in the store of the world
        looks: rank 0 at all numbers, the others at rank 0's; one that stands still is of a rank that is gone or stopped
        looks: at how long its own rank has been where `now_at` said last

A start takes its time: a rank that has not counted yet is waited for (START_SECONDS; it may read its libraries from a
cold disk), and how long one loads a checkpoint is not judged.

Who finds something writes it into the store, where the others read it; then all end. Collectives may never return from
a rank that is gone: NCCL's do not always, and launchers on several nodes do not tell each other.
"""

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_tw.config.errors import tell
from megatron_tw.parallel.contact import START, collective_of, now_at, place_of, progress, world_store
from megatron_tw.parallel.launcher import end_process

BEAT_SECONDS, GONE_SECONDS, START_SECONDS = 5.0, 40.0, 300.0
_NAMED = 8


@contextmanager
def watched(
    hang_minutes: float, *, beat_seconds: float = BEAT_SECONDS, gone_seconds: float = GONE_SECONDS
) -> Iterator[None]:
    """Around a run: end this process, with a line on one of the ranks, when a rank is gone or one has made no progress
    (`now_at`) for so long. Every rank of the world enters; each leaves by itself.

    hang_minutes: --hang-timeout-in-mins.
    """
    now_at(START)
    watch = _Watch(hang_minutes, beat_seconds, gone_seconds)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.over.set()  # its number stands still from now on: who waits for this rank ends as well
        if isinstance(error, RuntimeError) and watch.is_told():
            watch.join(gone_seconds)  # it may be the one that tells
            end_process()  # a collective with a rank that has told why it ends, and ended: there is no more to say
        raise
    watch.leave()


class _Watch(threading.Thread):
    """The thread of one rank."""

    def __init__(self, hang_minutes: float, beat_seconds: float, gone_seconds: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.over = threading.Event()
        self._hang_minutes, self._beat_seconds, self._gone_seconds = hang_minutes, beat_seconds, gone_seconds
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._store = world_store(own_connection=True)
        if hasattr(self._store, "clone"):  # else it is everybody's
            self._store.set_timeout(timedelta(seconds=gone_seconds))
        self._main = threading.get_ident()
        self._beats = 0
        self._store.set(f"beat/{self._rank}", "0")  # from now on it is missed
        self._seen: dict[int, tuple[bytes, float]] = {}
        """The last number of a rank, and when it was first seen, by this process's clock."""

    def leave(self) -> None:
        """The rank is done: it is not missed."""
        self.over.set()
        self.join()
        with suppress(RuntimeError):
            self._store.set(f"beat/{self._rank}", "done")

    def is_told(self) -> bool:
        """Whether a rank has found why the job ends."""
        with suppress(RuntimeError):
            return self._store.check(["verdict"])
        return False

    def run(self) -> None:
        answered = time.monotonic()
        while not self.over.wait(self._beat_seconds):
            try:
                self._beat()
                answered = time.monotonic()
            except RuntimeError as error:  # the store is gone, with the launcher or the rank that kept it, or slow
                if time.monotonic() - answered > self._gone_seconds and not self.over.is_set():
                    reason = str(error).partition("\n")[0][:100]
                    waited = f"for {self._gone_seconds:.0f} s ({reason})"
                    tell(f"error: the store of the ranks has not answered {waited}; the job ends")
                    end_process()

    def _beat(self) -> None:
        store = self._store
        if self.is_told():
            self._end_after_who_tells()
        self._beats += 1
        store.set(f"beat/{self._rank}", str(self._beats))
        if gone := self._gone():
            seconds = self._gone_seconds if self._seen[gone[0]][0] else START_SECONDS
            self._find(f"no sign of life for {seconds:.0f} s from {self._named(gone)}")
        place, since = progress()
        if place != START and time.monotonic() - since > 60 * self._hang_minutes:
            self._find(self._hanging(place))

    def _gone(self) -> list[int]:
        """The ranks that this one looks at and whose number stands still."""
        gone, now = [], time.monotonic()
        for rank in range(1, self._ranks) if self._rank == 0 else [0]:
            key = f"beat/{rank}"
            number = self._store.get(key) if self._store.check([key]) else b""
            if rank not in self._seen or self._seen[rank][0] != number:
                self._seen[rank] = number, now
            elif number != b"done" and now - self._seen[rank][1] > (self._gone_seconds if number else START_SECONDS):
                gone.append(rank)
        return gone

    def _hanging(self, place: str) -> str:
        """Who makes no progress: the ranks that do not say so themselves, else those that wait in no collective (on a
        GPU all wait for the device: those that stand elsewhere than most), else all."""
        store, until = self._store, time.monotonic() + 3 * self._beat_seconds
        self._say_where_it_stands()
        silent = set(range(self._ranks))
        while silent and time.monotonic() < until:
            silent = {rank for rank in silent if not store.check([f"stands/{rank}"])}
            time.sleep(self._beat_seconds / 10)
        stands = {r: store.get(f"stands/{r}").decode() for r in range(self._ranks) if r not in silent}
        busy = [rank for rank, where in stands.items() if not where.startswith("a collective: ")]
        if len(busy) == len(stands) > 2:
            most = Counter(stands.values()).most_common(1)[0][0]
            busy = [rank for rank in busy if stands[rank] != most]
        guilty = sorted(silent) or busy or sorted(stands)
        waits = next((where for rank, where in stands.items() if rank not in guilty), None)
        others = f"; the others wait in {waits.removeprefix('a collective: ')}" if waits else ""
        what = self._named(guilty, {rank: where.removeprefix("a collective: ") for rank, where in stands.items()})
        return f"no progress for {self._hang_minutes:g} minutes (--hang-timeout-in-mins) of {what}{others}"

    def _say_where_it_stands(self) -> None:
        frame = sys._current_frames().get(self._main)
        frames = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
        waits = any("/torch/distributed/" in entry.filename for entry in frames)
        where = f"a collective: {collective_of(frames)}" if waits else _innermost(frames)
        self._store.set(f"stands/{self._rank}", where)

    def _named(self, ranks: list[int], stands: dict[int, str] | None = None) -> str:
        said = []
        for rank in ranks[:_NAMED]:
            where = f", in {stands[rank]}" if stands and rank in stands else ""
            said.append(f"rank {rank} ({place_of(self._store, rank)}{where})")
        return ", ".join(said) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")

    def _find(self, verdict: str) -> None:
        if self.over.is_set():
            return
        if self._store.add("verdicts", 1) > 1:
            self._end_after_who_tells()
        self._store.set("verdict", verdict)
        tell(f"error: {verdict}; the job ends")
        end_process()

    def _end_after_who_tells(self) -> NoReturn:
        time.sleep(self._beat_seconds)  # the launcher ends the job at the first rank that leaves
        end_process()


def _innermost(frames: traceback.StackSummary) -> str:
    if not frames:
        return "unknown"
    frame = frames[-1]
    return f"{frame.name} ({'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno})"
