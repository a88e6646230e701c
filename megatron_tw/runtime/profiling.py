"""A trace of chosen steps by PyTorch's profiler (--profile), for chrome://tracing or Perfetto."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_tw.config import LoggingConfig

FOLDER = "profile"
"""Under --save."""


class StepProfiler:
    """Of one rank. `before` and `after` every step, `close` when the run ends, however; iteration: the steps that are
    done.

    A trace that cannot be written is said and not raised: no training ends for it. One of which no step was done is
    said too.
    """

    def __init__(self, options: LoggingConfig, save: str | None, rank: int) -> None:
        self._start, self._end, self._rank = options.profile_step_start, options.profile_step_end, rank
        wanted = save is not None and options.profile and rank in options.profile_ranks
        self._folder = Path(save) / FOLDER if wanted and save is not None else None
        self._profiler: Any = None
        self._first = 0

    def before(self, iteration: int) -> None:
        """Begin the trace where the step is one of its own, be it the first or, in a run that goes on, a later one."""
        if self._folder is None or self._profiler is not None or not self._start <= iteration < self._end:
            return
        self._first = iteration + 1
        self._profiler = torch.profiler.profile(record_shapes=True)
        self._profiler.start()

    def after(self, iteration: int) -> None:
        """Write the trace after its last step."""
        if self._profiler is not None and iteration >= self._end:
            self._write(iteration)

    def close(self, iteration: int) -> None:
        """Write what there is of a trace that the end of the run cuts off."""
        if self._profiler is not None:
            self._write(max(iteration, self._first))  # a step that failed is in it
        elif self._folder is not None and self._first == 0:
            tqdm.write(
                f"--profile: no trace: none of the steps {self._start + 1} to {self._end} (--profile-step-start, "
                f"--profile-step-end) was done before the run ended after step {iteration}"
            )

    def _write(self, last: int) -> None:
        profiler, self._profiler = self._profiler, None
        assert self._folder is not None
        file = self._folder / f"steps{self._first}-{last}_rank{self._rank}.json.gz"
        try:
            profiler.stop()
            file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            tqdm.write(f"--profile: {file} could not be written: {error}")
        else:
            tqdm.write(f"trace: {file}")
