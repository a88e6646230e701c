"""The folders that a program writes, held from before its first step: that they can be written to is known then, and
no other run writes there."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tw.model.architecture import Architecture
from megatron_tw.model.build import export_workplace
from megatron_tw.model.families.table import expected_tensors
from megatron_tw.parallel.agree import raise_together
from megatron_tw.runtime.lock import FolderLock, hold_folder
from megatron_tw.runtime.run_folder import check_space, remove_partial_checkpoints

OPTIMIZER_BYTES, AVERAGE_BYTES = 12, 4
"""Of a parameter in a checkpoint: main weight and two moments in fp32; and the average of --scorer ema."""


@contextmanager
def hold_run(save: str | None, needed_bytes: int) -> Iterator[FolderLock | None]:
    """Hold --save within the block; the lock on rank 0, None on the others and without --save. Collective over the
    world.

    needed_bytes: what one checkpoint takes (see `checkpoint_bytes`).

    Raises:
        ValueError, OSError: another run holds it, it cannot be written to, or one checkpoint is more than is free.
    """
    if save is None:
        yield None
        return
    what, folder = f"--save {save}", Path(save)
    with hold_folder(folder, what) as lock:
        error = None
        if lock is not None:
            remove_partial_checkpoints(folder)
            error = _missing_space(folder, what, needed_bytes, "a checkpoint")
        raise_together(error)
        yield lock


@contextmanager
def hold_export(save_hf: str | None, architecture: Architecture, dtype: torch.dtype) -> Iterator[FolderLock | None]:
    """As `hold_run`, for --save-hf: holds the folder beside it, in which it is written."""
    if save_hf is None:
        yield None
        return
    what, workplace = f"--save-hf {save_hf}", export_workplace(Path(save_hf))
    try:
        with hold_folder(workplace, what) as lock:
            error = None
            if lock is not None:
                for left in workplace.glob("[0-9a-f]" * 8):  # by exports that were killed
                    shutil.rmtree(left, ignore_errors=True)
                error = _missing_space(workplace, what, parameters(architecture) * dtype.itemsize, "the model")
            raise_together(error)
            yield lock
    finally:
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # is gone already, or another run has begun in it
                workplace.rmdir()


def checkpoint_bytes(
    architecture: Architecture, dtype: torch.dtype, *, optimizer: bool = False, average: bool = False
) -> int:
    """What a checkpoint takes on disk, about. optimizer, average: whether it holds AdamW's state, --scorer ema's."""
    per_parameter = dtype.itemsize + OPTIMIZER_BYTES * optimizer + AVERAGE_BYTES * average
    return parameters(architecture) * per_parameter


def parameters(architecture: Architecture) -> int:
    """Number of the model's parameters."""
    return sum(prod(shape) for shape in expected_tensors(architecture).values())


def _missing_space(folder: Path, what: str, size: int, content: str) -> ValueError | OSError | None:
    try:
        check_space(folder, what, size, content)
    except (OSError, ValueError) as error:
        return error
    return None
