"""`bash tools/gpu_check.sh` at toy size: its parts run, a part that fails is told and the rest goes on."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_check
import host_waits
import layers as layers_benchmark
import loss as loss_benchmark
import plain_megatron
import psutil
import pytest
import torch
import torch.multiprocessing as mp
from test_kills import wait_for
from test_launch import ROOT, environment

from megatron_tw.parallel.devices import prepare_device
from megatron_tw.parallel.gpus import GPUS
from megatron_tw.planning.record import Moment, Simulation
from megatron_tw.planning.simulate import Job


@pytest.mark.parametrize("more", [[], pytest.param(["loss"], marks=pytest.mark.full)], ids=str)
def test_it_runs_on_a_cpu(more: list[str], tmp_path: Path) -> None:
    script = str(ROOT / "tools" / "benchmarks" / "gpu_check.py")
    only = ["environment", "attention", "layers", *more]
    done = subprocess.run(
        [sys.executable, script, "--toy", "--output", str(tmp_path), "--only", *only],
        env=environment(), capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, report
    assert "All parts passed" in report
    status = json.loads((tmp_path / "status.json").read_text())
    assert [name for name, part in status.items() if part["passed"]] == only
    assert f"| torch | {metadata.version('torch')} |" in report

    layers = json.loads((tmp_path / "layers.json").read_text())
    ours, plan = layers["ours"]["schemes"]["sparse"], layers["plan"]["sparse"]
    assert min(ours["seconds"], ours["scoring_seconds"], layers["Megatron-Core"]["seconds"], plan["flops"]) > 0
    assert ours["scoring_seconds"] < ours["seconds"]
    # The plan knows tensors; a process holds its libraries' working memory besides, at this size more than that.
    assert ours["peak_bytes"] > 0.9 * plan["peak_bytes"] > 10**6
    assert layers["ours"]["waits"]["in_a_micro_batch"] > 0
    assert "Layers: ours this project's own layers, Megatron-Core its local layers, the plan this project's" in report


def test_a_part_that_fails_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(name: str, code: str) -> gpu_check.Part:
        return gpu_check.Part(
            name=name, title=f"Part {name}", command=(sys.executable, "-c", code), minutes=0.5, shows=str.strip
        )

    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    made = [
        made_up("broken", "print('half a table'); raise SystemExit('no such GPU')"),
        replace(made_up("hangs", hanging), minutes=0.02),
        made_up("good", "print('a figure')"),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_check, "parts", lambda *args, **options: made)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--output", str(tmp_path)])
    assert ended.value.code == 1
    report = (tmp_path / "report.md").read_text()
    assert "FAILED: Part broken, Part hangs." in report
    for said in ("half a table", "no such GPU", "exit status 1", "not over after 0.02 minutes", "a figure"):
        assert said in report
    with pytest.raises(SystemExit, match="--only: expected some of broken, hangs, good, got other"):
        gpu_check.main(["--output", str(tmp_path), "--only", "other"])


LEAVES_A_RANK = """
import os, pathlib, signal, subprocess, sys, time
rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path("{folder}", "told").write_text("SIGTERM") and 0))
child = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True)
pathlib.Path("{folder}", "rank.part").write_text(str(child.pid))
os.replace(pathlib.Path("{folder}", "rank.part"), pathlib.Path("{folder}", "rank"))
time.sleep(600)
"""


def leaving_a_rank(folder: Path) -> gpu_check.Part:
    """A part like torchrun: its rank has a session of its own, and here it is deaf to SIGTERM."""
    command = (sys.executable, "-c", LEAVES_A_RANK.format(folder=folder))
    return gpu_check.Part(name="ranks", title="Part ranks", command=command, minutes=0.5, shows=None)


def is_gone(folder: Path) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(int((folder / "rank").read_text())).status() == psutil.STATUS_ZOMBIE
    return True


def test_ranks_in_groups_of_their_own_end_with_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU, whose memory they would keep; whoever started them is asked first."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 5.0)
    with (log := tmp_path / "log").open("w") as errors:
        process = subprocess.Popen(leaving_a_rank(tmp_path).command, stderr=errors, start_new_session=True)
    wait_for((tmp_path / "rank").exists, log)
    assert gpu_check.wait_and_end(process, 0.1) is None
    assert (tmp_path / "told").exists()
    assert process.returncode is not None
    assert is_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_part_too_and_what_is_known_is_written(number: signal.Signals, tmp_path: Path) -> None:
    program = """
