"""The checkpoints of a run: written one at a time, at once or beside the training, and removed when too many."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_tw.config import CheckpointConfig
from megatron_tw.runtime.checkpoint import UnfinishedCheckpoint
from megatron_tw.runtime.run_folder import complete_checkpoints, remove_checkpoint, surplus_checkpoints


@dataclass(kw_only=True)
class Saver:
    """What a run does with its checkpoints, on every rank. A context manager: at the end of the block a checkpoint that
    is still being written becomes complete; where the block fails it is given up.

    needed: checkpoints that are never removed, such as the one that the run was resumed from. say: prints a line on
    rank 0. newest: the last one that this run has completed.
    """

    options: CheckpointConfig
    needed: frozenset[Path]
    say: Callable[[str], None]
    newest: Path | None = None
    _unfinished: UnfinishedCheckpoint | None = None

    def save(self, begin: Callable[[], UnfinishedCheckpoint]) -> None:
        """Write a checkpoint, or with --async-save begin to; the one before is complete then. Collective over the
        world.

        Raises:
            OSError, ValueError: one of them could not be written.
        """
        self._complete(wait=True)
        self._unfinished = begin()
        self._complete(wait=not self.options.async_save)

    def look(self) -> None:
        """Complete a checkpoint whose files have all been written by now. Collective over the world where there is one
        that is not complete.

        Raises:
            OSError, ValueError: it could not be written.
        """
        self._complete(wait=False)

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written. Collective, and raises, as `look`."""
        self._complete(wait=True)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._unfinished is not None:
            self._unfinished.abandon()

    def _complete(self, *, wait: bool) -> None:
        if self._unfinished is None:
            return
        directory = self._unfinished.complete(wait=wait)
        if directory is None:
            return
        self._unfinished = None
        self.newest = directory
        self.say(f"checkpoint: {directory}")
        if dist.get_rank() == 0:
            self._remove_surplus(directory)

    def _remove_surplus(self, newest: Path) -> None:
        complete = complete_checkpoints(newest.parent)
        until = complete[: complete.index(newest) + 1]  # later ones are of a run that was taken back
        for path in surplus_checkpoints(
            until,
            keep_last=self.options.keep_last,
            retain_interval=self.options.save_retain_interval,
            needed=self.needed,
        ):
            try:
                remove_checkpoint(path)
            except OSError as error:
                self.say(f"{path}: could not be removed ({error.strerror})")
