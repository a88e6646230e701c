"""Times of a plan, scaled by a measured run."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from megatron_tw.config import RunConfig, parse_options
from megatron_tw.model.architecture import Architecture, read_architecture
from megatron_tw.planning.formulas import flops_of_a_rank
from megatron_tw.planning.roofline import Cluster, phase_times
from megatron_tw.planning.sizes import Sizes
from megatron_tw.planning.traffic import collectives_of, elementwise_bytes
from megatron_tw.runtime.checkpoint import CONFIG_FILE
from megatron_tw.runtime.run_folder import find_checkpoint

FIRST_STEPS = 3
"""Of a run, that are left out where there are more: kernels are chosen and memory is mapped in them."""


def calibrated(cluster: Cluster, file: str, *, transformer_engine: bool) -> Cluster:
    """`cluster`, with estimated times scaled to those of the run whose metrics.jsonl this is; what the run was like,
    its newest checkpoint beside the file says.

    Raises:
        ValueError: no metrics, no checkpoint, one without options, or a run whose scorer is gone; names --calibrate.
    """
    path = Path(file)
    steps = _read_steps(path)
    checkpoint = find_checkpoint(path.parent, "--calibrate")
    if checkpoint is None or not (checkpoint.directory / CONFIG_FILE).is_file():
        raise ValueError(f"--calibrate {file}: expected a checkpoint of the run beside it, found none")
    config = parse_options([f"--config={checkpoint.directory / CONFIG_FILE}"], RunConfig)
    ranks = round(steps[-1]["world_size"])
    sizes = Sizes.of(config, checkpoint.architecture, ranks, _scorer_of(config, file))
    of_run = replace(cluster, world_size=ranks, scoring_scale=1.0, step_scale=1.0)
    times = phase_times(
        flops_of_a_rank(sizes),
        collectives_of(sizes),
        elementwise_bytes(sizes, transformer_engine=transformer_engine),
        sizes=sizes,
        cluster=of_run,
    )
    rest = sum(time.total for phase, time in times.items() if phase != "scoring")
    measured = steps[FIRST_STEPS:] or steps
    step_scale = median(step["step_seconds"] - step["scoring_seconds"] for step in measured) / rest
    scored = [step["scoring_seconds"] for step in measured if step["scoring_seconds"] > 0]
    scoring = times["scoring"].total
    return replace(
        cluster, step_scale=step_scale, scoring_scale=median(scored) / scoring if scored and scoring else step_scale
    )


def _scorer_of(config: RunConfig, file: str) -> Architecture | None:
    """The shape of the run's --scorer-hf, None without."""
    if config.scorer.scorer_hf is None:
        return None
    try:
        return read_architecture(config.scorer.scorer_hf)
    except ValueError as error:
        raise ValueError(f"--calibrate {file}: expected the run's --scorer-hf where it was: {error}") from error


def _read_steps(path: Path) -> list[dict[str, Any]]:
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"--calibrate {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"--calibrate {path}: expected a run's metrics.jsonl, got another file ({error})") from error
    names = ("step_seconds", "scoring_seconds", "world_size")
    if not steps or not all(isinstance(step, dict) and all(name in step for name in names) for step in steps):
        raise ValueError(f"--calibrate {path}: expected steps with {', '.join(names)} in each line")
    return steps
