"""`bash tools/gpu_check.sh` at toy size: its parts run, a part that fails is told and the rest goes on."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gpu_check
import host_waits
import loss as loss_benchmark
import pytest
import torch
from test_launch import ROOT, environment

from megatron_tw.parallel.devices import prepare_device


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
    assert f"| torch | {torch.__version__} |" in report

    layers = json.loads((tmp_path / "layers.json").read_text())
    ours, plan = layers["ours"]["schemes"]["sparse"], layers["plan"]["sparse"]
    assert min(ours["seconds"], ours["scoring_seconds"], layers["Megatron-Core"]["seconds"], plan["flops"]) > 0
    assert ours["scoring_seconds"] < ours["seconds"]
    # The plan knows tensors; a process holds its libraries' working memory besides, at this size more than that.
    assert ours["peak_bytes"] > 0.9 * plan["peak_bytes"] > 10**6
    assert layers["ours"]["waits"]["in_a_micro_batch"] > 0
    assert "times Megatron-Core (its local layers)" in report


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
