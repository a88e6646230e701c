"""The metrics.jsonl of training runs, and the options they were run with."""

import json
from pathlib import Path
from typing import Any

from megatron_tw.runtime.checksums import damage_of

METRICS_FILE = "metrics.jsonl"
NEEDED = ("iteration", "weighted_loss", "lm_loss")
"""Of every step."""


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The steps of a run, oldest first, from the folder that was its --save; without those that were skipped and whose
    loss was no number.

    Raises:
        ValueError: no metrics there, or a line that is no step: an object of numbers, of the step after the one before.
    """
    file = Path(folder) / METRICS_FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected the --save folder of a training run")
    steps: list[dict[str, Any]] = []
    for number, line in enumerate(read_text("--runs", file).splitlines(), start=1):
        try:
            step = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON: {error}") from error
        if isinstance(step, dict) and _is_number(step.get("iteration")) and step.get("lm_loss", ...) is None:
            continue
        if not isinstance(step, dict) or any(not _is_number(step.get(name)) for name in NEEDED):
            raise ValueError(f"{file}, line {number}: expected an object with {', '.join(NEEDED)}, got {line[:80]}")
        for name, value in step.items():
            if not (value is None or _is_number(value) or isinstance(value, list)):
                raise ValueError(f"{file}, line {number}: {name}: expected a number, got {json.dumps(value)[:80]}")
        if steps and step["iteration"] <= steps[-1]["iteration"]:
            raise ValueError(f"{file}, line {number}: step {step['iteration']} after step {steps[-1]['iteration']}")
        steps.append(step)
    if not steps:
        raise ValueError(f"{file} is empty: the run made no step")
    return steps


def read_options(folder: str | Path) -> str | None:
    """The resolved options (YAML) of the run's newest checkpoint, None if it has none.

    Raises:
        ValueError: they are not what was written.
    """
    files = sorted(Path(folder).glob("iter_*/config.yaml"))
    if not files:
        return None
    problem = damage_of(files[-1])
    if problem is not None:
        raise ValueError(f"--runs: {files[-1]} {problem}")
    return read_text("--runs", files[-1])


def read_text(option: str, file: Path) -> str:
    """A text file that `option` names. Raises ValueError where it is none, or cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option}: {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: {file}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}"
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