import signal, sys
import gpu_check
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
def part(name, *command):
    return gpu_check.Part(name=name, title=f"Part {name}", command=command, minutes=5, shows=None)
gpu_check.GRACE_SECONDS = 5.0
gpu_check.parts = lambda *args, **options: [part("quick", "true"), part("ranks", *sys.argv[2:])]
gpu_check.main(["--output", sys.argv[1]])
"""
    command = [sys.executable, "-c", program, str(tmp_path), *leaving_a_rank(tmp_path).command]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools" / "benchmarks")])
    with (log := tmp_path / "log").open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, env=environment() | {"PYTHONPATH": paths})
    wait_for((tmp_path / "rank").exists, log)
    process.send_signal(number)
    process.wait(60)
    said = log.read_text()
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == f"stopped by {number.name}; {tmp_path / 'report.md'} has the parts so far"
    assert "Traceback" not in said
    assert is_gone(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| Part quick | passed |" in report
    assert "FAILED: Part ranks." in report
    assert "begun, not over" in report


def test_a_limit_for_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part under way is ended, the next one is named and not begun."""
    code = "import time; time.sleep(60)"
    made = [
        gpu_check.Part(name=name, title=name, command=(sys.executable, "-c", code), minutes=0.5, shows=None)
        for name in ("first", "second")
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda *args, **options: made)
    with pytest.raises(SystemExit):
        gpu_check.main(["--output", str(tmp_path), "--minutes", "0.005"])
    report = (tmp_path / "report.md").read_text()
    assert "FAILED: first, second." in report
    assert "not over after 0.00" in report
    assert "not begun, --minutes are over" in report


def test_the_shell_script_hands_its_options_on(tmp_path: Path) -> None:
    """A copy, beside which nothing is installed."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gpu_check.sh").write_text((ROOT / "tools" / "gpu_check.sh").read_text())
    (tools / "setup_env.sh").write_text("")
    (tools / "benchmarks").symlink_to(ROOT / "tools" / "benchmarks")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tools / "gpu_check.sh"), "--help"], env=environment() | {"PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for option in ("--output", "--only", "--minutes", "--toy"):
        assert option in done.stdout


def on_cpu(rank: int, *arguments: Any) -> None:
    """`measure_rank` of loss.py, on a machine with fewer GPUs than ranks too."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    loss_benchmark.measure_rank(rank, *arguments)


