"""A rank ends with its launcher: torchrun, killed alone, leaves its ranks running in sessions of their own."""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

import psutil

CHECK_SECONDS = 1.0
_watching = False


def end_with_launcher() -> None:
    """Under torchrun, watch for the launcher's death in a thread, and end this process then. Elsewhere, and in a
    process that watches already, nothing: a program that a shell started may well outlive it.

    A thread and not Linux's PR_SET_PDEATHSIG, which fires when the *thread* that made the process ends.
    """
    global _watching
    if _watching or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    _watching = True
    threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(CHECK_SECONDS)
    if os.environ.get("RANK", "0") == "0":
        print("error: the launcher was killed: its ranks end", file=sys.stderr, flush=True)
    end_process()


def end_with(parent: int) -> None:
    """End this process, which `parent` started, when that is gone; seen in a thread."""
    threading.Thread(target=_end_after, args=(parent,), name="parent", daemon=True).start()


def end_process() -> NoReturn:
    """End this process at once, and before it what it started: the writers of a checkpoint would go on. Its main thread
    may wait in a collective with ranks that are gone."""
    _kill_children(psutil.Process())
    os._exit(1)


def kill_with_children(number: int) -> None:
    """Kill a process and all that it started, if it is there."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        _kill_children(process)
        process.kill()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_SECONDS)
    end_process()


def _kill_children(process: psutil.Process) -> None:
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
