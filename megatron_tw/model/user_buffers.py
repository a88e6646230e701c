"""Transformer Engine's user buffers, through which --tp-comm-overlap sends beside the matrix products. Megatron-Core
expects them and does not make them (Megatron-LM's training code does, in megatron/training/initialize.py)."""

import inspect
from collections.abc import Callable
from typing import Any

from megatron_tw.config import KernelConfig


def make_user_buffers(kernels: KernelConfig, *, tokens: int, hidden_size: int, tp_size: int) -> None:
    """Make those of this process, before the layers that use them. Collective over the world.

    tokens: of a micro-batch on a rank, before sequence parallelism shares them.

    Raises:
        ValueError: they cannot be made on this machine.
    """
    from transformer_engine.pytorch.module import base

    modes = getattr(base, "UserBufferQuantizationMode", None)
    arguments = buffer_arguments(
        base.initialize_ub, kernels, tokens=tokens, hidden_size=hidden_size, tp_size=tp_size, modes=modes
    )
    try:
        base.initialize_ub(**arguments)
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--tp-comm-overlap: user buffers cannot be made here: {reason}") from error


def buffer_arguments(
    initialize_ub: Callable[..., None],
    kernels: KernelConfig,
    *,
    tokens: int,
    hidden_size: int,
    tp_size: int,
    modes: Any,
) -> dict[str, Any]:
    """What `initialize_ub` takes: in versions of Transformer Engine from 2.7 on a list of quantization modes (`modes`,
    its enumeration), before that whether it is FP8."""
    fp8 = kernels.fp8_format is not None
    arguments: dict[str, Any] = {
        "shape": [tokens, hidden_size],
        "tp_size": tp_size,
        "ub_cfgs": {},
        "bootstrap_backend": kernels.tp_comm_bootstrap_backend,
    }
    if "quantization_modes" in inspect.signature(initialize_ub).parameters:
        # Without FP8 as well: held-out rows have as many tokens as those in training, and are scored in bf16.
        arguments["quantization_modes"] = [modes.FP8, modes.NONE] if fp8 else [modes.NONE]
    else:
        arguments["use_fp8"] = fp8
    return arguments