def test_the_loss_under_tp_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As a machine with several GPUs runs it, at toy size; the bounds are those of TP 1."""

    def spawn(function: Any, args: Any, nprocs: int) -> None:
        mp.start_processes(on_cpu, args, nprocs, start_method="forkserver")

    monkeypatch.setattr(loss_benchmark.mp, "spawn", spawn)
    shape = "--tokens 1024 --hidden 64 --vocab 4096 --dtype fp32 --kappa 1 0.2 --repetitions 1 --threads 1 --tp 2"
    loss_benchmark.main(["--llama3-8b", *shape.split(), "--output", str(tmp_path)])
    assert "bounds: of TP 1, which was not measured" in capsys.readouterr().out
    results = json.loads((tmp_path / "loss_benchmark.json").read_text())["results"]
    assert list(results) == ["2"]
    assert {row["candidate"] for row in results["2"]} == {"ours", "ours, logits kept", "Megatron-Core"}


LLAMA_WIDTH = partial(
    argparse.Namespace, shape="llama3-8b", bf16=True, ranks=1, micro_batches=1, schemes=["dense"], short_window=8192
)


def test_what_plain_megatron_holds_at_the_least() -> None:
    """By hand: 1.27e9 weights of 18 bytes; 131,072 x 128,256 logits of 2 + 4 bytes; 32 x 8,192 x 8,192 scores."""

    def least(tokens: int, number: int, *, recompute: bool = False, engine: bool = True) -> dict[str, float]:
        shape = layers_benchmark.architecture(LLAMA_WIDTH(layers=number, seq_length=tokens))
        found = plain_megatron.least_bytes(
            shape, tokens=tokens, bf16=True, tp_size=1, recompute=recompute, engine=engine
        )
        return {name: size / 1e9 for name, size in found.items() if size}

    weights = 18 * (218112000 + 2 * 128256 * 4096) / 1e9
    long = least(131072, 1, recompute=True)
    assert long == pytest.approx({"weights, gradients and optimizer": weights, "logits": 131072 * 128256 * 6 / 1e9})
    assert sum(long.values()) > GPUS["h100"].memory_bytes / 1e9
    assert sum(least(8192, 4).values()) < GPUS["h100"].memory_bytes / 1e9
    assert least(8192, 4, engine=False)["scores"] == pytest.approx(4 * 32 * 8192**2 * 6 / 1e9)
    assert "logits" not in least(131072, 1, recompute=True, engine=False)


@pytest.mark.parametrize("ends", ["not run", "failed", "both"])
def test_our_own_figures_stay_without_megatrons(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The scoring part of a GPU, on made-up figures of its processes."""
    scheme = {"seconds": 4.0, "scoring_seconds": 1.0, "peak_bytes": 40 * 2**30}
    own = {"layout": "TP 1", "layers": plain_megatron.ENGINES_LAYERS, "schemes": {"dense": scheme}}

    def process(program: str, options: Any) -> dict[str, Any]:
        if program == layers_benchmark.OURS:
            return own
        if ends == "failed":
            raise RuntimeError("Megatron-Core: ended with status 1\nOutOfMemoryError")
        return {"seconds": 2.0, "peak_bytes": 80 * 2**30, "layers": plain_megatron.ENGINES_LAYERS}

    def planned(*args: Any, **options: Any) -> dict[str, Any]:
        figures = {"peak_bytes": 50 * 2**30, "flops": 8e12, "seconds": 5.0}
        return {"dense": {**figures, "layers": "this project's own layers"}}

    monkeypatch.setattr(layers_benchmark, "in_own_process", process)
    monkeypatch.setattr(layers_benchmark, "plan", planned)
    monkeypatch.setattr(layers_benchmark, "takes_engine", lambda *, bf16: True)
    memory = GPUS["h100"].memory_bytes if ends == "not run" else None
    measured = layers_benchmark.plain_figures
    monkeypatch.setattr(layers_benchmark, "plain_figures", lambda options, _: measured(options, memory))
    command = ["--layers", "1", "--seq-length", "131072", "--short-window", "8192", "--micro-batches", "1", "--bf16"]
    command += ["--schemes", "dense", "--repetitions", "1", "--recompute", "--output", str(tmp_path / "figures.json")]
    if ends == "failed":
        with pytest.raises(SystemExit, match="OutOfMemoryError"):
            layers_benchmark.main(command)
    else:
        layers_benchmark.main(command)
    report = capsys.readouterr().out
    ratios = ("2.00", "0.50") if ends == "both" else ("", "")
    row = f"| dense | 4.000 | {ratios[0]} | 1.000 | 5.000 | 0.80 | 40.000 | {ratios[1]} | 50.000 | 0.800 | 2 |"
    assert row in report
    assert json.loads((tmp_path / "figures.json").read_text())["ours"] == own
    if ends == "not run":
        assert "Megatron-Core was not run: by formula it does not fit: at least 115.207 GiB" in report
    # Own layers were simulated, Transformer Engine's were measured.
    assert "ours layers of Transformer Engine" in report
    assert "so measured / plan compares two makes of layers" in report


