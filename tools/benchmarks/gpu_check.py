"""The parts of `bash tools/gpu_check.sh`, one after the other, each in a process of its own, and their report.

The order is that of what to know first: compiler and headers; the loss and its kernels; training, stop and resume,
export; attention; host waits, time and memory of a few layers of Llama-3-8B's width; the loss at that width; scoring of
a row of 128k tokens; a checkpoint of a billion parameters.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = Path(__file__).resolve().parent
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "apex", "flash-attn", "transformers", "numpy"),
    *("cut-cross-entropy", "liger-kernel"),
)
TAIL_LINES = 25
LOOK_SECONDS = 5.0
"""Between two looks at what a part has started."""
GRACE_SECONDS = 40.0
"""For a part to end by itself: torchrun gives its ranks 30."""
Results = dict[str, tuple["Part", bool, float, str]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part: a command that prints its figures, or a test run. minutes: after which it is ended.

    shows: the part of its output that goes into the report; None: none where it passes.
    """

    name: str
    title: str
    command: tuple[str, ...]
    minutes: float
    shows: Callable[[str], str] | None


def parts(folder: Path, *, gpus: int, toy: bool) -> list[Part]:
    """What is run, in order, for this many GPUs; `toy`: what a CPU does in a minute."""

    def tests(name: str, title: str, *selection: str, minutes: float = 4) -> Part:
        command = (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--tb=short", *selection)
        return Part(name=name, title=title, command=command, minutes=minutes, shows=_last_lines_of_tests)

    def benchmark(name: str, title: str, script: str, *options: str, minutes: float = 3) -> Part:
        output = folder / f"{name}.json" if script != "loss.py" else folder / name
        given = ("--output", str(output)) if script != "checkpoint.py" else ()
        command = (sys.executable, str(BENCHMARKS / script), *options, *given)
        return Part(name=name, title=title, command=command, minutes=minutes, shows=_figures)

    environment = Part(
        name="environment",
        title="Versions, compiler, headers",
        command=(sys.executable, __file__, "--describe"),
        minutes=2,
        shows=str.strip,
    )
    if toy:
        layers = "--shape toy --layers 1 --seq-length 128 --repetitions 1 --schemes sparse"
        attention = "--keys 256 --heads 4 --groups 2 --head-size 16"
        loss = "--tokens 256 --hidden 32 --vocab 512 --tp 1 --kappa 1 0.2 --repetitions 1"
        return [
            environment,
            tests("loss-tests", "Loss: tests", "tests/test_losses_cost.py", "-k", "keeps or saved"),
            benchmark("attention", "Bottom-right attention", "bottom_right.py", *attention.split()),
            benchmark("layers", "A layer beside Megatron-Core and the plan", "layers.py", *layers.split(), minutes=9),
            benchmark("loss", "The loss", "loss.py", *loss.split(), minutes=9),
        ]
    step = (
        "--hidden-size 4096 --layers 2 --vocab-size 32768 --seq-length 4096 --short-window 1024 --bf16 --repetitions 3"
    )
    scoring = "--layers 1 --seq-length 131072 --short-window 8192 --micro-batches 1 --schemes dense --repetitions 1"
    checkpoint = "--hidden-size 2048 --layers 16 --vocab-size 65536 --repetitions 1"
    full_loss = "--llama3-8b --tokens 8192 --repetitions 3"
    listed = [
        environment,
        tests(
            "loss-tests", "Loss and Triton kernels: tests",
            "tests/test_losses.py", "tests/test_losses_gpu.py", "tests/test_losses_tiles.py",
        ),
        tests(
            "gpu-tests", "Training on GPUs: tests (bf16, resume, export, scoring, recompute, kept logits)",
            "tests/test_gpu.py", minutes=10,
        ),
        benchmark("attention", "Bottom-right attention: kernel and memory", "bottom_right.py"),
        benchmark("layers", "4 layers of Llama-3-8B's width, beside Megatron-Core and the plan", "layers.py",
                  minutes=6),
        benchmark("step", "What weighting costs", "step.py", *step.split(), "--ranks", "1"),
        benchmark("loss", "The loss at Llama-3-8B's shape, 8,192 tokens", "loss.py", *full_loss.split()),
        benchmark("tiles", "The loss over chunk and tile sizes", "loss.py", *full_loss.split(), "--sweep",
                  "--kappa", "1", "0.2"),
        benchmark("scoring", "A row of 131,072 tokens, one layer, scored", "layers.py", *scoring.split(),
                  "--recompute"),
        benchmark("checkpoint", "A checkpoint of a billion parameters", "checkpoint.py", *checkpoint.split(),
                  minutes=5),
    ]  # fmt: skip
    if gpus > 1:
        tp = str(min(8, 2 ** (gpus.bit_length() - 1)))
        listed += [
            benchmark("layers-tp", f"The same layers under TP {tp}", "layers.py", "--ranks", tp, minutes=6),
            benchmark("step-tp", f"What weighting costs under TP {tp}", "step.py", *step.split(), "--ranks", tp),
            benchmark("loss-tp", f"The loss under TP {tp}", "loss.py", *full_loss.split(), "--tp", tp),
        ]
    return listed


# ---- parts' output ----


def _last_lines_of_tests(output: str) -> str:
    """What pytest counted, and why it skipped."""
    lines = output.strip().splitlines()
    return "\n".join(
        f"- {line}" for line in lines if line.startswith("SKIPPED") or re.match(r"=*\s*\d+ \w+.* in ", line)
    )


def _figures(output: str) -> str:
    """Tables in Markdown as they are, others as they were printed."""
    text = "\n".join(line for line in output.strip().splitlines() if not line.startswith("wrote "))
    return text if re.search(r"^\| ---", text, re.MULTILINE) else f"```\n{text}\n```"


# ---- the environment, in a process of its own ----


def describe() -> str:
    """Versions, GPUs, compiler and headers in Markdown, and a PROBLEM where a GPU lacks what its kernels need."""
    import torch

    lines = ["| | |", "| --- | --- |", f"| python | {platform.python_version()} |"]
    for package in PACKAGES:
        try:
            lines.append(f"| {package} | {importlib.metadata.version(package)} |")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"| {package} | not installed |")
    from loss import processor

    lines += [f"| processor | {processor()} |", f"| CUDA of PyTorch | {torch.version.cuda or 'none'} |"]
    problems = []
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        lines += [
            f"| GPUs | {torch.cuda.device_count()} |",
            f"| memory, of it free | {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB |",
            f"| cuDNN, NCCL | {torch.backends.cudnn.version()}, {nccl} |",
            f"| TF32 by default: matmul | {torch.backends.cuda.matmul.allow_tf32} |",
            f"| TF32 by default: cuDNN | {torch.backends.cudnn.allow_tf32} |",
        ]
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    lines += [
        f"| C compiler | {compiler or 'none'} |",
        f"| Python headers | {'found' if header.exists() else 'none'} |",
    ]
    for variable in (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "NVTE_FLASH_ATTN",
        "NVIDIA_TF32_OVERRIDE",
    ):
        lines.append(f"| {variable} | {os.environ.get(variable, 'not set')} |")
    if torch.cuda.is_available():
        problems = [
            f"no {what}: Triton's kernels cannot be built"
            for what, there in (("C compiler", compiler), ("Python headers", header.exists()))
            if not there
        ]
        if not problems:
            problems = _try_kernel()
    return "\n".join([*lines, *(f"\nPROBLEM: {problem}" for problem in problems)])


