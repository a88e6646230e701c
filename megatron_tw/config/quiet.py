"""Warnings and log lines of libraries that nobody who runs a program can do anything about."""

import logging
import warnings
from functools import partial

_MESSAGES = (
    # Megatron-Core says these once per module and rank. Transformer Engine and Apex are optional here.
    ".*Apex (is|are) not installed.*",
    "full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch\.distributed\.\w+` is deprecated",
    ".* is experimental and still under active development",
    "Could not determine rank from torch.distributed, RANK, or SLURM_PROCID",
)


def _says_other_than(message: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(message)


_LOG_FILTERS = tuple(
    (logger, partial(_says_other_than, message))
    for logger, message in (
        # Megatron-Core, from 0.19: what follows GPTModel, who lays buffers out, that a checkpoint is an old one.
        ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
        ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not"),
        ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
        # PyTorch built for CUDA, without a GPU.
        ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    )
)


def quiet_libraries() -> None:
    """Show them no more in this process. For programs, before they import Megatron-Core; a library leaves warnings
    alone."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    for logger, says_other in _LOG_FILTERS:
        logging.getLogger(logger).addFilter(says_other)  # once, however often it is asked
