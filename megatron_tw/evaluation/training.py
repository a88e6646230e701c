"""The metrics.jsonl of training runs, and the options they were run with."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The steps of a run, oldest first, from the folder that was its --save.

    Raises:
        ValueError: no metrics there, or a line that is no JSON object with an `iteration`.
    """
    file = Path(folder) / METRICS_FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected the --save folder of a training run")
    steps = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            step = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON: {error}") from error
        if not isinstance(step, dict) or "iteration" not in step:
            raise ValueError(f"{file}, line {number}: expected an object with an iteration, got {line[:80]}")
        steps.append(step)
    if not steps:
        raise ValueError(f"{file} is empty: the run made no step")
    return steps


def read_options(folder: str | Path) -> str | None:
    """The resolved options (YAML) of the run's newest checkpoint, None if it has none."""
    files = sorted(Path(folder).glob("iter_*/config.yaml"))
    return files[-1].read_text(encoding="utf-8") if files else None
