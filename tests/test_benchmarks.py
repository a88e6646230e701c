"""The benchmarks run at toy size, and what they rest on: the planted facts, the stopwatch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import long_range_recall
import numpy as np
import planted_facts
import pytest
import step

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *options: str) -> str:
    """What the script prints."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "benchmarks" / script), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_steps_parts_add_up(tmp_path: Path) -> None:
    file = tmp_path / "step.jsonl"
    sizes = "--hidden-size 64 --layers 1 --vocab-size 128 --seq-length 64 --short-window 16 --micro-batches 2"
    printed = run("step.py", *sizes.split(), "--repetitions", "5", "--ranks", "1", "--output", str(file))
    assert "TP 1 x PP 1 x CP 1 x DP 1" in printed
    figures = json.loads(file.read_text())
    assert figures["schemes"]["uniform"]["ratio"] == 1.0
    for name, scheme in figures["schemes"].items():
        parts = scheme["parts"]
        assert (parts["scoring"] > 0) == (name != "uniform")
        assert min(parts[part] for part in ("forward", "backward", "optimizer", "communication")) > 0, name
        # Steps of the same work, clocked and not, and each of a few milliseconds: only the magnitude is the same.
        assert 0.1 < sum(parts.values()) / scheme["step_seconds"] < 10, name


def test_time_within_a_part_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(step.time, "perf_counter", lambda: now)
    watch = step.Stopwatch()
    watch.running = True
    with watch.part("outer"):
        work(1.0)
        watch.timed("inner", work)(2.0)
        work(4.0)
    assert watch.seconds == {"outer": 5.0, "inner": 2.0}
    with watch.part("scoring"), watch.part("forward"):  # the scoring pass runs a forward pass, which is its own
        work(8.0)
    assert watch.seconds["scoring"] == 8.0
    assert "forward" not in watch.seconds


@pytest.mark.parametrize("seq_length", [32, 256])
def test_facts_are_planted_and_asked_for(seq_length: int) -> None:
    settings = long_range_recall.Settings()
    rows = settings.rows_of(seq_length, 200, seed=1, part=0)
    row, answer = rows.asked.T
    value_ids = rows.ids[row, answer]
    first_fact, values = planted_facts.FIRST_FACT, planted_facts.VALUES
    assert (value_ids == rows.ids[row, answer - rows.distance]).all(), "the answer stands in the row before"
    assert ((value_ids - first_fact) // values == rows.ids[row, answer - 1] - planted_facts.FIRST_QUESTION).all()
    counts = np.array([(rows.ids[r] == v).sum() for r, v in zip(row, value_ids, strict=True)])
    assert (counts == 2).all(), "and nowhere else"
    far = rows.distance > settings.context
    assert far.sum() == (0 if seq_length == settings.context else 200 * settings.facts)
    same = settings.rows_of(seq_length, 200, seed=1, part=0)
    other = settings.rows_of(seq_length, 200, seed=1, part=1)
    assert (rows.ids == same.ids).all()
    assert (rows.ids != other.ids).any()


@pytest.mark.full
def test_schemes_are_compared_from_one_base(tmp_path: Path) -> None:
    sizes = "--base-iters 3 --base-rows 4 --train-iters 2 --rows 2 --points 2 --held-out-rows 4 --seq-length 128"
    options = f"{sizes} --seeds 1 --schemes uniform sparse --processes 1 --output {tmp_path / 'out'}"
    printed = run("long_range_recall.py", *options.split())
    content = json.loads((tmp_path / "out" / "recall.json").read_text())
    measured = content["measured"]["1"]
    assert list(measured) == ["base", "uniform", "sparse"]
    assert [point["iteration"] for point in measured["sparse"]] == [0, 1, 2]
    uniform, sparse = measured["uniform"], measured["sparse"]
    for key in ("recall", "key_nll", "short_nll", "lm_loss"):
        assert uniform[0][key] == sparse[0][key]
    assert uniform[2]["key_nll"] != sparse[2]["key_nll"]
    assert uniform[2]["weight"] == 1.0
    assert "| sparse | 0." in printed
    assert (tmp_path / "out" / "recall.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "gain.png").stat().st_size > 10_000
