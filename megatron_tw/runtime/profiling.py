"""A trace of chosen steps by PyTorch's profiler (--profile), for chrome://tracing or Perfetto."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_tw.config import LoggingConfig

FOLDER = "profile"
"""Under --save."""


class StepProfiler:
    """Of one rank. `before` and `after` every step; iteration: the steps that are done.

    A trace that cannot be written is said and not raised: no training ends for it.
    """

    def __init__(self, options: LoggingConfig, save: str | None, rank: int) -> None:
        self._options, self._rank = options, rank
        self._folder = Path(save) / FOLDER if save is not None and options.profile else None
        self._profiler: Any = None

    def before(self, iteration: int) -> None:
        options = self._options
        if self._folder is None or iteration != options.profile_step_start or self._rank not in options.profile_ranks:
            return
        self._profiler = torch.profiler.profile(record_shapes=True)
        self._profiler.start()

    def after(self, iteration: int) -> None:
        if self._profiler is None or iteration != self._options.profile_step_end:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        assert self._folder is not None
        file = self._folder / f"steps{self._options.profile_step_start + 1}-{iteration}_rank{self._rank}.json.gz"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            tqdm.write(f"--profile: {file} could not be written: {error}")
        else:
            tqdm.write(f"trace: {file}")