def _try_kernel() -> list[str]:
    """Whether a Triton kernel of the loss builds and runs."""
    import torch

    from megatron_tw.losses.logit_tiles import tile_operations

    operations = tile_operations(torch.device("cuda"), torch.float32)
    if "triton" not in getattr(operations, "__name__", ""):
        return ["the loss takes its plain path: Triton is not there, or does not build"]
    tile = torch.zeros(4, 64, device="cuda")
    label, zeros = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.zeros(4, device="cuda")
    maximum, total = torch.full_like(zeros, -torch.inf), torch.zeros_like(zeros)
    operations.add_statistics_(tile, label, zeros, maximum, total, keep=False)
    return [] if bool((total == 64).all()) else ["Triton's kernel gives wrong numbers"]


# ---- running ----


def run_part(part: Part, folder: Path, minutes_left: float = math.inf) -> tuple[bool, float, str]:
    """Whether it passed, its seconds, and what the report says of it. minutes_left: of the whole run."""
    started = time.perf_counter()
    minutes = min(part.minutes, minutes_left)
    if minutes <= 0:
        return False, 0.0, "FAILED: not begun, --minutes are over"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    log = folder / f"{part.name}.log"
    # A file, not a pipe, which whoever outlives the part would keep open.
    with log.open("w") as errors, tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=printed, stderr=errors, start_new_session=True
        )
        status = wait_and_end(process, 60 * minutes)
        printed.seek(0)
        output = printed.read()
    why = f"exit status {status}" if status else ""
    if status is None:
        why = f"not over after {minutes:.2g} minutes"
    if "PROBLEM: " in output:
        why = why or "see PROBLEM below"
    said = part.shows(output) if part.shows is not None else ""
    if why:
        # Progress bars write over their own line.
        lines = [line.rsplit("\r", 1)[-1] for line in (log.read_text() + output).splitlines() if line.strip()]
        said += f"\n\nFAILED: {why}\n\n```\n" + "\n".join(lines[-TAIL_LINES:]) + "\n```"
    with log.open("a") as file:
        file.write(output)
    return not why, time.perf_counter() - started, said.strip()


