"""The quickstart itself, shortened: the same script, with smaller sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "quickstart.sh"
MODELS = ["base", "uniform", "dense", "sparse"]
STAGES = 16


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


@needs_environment
def test_the_whole_job_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = quickstart("--short", "--output", str(output), timeout=900)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"

    report = json.loads((output / "report" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == MODELS
    assert report["seq_length"] == 4 * report["old_context"]
    for model in report["models"]:
        assert 3.0 < model["all"]["nll"] < 6.0  # log(512) = 6.24 is what knows nothing
        assert f"{model['all']['nll']:.4f}" in run.stdout
    assert '<svg class="figure"' in (output / "report" / "report.html").read_text()
    for name in MODELS:
        steps = [json.loads(line) for line in (output / "train" / name / "run" / "metrics.jsonl").open()]
        assert (sum(step["weight_std"] for step in steps) > 0) == (name in ("dense", "sparse"))

    config = json.loads((output / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == report["seq_length"]
    assert "the logits agree" in run.stdout

    # One stage is taken back, with what an interruption may leave; only that one is run again.
    (output / "done" / "model").unlink()
    (output / "model" / "model.safetensors").write_bytes(b"")
    again = quickstart("--short", "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == STAGES - 1
    assert "the logits agree" in again.stdout

    other = quickstart("--output", str(output))
    assert other.returncode == 2
    assert f"--output {output}: holds a run of the other length" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--fast"], "--fast: expected --output DIR"), (["--output"], "--output: expected a folder")],
)
def test_bad_options_are_refused(options: list[str], message: str) -> None:
    run = quickstart(*options)
    assert run.returncode == 2
    assert message in run.stderr
