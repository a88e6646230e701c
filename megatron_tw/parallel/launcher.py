"""A rank ends with its launcher: torchrun, killed alone, leaves its ranks running in sessions of their own."""

import os
import sys
import threading
import time

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
    os._exit(1)  # the main thread may wait in a collective
