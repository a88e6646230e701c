"""What Megatron-Core and torch say while they write and read a checkpoint, as errors and lines for a user."""

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron import core
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tw.parallel.agree import raise_together
from megatron_tw.runtime.run_folder import SavedCheckpoint

for _name in ("filesystem_async", "torch"):  # the one raises too what it logs; the other advises to install NVRx
    logging.getLogger(f"megatron.core.dist_checkpointing.strategies.{_name}").setLevel(logging.CRITICAL)
_OF_DAMAGE = (
    *(OSError, EOFError, RuntimeError, KeyError),
    *(pickle.UnpicklingError, AttributeError, ImportError, IndexError, TypeError, ValueError),
)
"""What Megatron-Core and torch raise for damaged files; the second line is of what pickle raises for its own."""


@contextmanager
def one_error() -> Iterator[None]:
    """Around Megatron's writing: its ways to say that a file cannot be written, as one OSError.

    What a writer of some rank meets is raised on every rank, but told to rank 0 alone; what rank 0 meets in the files
    that it alone writes is raised there, and the others wait for their launcher to end them.
    """
    failed = None
    try:
        yield
    except CheckpointException as error:
        failed = OSError("; ".join(sorted({str(reason) for reason, _ in error.failures.values()})))
    except RuntimeError as error:
        if not any(name in str(error) for name in ("inline_container", "PytorchStreamWriter", "iostream error")):
            raise
        raise OSError(f"common.pt: {str(error).splitlines()[0]}") from error
    raise_together(failed)


@contextmanager
def damage_named(saved: SavedCheckpoint) -> Iterator[None]:
    """Around Megatron's reading: its ways to say that a file is damaged, as one line. It reads what earlier versions
    wrote, but not always what later ones did."""
    try:
        yield
    except (CheckpointException, CheckpointingException, *_OF_DAMAGE) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason: object = error
        if isinstance(error, CheckpointException) and error.failures:
            reason = next(iter(error.failures.values()))[0]
        text = (str(reason).splitlines() or [""])[0] or type(reason).__name__
        if saved.megatron_core not in ("", core.__version__):
            text += f"; megatron-core {saved.megatron_core} wrote it, {core.__version__} reads it"
        raise ValueError(f"{saved.directory}: cannot be read; a file of it is damaged or missing ({text})") from error


@contextmanager
def no_warnings_of_torch() -> Iterator[None]:
    """Without torch's advice to Megatron-Core, which a user cannot take."""
    with warnings.catch_warnings():
        for message, category in (
            ("`load_state_dict` is deprecated", FutureWarning),
            ("Please use DTensor instead", FutureWarning),
            ("torch.distributed is disabled, unavailable or uninitialized", UserWarning),  # it reads on each rank
            ("The argument order of load has been changed", UserWarning),
        ):
            warnings.filterwarnings("ignore", message=message, category=category)
        yield
