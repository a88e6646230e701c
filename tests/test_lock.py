"""One run at a time in a folder: who finds the lock held, waits for it, takes it over, and notices that it was lost."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from megatron_tw.runtime import lock as lock_module
from megatron_tw.runtime.lock import LOCK_FILE, FolderLock, Holder

BEAT, STALE = 0.05, 0.6
WHAT = "--save run"


def lock_of(folder: Path, **changes) -> FolderLock:
    return FolderLock(folder, WHAT, beat_seconds=BEAT, stale_seconds=STALE, **changes)


def held_by(folder: Path, **changes) -> Holder:
    """Put another holder's file into the folder."""
    holder = replace(Holder.this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def token_in(folder: Path) -> str:
    return json.loads((folder / LOCK_FILE).read_text())["token"]


def test_a_live_run_is_named(tmp_path):
    first = lock_of(tmp_path / "run")
    first.acquire()
    with pytest.raises(ValueError, match=rf"--save run: in use by another run, process {os.getpid()} on .*, since 20"):
        lock_of(tmp_path / "run").acquire()
    first.release()
    assert not (tmp_path / "run").exists()  # made here, and nothing is in it
    second = lock_of(tmp_path / "run")
    second.acquire()
    second.release()


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("how", ["gone", "number used again", "zombie"])
def test_a_dead_run_of_this_machine_is_followed_at_once(how, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ticks = lock_module._ticks_at_start(child.pid)
    child.kill()
    if how == "gone":
        child.wait()
        held_by(tmp_path, pid=child.pid, ticks=ticks)
    elif how == "number used again":
        held_by(tmp_path, ticks=1)
    else:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        held_by(tmp_path, pid=child.pid, ticks=ticks)
    lock = FolderLock(tmp_path, WHAT, stale_seconds=1000)
    lock.acquire()
    assert token_in(tmp_path) == lock.holder.token
    lock.release()
    child.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_live_run_is_known_whatever_the_clock_was_set_to(tmp_path, monkeypatch):
    holder = held_by(tmp_path)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 1e9)  # what wall-clock times of processes count from
    with pytest.raises(ValueError, match="in use by another run"):
        lock_of(tmp_path).acquire()
    assert token_in(tmp_path) == holder.token


@pytest.mark.parametrize("text", [None, "", '{"token": 1}'], ids=["whole", "empty", "damaged"])
def test_a_run_of_another_machine_is_followed_when_it_gives_no_sign_of_life(text, tmp_path, capsys):
    held_by(tmp_path, machine="another", host="node7", pid=12)
    if text is not None:
        (tmp_path / LOCK_FILE).write_text(text)
    os.utime(tmp_path / LOCK_FILE, (4e9, 4e9))  # its clock may show anything
    lock, begun = lock_of(tmp_path), time.monotonic()
    lock.acquire()
    assert time.monotonic() - begun >= STALE
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "--save run: waiting up to 1 s for a sign of life of " in said[0]
    assert text is not None or "process 12 on node7" in said[0]
    assert token_in(tmp_path) == lock.holder.token
    lock.release()


def test_a_run_of_another_machine_that_gives_a_sign_of_life_is_named(tmp_path):
    holder = held_by(tmp_path, machine="another", host="node7")
    threading.Timer(STALE / 2, lambda: os.utime(tmp_path / LOCK_FILE)).start()
    with pytest.raises(ValueError, match=r"in use by another run, process .* on node7"):
        lock_of(tmp_path).acquire()
    assert token_in(tmp_path) == holder.token


def test_a_folder_that_is_given_back_meanwhile(tmp_path):
    held_by(tmp_path, machine="another")
    threading.Timer(STALE / 2, (tmp_path / LOCK_FILE).unlink).start()
    lock = lock_of(tmp_path)
    lock.acquire()
    assert token_in(tmp_path) == lock.holder.token
    lock.release()


def test_of_several_that_follow_a_dead_run_one_has_the_folder(tmp_path):
    held_by(tmp_path, pid=dead_process())
    locks = [lock_of(tmp_path, on_lost=lambda text: None) for _ in range(8)]
    outcomes: list[str] = []

    def take(lock: FolderLock) -> None:
        try:
            lock.acquire()
            lock.check()
            outcomes.append(lock.holder.token)
        except ValueError:
            pass

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [token_in(tmp_path)]
    for lock in locks:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_given_up_finds_out_before_it_writes(tmp_path):
    told: list[str] = []
    lock = lock_of(tmp_path, on_lost=told.append)
    lock.acquire()
    lock.check()
    other = held_by(tmp_path, host="node8")
    with pytest.raises(ValueError, match=r"taken over by another run, process .* on node8"):
        lock.check()
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(BEAT)
    assert "node8" in told[0]
    lock.release()
    assert token_in(tmp_path) == other.token  # not its to remove


def test_storage_that_is_away_for_a_while_is_no_other_run(tmp_path):
    told: list[str] = []
    folder = tmp_path / "run"
    lock = lock_of(folder, on_lost=told.append)
    lock.acquire()
    folder.rename(tmp_path / "away")
    time.sleep(5 * BEAT)
    with pytest.raises(ValueError, match=r"run\.lock is gone"):  # but nothing is written there
        lock.check()
    (tmp_path / "away").rename(folder)
    time.sleep(3 * BEAT)
    assert not told
    lock.check()
    lock.release()


def test_it_gives_signs_of_life_until_its_file_is_gone(tmp_path):
    """The run that took the folder has ended too."""
    told: list[str] = []
    lock = lock_of(tmp_path, on_lost=told.append)
    lock.acquire()
    before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
    time.sleep(6 * BEAT)
    assert (tmp_path / LOCK_FILE).stat().st_mtime_ns > before
    assert not told
    (tmp_path / LOCK_FILE).unlink()
    with pytest.raises(ValueError, match=r"run\.lock is gone"):
        lock.check()
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(BEAT)
    assert "is gone" in told[0]
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^--save run: cannot be written to: Not a directory \(.*file"):
        lock_of(tmp_path / "file" / "a" / "run").acquire()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
