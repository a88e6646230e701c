"""CPU or GPU, decided once: `prepare_device` is the only code of the project that asks.

On GPUs Megatron-Core runs as it is. On CPU ranks (gloo) a handful of its calls into `torch.cuda` are given their CPU
meaning. On both, faults of its distributed optimizer are mended (mends.py). Nothing else is patched.
"""

import functools
import gc
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._device
from packaging.version import Version

from megatron_tw.parallel.mends import mend_megatron

OLDEST_MEGATRON_CORE = Version("0.16.1")
NEWEST_MEGATRON_CORE = Version("0.19.2")
"""Between them the tests pass (tools/test_versions.sh)."""
BROKEN_MEGATRON_CORE: dict[str, str] = {}
"""Versions that are refused, and why."""

ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""See `set_environment`."""

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
        RuntimeError: the installed Megatron-Core is too old, or known to be broken.
    """
    global _prepared
    if _prepared is not None:
        return _prepared
    check_megatron_version()
    set_environment()
    # fp32 means fp32, whatever the image's environment says: short NLLs are compared with long ones.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _prepared = Device("cuda", "nccl", torch.device("cuda", torch.cuda.current_device()))
    else:
        adapt_megatron_to_cpu()
        _prepared = Device("cpu", "gloo", torch.device("cpu"))
    mend_megatron()
    return _prepared


def set_environment() -> None:
    """Variables that a run on GPUs wants, where nobody has set them; read when CUDA starts, so before that. The same
    whether bash or torchrun starts the run.

    CUDA_DEVICE_MAX_CONNECTIONS 1: kernels start in the order in which they are given, so that communication overlaps
    with the computation that is given after it (Megatron asks for it under TP and CP). expandable_segments: rows of
    several lengths leave no holes in the allocator's memory.
    """
    for name, value in ENVIRONMENT.items():
        if name != "PYTORCH_CUDA_ALLOC_CONF" or "PYTORCH_ALLOC_CONF" not in os.environ:  # its name in newer PyTorch
            os.environ.setdefault(name, value)


def check_megatron_version(version: str | None = None) -> None:
    """Refuse a Megatron-Core that is too old or known to be broken, and warn of one that is newer than those tried.

    version: that of a clone of its repository ends in `+` and the commit, which does not count.
    """
    if version is None:
        from megatron import core

        version = core.__version__
    public = Version(Version(version).public)
    if public < OLDEST_MEGATRON_CORE or str(public) in BROKEN_MEGATRON_CORE:
        why = f" ({BROKEN_MEGATRON_CORE[str(public)]})" if str(public) in BROKEN_MEGATRON_CORE else ""
        raise RuntimeError(
            f"megatron-core: expected version {OLDEST_MEGATRON_CORE} to {NEWEST_MEGATRON_CORE}, found {version}{why}. "
            "Install the pinned one: pip install -c constraints.txt megatron-core"
        )
    if public > NEWEST_MEGATRON_CORE and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"megatron-core {version} is newer than {NEWEST_MEGATRON_CORE}, the newest that was tried here",
            stacklevel=2,
        )


def peak_memory_bytes() -> int:
    """Most memory this rank has used so far, in bytes: of the CUDA allocator on a GPU, resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str | None:
    """What CUDA calls this rank's GPU; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def synchronize() -> None:
    """Wait for the device's queue, so that a clock read afterwards tells the truth. Nothing to wait for on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give back what nobody refers to any more, to the device too: before another model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def adapt_megatron_to_cpu() -> None:
    """Give the `torch.cuda` calls on Megatron-Core's training path their CPU meaning. Call once, only without a GPU."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment, return-value]
    torch.cuda.Stream = _NoStream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device=None: _NoStream()  # type: ignore[assignment, return-value]
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


class _NoStream:
    """A CUDA stream on a CPU, where what is given to it is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


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
