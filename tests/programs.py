"""The seven programs, each run in a process forked from a server that has imported them all once: a run that ends
with a mistake takes a tenth of a second.

    with Programs() as programs:
        answer = programs.run("evaluate", ["--load", "run"], folder)    # in that folder, its files for temporary files
"""

import contextlib
import importlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {
    "train": "train",
    "preprocess": "preprocess_data",
    "score": "score_tokens",
    "evaluate": "evaluate",
    "convert": "convert_checkpoint",
    "report": "report",
    "verify": "preprocess_data",
    "plan": "plan",
}
LATER = [
    *("megatron_tw.training.loop", "megatron_tw.evaluation.program", "megatron_tw.evaluation.loss"),
    *("megatron_tw.programs.scoring", "megatron_tw.programs.convert", "megatron_tw.data.verify"),
    *("megatron_tw.planning.run", "megatron_tw.planning.table", "megatron_tw.planning.picture"),
    *("megatron.core.datasets.indexed_dataset", "pyarrow.parquet", "transformers.models.llama.modeling_llama"),
    *("torch.utils.tensorboard", "torch.distributed.checkpoint", "matplotlib.backends.backend_agg"),
]
"""Modules that the programs import when their options are in order."""
TIMEOUT_SECONDS = 60.0
BAR = re.compile(r"\w[\w ]*: +\d+(%\||\w+ \[)[^\]\r\n]*\]|[\w() ]+: [\w.,]+ of [\w.,]+ \w+ in \d\d:\d\d[^\n]*")
"""A progress bar, or a line of one in a log file."""


@dataclass(frozen=True)
class Answer:
    """How a program ended. status: None where it was still running at the end of its time."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float


def lines_of(answer: Answer) -> list[str]:
    """What was said on stderr, without progress bars."""
    return [line for line in re.split(r"[\r\n]", BAR.sub("", answer.stderr)) if line.strip()]


class Programs:
    """A server process, and what asks it. Several threads may ask at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="programs_")
        self._address = f"{self._folder.name}/socket"
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._server = subprocess.Popen(
            [sys.executable, __file__, self._address], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()
        self._folder.cleanup()

    def run(
        self,
        program: str,
        arguments: Sequence[str],
        folder: Path,
        *,
        timeout: float = TIMEOUT_SECONDS,
        file_bytes: int | None = None,
    ) -> Answer:
        """A program's answer to its arguments, in `folder`. file_bytes: a file that grows beyond that is a full disk's.

        What it writes to stdout and stderr, its libraries included, goes into files outside the folder."""
        with tempfile.TemporaryDirectory(prefix="answer_") as answer:
            with Client(self._address) as connection:
                connection.send((program, list(arguments), str(folder), answer, file_bytes, timeout))
                status, seconds = connection.recv()
            stdout, stderr = (Path(answer, name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Answer(status, stdout, stderr, seconds)


def serve(address: str) -> None:
    """Fork a process for each question that comes."""
    from megatron_tw.config.quiet import quiet_libraries

    quiet_libraries()  # as a program does before it imports them
    for module in [*(f"tools.{name}" for name in TOOLS.values()), *LATER]:
        importlib.import_module(module)
    import gc

    import torch

    for name in set(TOOLS.values()):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(f"tools.{name}").main(["--help"])  # makes the parser of its options, once
    torch.set_num_threads(1)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with Listener(address, backlog=16) as listener:
        print("ready", flush=True)
        while True:
            connection = listener.accept()
            if os.fork() == 0:
                _answer(connection)
            connection.close()


def _answer(connection: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    question = connection.recv()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        _run(*question[:-1])
    ends = threading.Timer(question[-1], os.killpg, (child, signal.SIGKILL))
    ends.start()
    _, status = os.waitpid(child, 0)
    late = not ends.is_alive()
    ends.cancel()
    connection.send((None if late else os.waitstatus_to_exitcode(status), time.monotonic() - begun))
    os._exit(0)


def _run(program: str, arguments: list[str], folder: str, answer: str, file_bytes: int | None) -> None:
    """In a process of its own: the program, to its end."""
    os.setpgid(0, 0)
    os.chdir(folder)
    temporary = Path(folder, ".tmp")
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{answer}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    status: Any = 1
    try:
        status = importlib.import_module(f"tools.{TOOLS[program]}").main(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    sys.path.remove(str(ROOT / "tests"))  # of this script; PYTHONPATH names it behind the project's own
    serve(sys.argv[1])
