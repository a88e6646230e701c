"""Where a run writes its numbers: SAVE/metrics.jsonl, TensorBoard, W&B, a progress bar or lines of text; on rank 0."""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tw.data.files import write_synced
from megatron_tw.data.progress import bar_options
from megatron_tw.runtime.wandb_run import is_offline

STEPS_OF_PACE = 20
"""Over which the remaining time is told."""


class MetricsLog:
    """One JSON object a step in `metrics.jsonl`, the same numbers in TensorBoard and W&B, a progress bar on the
    terminal. Where the output is no terminal (a job's log file), a line every `log_interval` steps and for the last one
    instead.

    Made on rank 0 only. Resuming at step `start_iteration` cuts the file back to the steps before it, so that a step
    that is done again stands there once. An offline run of W&B gets those before again: `wandb sync` puts its
    file in the place of what the run has sent so far.
    """

    def __init__(
        self,
        save: Path | None,
        tensorboard_dir: Path | None,
        *,
        start_iteration: int,
        train_iters: int,
        log_interval: int,
        wandb: Any = None,
    ) -> None:
        self._log_interval = log_interval
        self._train_iters = train_iters
        self._file = None
        self._tensorboard = None
        self._wandb = wandb
        self._written: deque[float] = deque([time.monotonic()], maxlen=STEPS_OF_PACE + 1)
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            path = save / "metrics.jsonl"
            kept = _steps_before(path, start_iteration)
            write_synced(path, "".join(kept).encode())
            self._file = path.open("a", buffering=1)
            if wandb is not None and is_offline(wandb):
                for line in kept:
                    self._send(json.loads(line))
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            _leave_errors_to_the_caller()
            self._tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=start_iteration + 1)
        self._bar = tqdm(initial=start_iteration, total=train_iters, desc="training", unit="step", **bar_options())

    def write(self, metrics: dict[str, Any]) -> None:
        """Record one step. `metrics` holds `iteration`, numbers, numbers by name, and perhaps `by_position` and
        `valid_by_position`: lists of dicts with the `first` and `last` position of a bucket and numbers. Those of a
        skipped step may be NaN or infinite; in the file, which is JSON, they are null."""
        if self._file is not None:
            self._file.write(json.dumps(_numbers_or_null(metrics), allow_nan=False) + "\n")
        step, valid = metrics["iteration"], metrics.get("valid_lm_loss")
        if self._tensorboard is not None:
            for tag, value in _finite(metrics).items():
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._send(metrics)
        self._written.append(time.monotonic())
        pace = (self._written[-1] - self._written[0]) / (len(self._written) - 1)
        figures = figures_of(metrics)
        self._bar.update()
        self._bar.set_postfix_str(figures, refresh=False)
        if valid is not None:
            self.say(f"step {step}/{self._train_iters}: held-out lm loss {valid:.4f}")
        if self._bar.disable and (step % self._log_interval == 0 or step == self._train_iters):
            left = tqdm.format_interval(pace * (self._train_iters - step))
            self.say(f"step {step}/{self._train_iters}: {figures}, lr {metrics['learning_rate']:.3g}, {left} left")

    def _send(self, metrics: dict[str, Any]) -> None:
        """A step to W&B."""
        self._wandb.log({"iteration": metrics["iteration"], **_finite(metrics)})

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        tqdm.write(text)

    def flush(self) -> None:
        """Wait until metrics.jsonl is on the disk, and TensorBoard has let go of its last two minutes: a run that goes
        on from a checkpoint does not write the steps before it again."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush everything; no further writes."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


def figures_of(metrics: dict[str, Any]) -> str:
    """A step in less than 80 columns."""
    text = (
        f"loss {metrics['weighted_loss']:.4f}, lm {metrics['lm_loss']:.4f}, grad {metrics['grad_norm']:.3g}, "
        f"{tqdm.format_sizeof(metrics['tokens_per_second'])} tok/s"
    )
    if "model_flops_utilization" in metrics:
        rate, share = metrics["tflops_per_second_per_gpu"], metrics["model_flops_utilization"]
        text += f", {rate:.0f} TFLOP/s {share:.0%}"
    return text


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """All numbers of a step by name: NAME/PART for numbers by name, NAME_by_position/FIRST-LAST for a bucket of
    positions."""
    found = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= {f"{name}/{part}": number for part, number in value.items() if number is not None}
    for prefix in ("", "valid_"):
        for bucket in metrics.get(f"{prefix}by_position", ()):
            for name in bucket.keys() - {"first", "last", "targets"}:
                if bucket[name] is not None:
                    found[f"{prefix}{name}_by_position/{bucket['first']}-{bucket['last']}"] = bucket[name]
    return found


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a step by name, but for the number of the step."""
    return {tag: value for tag, value in scalars(metrics).items() if tag != "iteration" and math.isfinite(value)}


def _numbers_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers_or_null(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _leave_errors_to_the_caller() -> None:
    """TensorBoard writes in a thread of its own. What fails there (a full disk) it raises again in the next call, so
    its traceback need not stand on the terminal too."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            before(failed)

    threading.excepthook = hook


def _steps_before(path: Path, iteration: int) -> list[str]:
    """Lines of metrics.jsonl up to step `iteration`; a last line that a crash cut off is left out. Where others are no
    steps, the file is kept aside as it is, and a line says so: a resume does not fail for that."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
    steps = [_iteration_of(line) for line in lines]
    if None in steps:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, aside)
        tqdm.write(f"{path}: {steps.count(None)} lines are no steps and left out; the file as it was is {aside.name}")
    return [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= iteration]


def _iteration_of(line: str) -> int | None:
    try:
        step = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
