"""Megatron-LM's `pretrain()` on CPU ranks, for tests: what `prepare_device` does for Megatron-Core, done for
`megatron.training`, which asks for CUDA on its own account."""

import gc
import signal
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_tw.parallel.devices import prepare_device

_done = False


def megatron_lm_on_cpu() -> None:
    """Once, before the script of a user runs. What is rebound here is no part of the plug-in, and stays."""
    global _done
    if _done:
        return
    _done = True
    prepare_device()
    from megatron.core.datasets import utils as dataset_utils
    from megatron.training import initialize, training

    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1  # with 0 it leaves out its groups and seeds
    cuda.set_device = lambda device: None
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9)
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    own = initialize.initialize_megatron

    def without_cuda(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "allow_no_cuda": True})

    for module in (initialize, training):
        module.initialize_megatron = without_cuda
        module.set_jit_fusion_options = lambda *args, **kwargs: None  # warms up kernels that a CPU has no use for
    dataset_utils.compile_helpers = lambda: None  # a C++ index of documents; the rows here need none


def forget_run() -> None:
    """Let the next run of this process start afresh: Megatron-LM keeps its arguments, groups and more in globals."""
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import global_vars

    from megatron_tw.parallel.layout import destroy_layout

    if global_vars._GLOBAL_TENSORBOARD_WRITER is not None:
        global_vars._GLOBAL_TENSORBOARD_WRITER.close()
    destroy_layout()
    global_vars.destroy_global_vars()
    destroy_rerun_state_machine()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