def test_planned_seconds_take_the_rates_of_the_gpu() -> None:
    """By hand: a second of matrix products, a second of attention."""
    options = LLAMA_WIDTH(layers=1, seq_length=8192, recompute=False)
    job = Job(
        config=replace(layers_benchmark.run_config(options), weighting=layers_benchmark.SCHEMES["uniform"]),
        architecture=layers_benchmark.architecture(options), world_size=1, rank=0,
    )  # fmt: skip
    nothing = Moment(phase="forward", bytes_by_category={})

    def seconds(gemm: float, attention: float, *, engine: bool = False) -> float:
        flops = {"forward": {"gemm": gemm, "attention": attention}}
        simulation = Simulation(
            rank=0, place="", layers="", peak=nothing, peak_by_phase={}, timeline=[], flops=flops, collectives=[],
            saved_by_layer={}, seconds=0.0,
        )  # fmt: skip
        return layers_benchmark.planned_seconds(job, simulation, "h100", engine=engine)

    idle, h100 = seconds(0.0, 0.0), GPUS["h100"]
    assert seconds(h100.gemm_flops, 0.0) - idle == pytest.approx(1.0)
    assert seconds(0.0, h100.attention_flops) - idle == pytest.approx(1.0)
    assert seconds(0.0, h100.te_attention_flops, engine=True) - idle == pytest.approx(1.0)


def test_every_script_that_a_gpu_would_run_takes_its_options(tmp_path: Path) -> None:
    """Their parsers read the options; nothing is measured."""
    import bottom_right
    import checkpoint
    import layers
    import step

    names = Counter(part.name for part in gpu_check.parts(tmp_path, gpus=8, toy=False))
    assert set(names.values()) == {1}
    assert list(names)[:3] == ["environment", "loss-tests", "gpu-tests"]
    parsers = {
        "layers.py": layers.build_parser(), "step.py": step.build_parser(), "loss.py": loss_benchmark.build_parser(),
        "bottom_right.py": bottom_right.build_parser(), "checkpoint.py": checkpoint.build_parser(),
    }  # fmt: skip
    read = 0
    for part in gpu_check.parts(tmp_path, gpus=8, toy=False):
        _, script, *options = part.command
        if Path(script).name in parsers:
            parsers[Path(script).name].parse_args(options)
            read += 1
        for word in options:
            assert not word.startswith("tests/") or (ROOT / word).is_file(), word
    assert read == 10


def test_bounds_of_the_loss_are_told_by_name() -> None:
    def row(candidate: str, kappa: float, seconds: float, memory: float, share: float) -> dict[str, object]:
        times = {"seconds": seconds, "extra_bytes": memory, "share_of_floor": share}
        return {"candidate": candidate, "kappa": kappa, **times}

    base = row(loss_benchmark.MEGATRON, 1.0, 3.0, 1000.0, 0.9)
    good = [
        row(loss_benchmark.OURS, 1.0, 4.0, 50.0, 0.64), row(loss_benchmark.OURS, 0.2, 1.8, 40.0, 0.7),
        row(loss_benchmark.KEEPING, 1.0, 3.1, 900.0, 0.86),
    ]  # fmt: skip
    assert loss_benchmark.broken_bounds([base, *good]) == []
    bad = [
        row(loss_benchmark.OURS, 1.0, 4.0, 51.0, 0.63), row(loss_benchmark.OURS, 0.2, 1.81, 40.0, 0.7),
        row(loss_benchmark.KEEPING, 1.0, 3.1, 900.0, 0.84),
    ]  # fmt: skip
    assert len(loss_benchmark.broken_bounds([base, *bad])) == 4


def test_host_waits_are_counted_where_they_are() -> None:
    values = torch.arange(4)

    def work() -> None:
        values.sum().item()
        values[values > 1]
        values.add(1)

    waits = host_waits.host_waits(prepare_device(), work)
    assert waits.total == 2
    assert all(place.startswith("test_gpu_check.py:") for place in waits.places)
