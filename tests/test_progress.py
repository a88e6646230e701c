"""How long work is shown: a bar on a terminal, also on one that says it has no size; lines in a log file."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron_tw.data import progress as module
from megatron_tw.data.progress import Progress

WORK = """
from megatron_tw.data.progress import Progress
with Progress("scoring", 3, "rows", show=True) as progress:
    for _ in range(3):
        progress.update()
"""


@pytest.mark.parametrize("columns", [0, 60, 120, 250])
def test_a_terminal_shows_a_bar(columns: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", columns // 3, columns, 0, 0))
    subprocess.run([sys.executable, "-c", WORK], stderr=theirs, check=True)
    os.set_blocking(ours, False)
    shown = ""
    with contextlib.suppress(BlockingIOError):  # all is read
        while part := os.read(ours, 4096).decode():
            shown += part
    os.close(theirs)
    os.close(ours)
    assert "scoring: 100%" in shown
    assert "3/3" in shown
    assert max(map(len, shown.strip().split("\r"))) <= (min(columns, 120) or 100)


def test_a_log_file_gets_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", WORK], stderr=log, check=True)
    assert (tmp_path / "log").read_bytes() == b"scoring: 3 of 3 rows in 00:00\n"


def test_lines_come_now_and_then_and_tell_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Progress("preparing", 4_000_000, "B", show=True, scale=True) as progress:
        for _ in range(4):
            clock[0] += 20
            progress.update(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "preparing: 2.00M of 4.00M B in 00:40, about 00:40 left",
        "preparing: 4.00M of 4.00M B in 01:20",
    ]


def test_what_was_done_before_took_no_time_of_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with contextlib.suppress(ValueError), Progress("preparing", 100, "rows", show=True, begun=80) as progress:
        clock[0] += 40
        progress.update(10)
        raise ValueError("cut off")
    assert capsys.readouterr().err.splitlines() == ["preparing: 90 of 100 rows in 00:40, about 00:40 left"]


def test_ranks_that_do_not_show_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scoring", 1, "rows", show=False) as progress:
        progress.update()
    assert capsys.readouterr().err == ""
