"""CPU or GPU, decided once: `prepare_device` is the only code of the project that asks.

On GPUs Megatron-Core runs as it is. On CPU ranks (gloo) a handful of its calls into `torch.cuda` are given their CPU
meaning.
Where neither Transformer Engine nor Apex is installed, on either device, Megatron-Core falls back to torch's AdamW
and mishandles that optimizer's step count on reload; `mend_adamw_fallback` repairs this. Nothing else is patched.
"""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

KNOWN_MEGATRON_CORE = ("0.16.1",)
"""Versions of Megatron-Core whose internals, touched below, were read and tried."""

_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "randint", "tensor", "zeros")
_LIKE_FACTORIES = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


@dataclass(frozen=True)
class Device:
    """Where this process computes.

    type: "cuda" or "cpu". backend: the matching torch.distributed backend. device: the torch.device of this rank.
    """

    type: str
    backend: str
    device: torch.device


_prepared: Device | None = None


def prepare_device() -> Device:
    """Pick this process's device, adapt Megatron-Core to it, and return it. Safe to call again: the first call decides.

    On GPUs the rank's device is `LOCAL_RANK` as the launcher set it.

    Raises:
        RuntimeError: the installed Megatron-Core is not one of `KNOWN_MEGATRON_CORE`.
    """
    global _prepared
    if _prepared is not None:
        return _prepared
    check_megatron_version()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _prepared = Device("cuda", "nccl", torch.device("cuda", torch.cuda.current_device()))
    else:
        adapt_megatron_to_cpu()
        _prepared = Device("cpu", "gloo", torch.device("cpu"))
    mend_adamw_fallback()
    return _prepared


def check_megatron_version(version: str | None = None) -> None:
    """Refuse a Megatron-Core whose internals may differ from those adapted here."""
    if version is None:
        from megatron import core

        version = core.__version__
    if version not in KNOWN_MEGATRON_CORE:
        raise RuntimeError(
            f"megatron-core: expected version {' or '.join(KNOWN_MEGATRON_CORE)}, found {version}. "
            "Install the pinned one: pip install -c constraints.txt megatron-core"
        )


def peak_memory_bytes() -> int:
    """Most memory this rank has used so far, in bytes: of the CUDA allocator on a GPU, resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize() -> None:
    """Wait for the device's queue, so that a clock read afterwards tells the truth. Nothing to wait for on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def adapt_megatron_to_cpu() -> None:
    """Give the `torch.cuda` calls on Megatron-Core's training path their CPU meaning. Call once, only without a GPU."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment, return-value]
    torch.cuda.empty_cache = lambda: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    # `with torch.device(...)` (transformers loads models under it) knows the factories by identity, from its first
    # use on.
    torch.utils._device._device_constructors()
    for name in _FACTORIES + _LIKE_FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    # Megatron's optimizers recognise parameters by the name of their CUDA type.
    own_type = torch.Tensor.type

    def type_name(self, dtype=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        if dtype is None and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return own_type(self, *(() if dtype is None else (dtype,)), *args, **kwargs)

    torch.Tensor.type = type_name  # type: ignore[method-assign]

    # The "CUDA" random state is the CPU generator's.
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]
    get_state: Callable[..., torch.Tensor] = lambda device=None: torch.get_rng_state()  # noqa: E731
    torch.cuda.get_rng_state = get_state
    torch.cuda.random.get_rng_state = get_state
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with a CUDA device argument read as the CPU, and pinned memory (which needs a GPU) as plain memory."""

    @functools.wraps(factory)
    def create(*args, **kwargs):  # type: ignore[no-untyped-def]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def mend_adamw_fallback() -> None:
    """Make the distributed optimizer save and reload torch's AdamW, where Transformer Engine and Apex are both absent.

    Three faults in Megatron-Core: it reads `step` before a first step has made it (loading into a fresh optimizer
    fails); parameter states are copied without `step`, which the torch optimizer has (KeyError); and after a reload all
    parameters share one `step` tensor, which then counts once per parameter.
    """
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER or hasattr(DistributedOptimizer, "_megatron_tw_mended"):
        return
    DistributedOptimizer._megatron_tw_mended = True
    state_dict = DistributedOptimizer.state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(state_dict)
    def state_dict_from_the_start(self):  # type: ignore[no-untyped-def]
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                state = self.optimizer.state[param]
                if not state:  # as torch.optim.AdamW makes it in its first step
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
        return state_dict(self)

    @functools.wraps(set_states)
    def set_states_without_step(self, model_param, tensors):  # type: ignore[no-untyped-def]
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        step = state.pop("step")
        try:
            set_states(self, model_param, tensors)
        finally:
            state["step"] = step

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self, state_dict):  # type: ignore[no-untyped-def]
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_from_the_start
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_without_step
    DistributedOptimizer.load_state_dict = load_with_own_steps
