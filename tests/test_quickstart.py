"""The quickstart itself, shortened: the same script, with smaller sizes and one weighting scheme."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_tw.data.rows import TokenRows
from tools import draw_heat_map

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "quickstart.sh"
MODELS = ["base", "sparse"]
STAGES = 14


def quickstart(*options: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix  # the interpreter of the tests is the one to use
    return subprocess.run(
        ["bash", str(SCRIPT), *options], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


needs_environment = pytest.mark.skipif(
    sys.prefix != sys.base_prefix and not (Path(sys.prefix) / ".megatron_tw").is_file(),
    reason="the quickstart would first install into this virtual environment: source tools/setup_env.sh",
)


def test_its_ranks_see_no_gpu() -> None:
    """Which may be fewer than ranks: hidden before the first command that computes."""
    lines = SCRIPT.read_text().splitlines()
    hidden = next(index for index, line in enumerate(lines) if line.startswith("export CUDA_VISIBLE_DEVICES= "))
    assert hidden < next(index for index, line in enumerate(lines) if line.lstrip().startswith("stage "))
    assert sum("CUDA_VISIBLE_DEVICES" in line for line in lines) == 1


@needs_environment
def test_the_whole_job_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = quickstart("--short", "--output", str(output), timeout=900)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"

    report = json.loads((output / "report" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == MODELS
    assert report["seq_length"] == 4 * report["old_context"]
    for model in report["models"]:
        assert 4.0 < model["all"]["nll"] < 6.5  # log(1024) = 6.93 is what knows nothing
        assert f"{model['all']['nll']:.4f}" in run.stdout
    for name in MODELS:
        steps = [json.loads(line) for line in (output / "train" / name / "run" / "metrics.jsonl").open()]
        assert (sum(step["weight_std"] for step in steps) > 0) == (name == "sparse")
    check_answers(output)

    config = json.loads((output / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == report["seq_length"]
    assert "the logits agree" in run.stdout

    drawing = tmp_path / "heat_map.png"
    rows, evaluation = (str(output / name) for name in ("rows/heldout", "evaluation/sparse"))
    draw_heat_map.main(
        ["--evaluation", evaluation, "--rows", rows, "--row=3", "--spans=70:90", "--output", str(drawing)]
    )
    assert len(np.unique(imread(drawing).reshape(-1, 4), axis=0)) > 10  # colours

    # One stage is taken back, with what an interruption may leave; only that one is run again.
    file = output / "documents" / "long.jsonl"
    documents = file.read_bytes()
    (output / "done" / "documents").unlink()
    file.write_bytes(documents[:1000])
    again = quickstart("--short", "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == again.stdout.count("== ") - 1 >= STAGES - 1
    assert file.read_bytes() == documents

    other = quickstart("--output", str(output))
    assert other.returncode == 2
    assert f"--output {output}: holds a run of another length or seed" in other.stderr


def check_answers(output: Path) -> None:
    """The answers that were found in the rows' tokens are those that stand in the documents' text."""
    rows = TokenRows(output / "rows" / "heldout")
    with np.load(output / "answers.npz") as answers:
        row_A, position_A, distance_A = (answers[name] for name in ("row", "position", "distance"))
    assert (distance_A > 64).sum() >= 3 * len(rows)  # 4 far facts a row, of which the row's end may cut one
    for row, position, distance in zip(row_A, position_A, distance_A, strict=True):
        assert rows[row][position] == rows[row][position - distance]
    for row, line in enumerate((output / "documents" / "heldout.jsonl").open()):
        text = json.loads(line)["text"]
        asked = [
            match for match in re.finditer(r"^([a-z]+): ([A-Z][a-z]+\1)$", text, re.MULTILINE | re.IGNORECASE)
            if re.search(rf"^import {match[2]}$", text[: match.start()], re.MULTILINE)
        ]  # fmt: skip
        assert len(asked) == 8
        assert len(asked) - 1 <= (row_A == row).sum() <= len(asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fast"], "--fast: expected --output DIR"),
        (["--output"], "--output: expected a folder"),
        (["--seed", "x"], "--seed: expected a whole number"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str) -> None:
    run = quickstart(*options)
    assert run.returncode == 2
    assert message in run.stderr