def wait_and_end(process: subprocess.Popen[Any], seconds: float) -> int | None:
    """The exit status of a process that leads a group, None where it is not over after `seconds`. Whatever it started
    is ended then, and on KeyboardInterrupt too."""
    end, started = time.monotonic() + seconds, set[psutil.Process]()
    try:
        while (left := end - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(left, LOOK_SECONDS))
            started |= _started_by(process.pid)
        return None
    finally:
        _end(process, started | _started_by(process.pid))


def _end(process: subprocess.Popen[Any], started: set[psutil.Process]) -> None:
    """End a process, its group and what it started, by SIGTERM first: torchrun then ends its ranks, which have groups
    of their own. A second Ctrl-C ends the waiting."""
    try:
        _signal_group(process.pid, signal.SIGTERM)
        _wait(process, started)
    finally:
        started |= {child for parent in filter(_runs, started) for child in _started_by(parent.pid)}
        _signal_group(process.pid, signal.SIGKILL)
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.kill()  # unless its number is another's by now
        _wait(process, started)


def _wait(process: subprocess.Popen[Any], started: set[psutil.Process]) -> None:
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end and (process.poll() is None or any(map(_runs, started))):
        time.sleep(0.1)


def _started_by(number: int) -> set[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return set(psutil.Process(number).children(recursive=True))
    return set()


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)


def report(results: Results) -> str:
    failed = [part.title for part, passed, *_ in results.values() if not passed]
    lines = [
        "# What a machine with GPUs showed",
        "",
        f"`bash tools/gpu_check.sh`, commit {_commit()}, {time.strftime('%Y-%m-%d')}. "
        + (f"FAILED: {', '.join(failed)}." if failed else "All parts passed."),
        "",
        "| part | | seconds |",
        "| --- | --- | --- |",
        *(
            f"| {part.title} | {'passed' if passed else 'FAILED'} | {seconds:.0f} |"
            for part, passed, seconds, _ in results.values()
        ),
    ]
    for part, _, _, said in results.values():
        command = " ".join(
            Path(word).name if word == sys.executable else word.replace(f"{ROOT}/", "") for word in part.command
        )
        lines += ["", f"## {part.title}", "", f"    {command}", "", said]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu_check", metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="for all parts together (default: each has a limit of its own)"
    )
    parser.add_argument("--toy", action="store_true", help="few parts at toy size; so it is where there is no GPU")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.describe:
        print(describe())
        return
    import torch

    gpus = torch.cuda.device_count()
    options.output.mkdir(parents=True, exist_ok=True)
    listed = parts(options.output.absolute(), gpus=gpus, toy=options.toy or gpus == 0)
    unknown = set(options.only or ()) - {part.name for part in listed}
    if unknown:
        names = ", ".join(part.name for part in listed)
        sys.exit(f"error: --only: expected some of {names}, got {', '.join(sorted(unknown))}")
    chosen = [part for part in listed if options.only is None or part.name in options.only]
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        results = run_parts(chosen, options.output, options.minutes)
    except KeyboardInterrupt as stopped:
        number = signal.Signals(stopped.args[0] if stopped.args else signal.SIGINT)
        print(f"\nstopped by {number.name}; {options.output / 'report.md'} has the parts so far", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = [part.title for part, passed, *_ in results.values() if not passed]
    said = f"FAILED: {', '.join(failed)}" if failed else "all parts passed"
    print(f"wrote {options.output / 'report.md'}; {said}")
    sys.exit(1 if failed else 0)


def run_parts(chosen: Sequence[Part], folder: Path, minutes: float) -> Results:
    """Run them in order, with report.md and status.json of those so far at any moment: a machine may be taken away."""
    results: Results = {}
    end = time.perf_counter() + 60 * minutes
    with tqdm(chosen, unit="part") as bar:
        for part in bar:
            bar.set_description(part.title)
            results[part.name] = (part, False, 0.0, "FAILED: begun, not over")
            write_results(results, folder)
            results[part.name] = (part, *run_part(part, folder, (end - time.perf_counter()) / 60))
            write_results(results, folder)
    return results


def write_results(results: Results, folder: Path) -> None:
    (folder / "report.md").write_text(report(results))
    status = {name: {"passed": passed, "seconds": seconds} for name, (_, passed, seconds, _) in results.items()}
    (folder / "status.json").write_text(json.dumps(status, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
