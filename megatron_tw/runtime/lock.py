"""One run at a time in a folder, on storage that several hosts share: a lock that a dead run does not leave held.

    FOLDER/run.lock   who holds the folder: token, host, process, since when; there while a run is at work

The file is created by O_CREAT|O_EXCL, which is atomic on network storage too. Its holder, rank 0, touches it every
BEAT_SECONDS. Who finds it there asks:

    process of this machine, alive     in use: an error at once
    process of this machine, dead      taken over at once
    process of another machine         watched: touched within STALE_SECONDS, it is in use; else it is taken over

No clocks are compared, because those of two hosts, or of a host and its storage, may differ: the watcher sees by its
own clock that the file stays as it is. Time in which the storage itself hangs does not count.

A run that was given up for dead may come back (a suspended machine, a storage that answers again). It finds another
token in the file, or no file where the other run has ended too, and ends before it writes again: `check` before
whatever counts, and the thread that touches the file.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch.distributed as dist

from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.launcher import end_process

LOCK_FILE = "run.lock"
BEAT_SECONDS, STALE_SECONDS = 5.0, 45.0
"""Less than a minute, the shortest --distributed-timeout-minutes: the other ranks wait in a collective."""
_SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    machine: names the host since it was started, and the space of its process numbers (a container has its own); empty
    where neither can be had. ticks: when the process began, by the clock that counts from the machine's start, which
    nobody sets.
    """

    token: str
    host: str
    machine: str
    pid: int
    ticks: int
    since: str

    @staticmethod
    def this_process() -> "Holder":
        """A new holder."""
        return Holder(
            token=uuid.uuid4().hex,
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            ticks=_ticks_at_start(os.getpid()) or 0,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_alive(self) -> bool | None:
        """Whether the process lives; None for one of another machine."""
        if not self.machine or self.machine != _machine():
            return None
        ticks = _ticks_at_start(self.pid)
        return ticks is not None and ticks == self.ticks


class FolderLock:
    """A folder for one run. Used by one process of it.

    Args:
        folder: where the file lies; made if it is not there.
        what: the option and its value, for messages.
        on_lost: called by the thread when another run has taken the folder; ends this process.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.path = folder / LOCK_FILE
        self.what = what
        self.holder = Holder.this_process()
        self._beat_seconds = beat_seconds
        self._stale_seconds = stale_seconds
        self._on_lost = on_lost or _end_process
        self._made: list[Path] = []
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock of {folder}", daemon=True)

    def acquire(self) -> None:
        """Take the folder, waiting for the holder's death where only time can tell.

        Raises:
            ValueError: a run that lives holds the folder.
            OSError: the folder cannot be made or written to.
        """
        try:
            self._make_folder()
            if not self._create():
                self._wait()
        except OSError as error:
            self._remove_folders()
            where = f" ({error.filename})" if error.filename is not None else ""
            raise OSError(f"{self.what}: cannot be written to: {error.strerror}{where}") from error
        self._thread.start()

    def check(self) -> None:
        """Ask the file, before something is written that counts.

        Raises:
            ValueError: another run has taken the folder, or somebody has removed the file.
        """
        if lost := self._lost():
            raise ValueError(lost)

    def release(self) -> None:
        """Give the folder back, and remove it where it was made here and nothing is in it."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # gone with its folder, or storage that fails: it then goes stale
            found = self._read()
            if found is not None and found[1] is not None and found[1].token == self.holder.token:
                self.path.unlink()
        self._remove_folders()

    def _make_folder(self) -> None:
        folder = self.path.parent
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):  # the first that holds something
            for path in self._made:
                path.rmdir()

    def _create(self) -> bool:
        """Create the file with this holder in it; False where there is one."""
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(file, "w") as stream:
                stream.write(json.dumps(asdict(self.holder)) + "\n")
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> tuple[int, Holder | None] | None:
        """When the file was touched (ns) and by whom: None where there is no file, or one that is not whole. Opening it
        makes network storage look anew."""
        try:
            with self.path.open() as stream:
                text, touched = stream.read(), os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            return touched, Holder(**json.loads(text))
        except (ValueError, TypeError):
            return touched, None

    def _wait(self) -> None:
        """Wait until the folder is ours."""
        first, still, last_look = None, 0.0, time.monotonic()
        poll = self._beat_seconds / 5
        while True:
            found = self._read()
            if found is None:  # released in the meantime
                if self._create():
                    return
                continue
            holder = found[1]
            alive = holder.is_alive() if holder is not None else None
            if alive or (first is not None and found != first):
                raise ValueError(f"{self.what}: in use by another run, {holder}")
            now = time.monotonic()
            still += min(now - last_look, 2 * poll)
            last_look = now
            if alive is False or still >= self._stale_seconds:
                self._take_over(found)
                return
            if first is None:
                first, still = found, 0.0
                _say(f"{self.what}: waiting up to {self._stale_seconds:.0f} s for a sign of life of {holder}")
            time.sleep(poll)

    def _take_over(self, found: tuple[int, Holder | None]) -> None:
        """Put this holder in the place of one that is dead. Of several that do so, the last one has it."""
        _say(f"{self.what}: taken over from a run that is dead, {found[1] or 'unknown'}")
        own = self.path.with_name(f"{LOCK_FILE}.{self.holder.token}")
        own.write_text(json.dumps(asdict(self.holder)) + "\n")
        if self._read() != found:
            own.unlink()
            raise ValueError(f"{self.what}: in use by another run that took it at the same time")
        own.replace(self.path)
        time.sleep(_SETTLE_SECONDS)
        self.check()

    def _beat(self) -> None:
        while not self._released.wait(self._beat_seconds):
            try:
                if not self.path.parent.exists():  # storage that is not there, such as a path that is mounted again
                    continue
                if lost := self._lost():
                    self._on_lost(lost)
                    return
                os.utime(self.path)
            except OSError:  # storage that does not answer now may answer at the next beat
                continue

    def _lost(self) -> str | None:
        """How the folder was lost, in words; None while it is ours. A file that is gone was another run's, which has
        ended."""
        found = self._read()
        if found is None:
            return f"{self.what}: {self.path.name} is gone, so another run had the folder; this one writes nothing more"
        if found[1] is not None and found[1].token != self.holder.token:
            return f"{self.what}: taken over by another run, {found[1]}; this one writes nothing more"
        return None


@contextmanager
def hold_folder(folder: Path, what: str) -> Iterator[FolderLock | None]:
    """Hold a folder within the block; the lock on rank 0, None on the others. Collective over the world.

    Raises:
        ValueError, OSError: as FolderLock.acquire, on every rank.
    """
    lock, error = None, None
    if dist.get_rank() == 0:
        lock = FolderLock(folder, what)
        try:
            lock.acquire()
        except (OSError, ValueError) as refused:
            error, lock = refused, None
    raise_together(error)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _ticks_at_start(pid: int) -> int | None:
    """When a process of this machine began, as Linux counts (proc_pid_stat(5)); None where it is dead or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()  # behind its name
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _end_process(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
    end_process()


def _say(text: str) -> None:
    print(text, flush=True)
