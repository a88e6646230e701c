"""Which kernels Megatron-Core's layers use: what was asked for and what is here, decided once for a run; and what of it
is switched off while the model scores."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tw.config import KernelConfig
from megatron_tw.config.options import flag
from megatron_tw.losses.logit_tiles import kernels_compile
from megatron_tw.parallel.devices import Device

BLACKWELL = (10, 0)
HOPPER = (9, 0)
ADA = (8, 9)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What there is to compute with.

    gpu: a GPU. capability: its compute capability. transformer_engine: the layers are Transformer Engine's. apex: its
    kernel that adds weight gradients up (fused_weight_gradient_mlp_cuda). compiler: Triton and torch.compile compile.
    """

    gpu: bool = False
    capability: tuple[int, int] = (0, 0)
    transformer_engine: bool = False
    apex: bool = False
    compiler: bool = False

    @staticmethod
    def here(device: Device, *, transformer_engine: bool) -> "Parts":
        """Of this rank; tries the compiler once."""
        if device.type != "cuda":
            return Parts()
        return Parts(
            gpu=True,
            capability=torch.cuda.get_device_capability(device.device),
            transformer_engine=transformer_engine,
            apex=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
            compiler=kernels_compile(device.device),
        )


def kernel_fields(
    kernels: KernelConfig, parts: Parts, *, swiglu: bool, fused_activation: bool, rotary_factor: float
) -> dict[str, Any]:
    """The fields of Megatron-Core's TransformerConfig that `kernels` comes to with `parts`.

    swiglu, fused_activation: of the model: its activation is SwiGLU; Megatron-Core's fusion computes the same.
    rotary_factor: on cos and sin, which Transformer Engine's kernel does not have.

    Raises:
        ValueError: something is asked for that is not here; names the option.
    """

    def decide(name: str, here: bool, needed: str) -> bool:
        asked = getattr(kernels, name)
        if asked and not here:
            raise ValueError(f"{flag(name)}: expected {needed}")
        return here if asked is None else bool(asked)

    layers = "Transformer Engine's layers (a GPU, --bf16, Transformer Engine installed), got our own"
    fields: dict[str, Any] = {
        "gradient_accumulation_fusion": decide(
            "gradient_accumulation_fusion",
            parts.gpu and parts.apex,
            "a GPU and Apex's fused_weight_gradient_mlp_cuda, which are not both here",
        ),
        "apply_rope_fusion": decide(
            "rope_fusion",
            parts.transformer_engine and rotary_factor == 1.0,
            layers if rotary_factor == 1.0 else "a rotary embedding without a factor on cos and sin",
        ),
        "bias_activation_fusion": decide(
            "bias_swiglu_fusion",
            parts.compiler and fused_activation,
            "a GPU, a working compiler and a model with SwiGLU" if swiglu else "a model with SwiGLU",
        ),
        "bias_dropout_fusion": decide("bias_dropout_fusion", parts.compiler, "a GPU and a working compiler"),
        "deterministic_mode": kernels.deterministic_mode,
        "tp_comm_overlap": kernels.tp_comm_overlap,
        "tp_comm_bootstrap_backend": kernels.tp_comm_bootstrap_backend,
    }
    if kernels.tp_comm_overlap and not parts.transformer_engine:
        raise ValueError(f"--tp-comm-overlap: expected {layers}")
    if kernels.fp8_format is not None:
        _check_fp8(kernels, parts, layers)
        fields |= {
            "fp8": kernels.fp8_format,
            "fp8_recipe": kernels.fp8_recipe,
            "fp8_margin": kernels.fp8_margin,
            "fp8_amax_history_len": kernels.fp8_amax_history_len,
            "fp8_amax_compute_algo": kernels.fp8_amax_compute_algo,
        }
    return fields


def _check_fp8(kernels: KernelConfig, parts: Parts, layers: str) -> None:
    if not parts.transformer_engine:
        raise ValueError(f"--fp8-format {kernels.fp8_format}: expected {layers}")
    least = {"mxfp8": BLACKWELL, "blockwise": HOPPER}.get(kernels.fp8_recipe, ADA)
    if parts.capability < least:
        raise ValueError(
            f"--fp8-recipe {kernels.fp8_recipe}: expected a GPU of compute capability {least[0]}.{least[1]} or more, "
            f"got {parts.capability[0]}.{parts.capability[1]}"
        )


@contextmanager
def as_in_scoring(model: Sequence[torch.nn.Module], tokens: int) -> Iterator[None]:
    """Around a forward pass whose NLLs are compared with others': in bf16, whatever training does in FP8, and without
    user buffers where they were made for another number of tokens.

    tokens: of a micro-batch on a rank, before sequence parallelism shares them.
    """
    before: list[tuple[Any, str, Any]] = []

    def switch_off(owner: Any, name: str) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, None if name == "fp8" else False)

    try:
        for module in (module for chunk in model for module in chunk.modules()):
            config = getattr(module, "config", None)
            if not isinstance(config, TransformerConfig):
                continue
            if config.fp8 is not None:
                switch_off(config, "fp8")
            if config.tp_comm_overlap and tokens != getattr(config, BUFFER_TOKENS, None):
                for name in [name for name, value in vars(module).items() if value is True and _is_buffer_use(name)]:
                    switch_off(module, name)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


BUFFER_TOKENS = "user_buffer_tokens"
"""Attribute of the model's config: the tokens that its user buffers were made for."""


def _is_buffer_use(name: str) -> bool:
    """Attributes of Transformer Engine's linear modules that say whether a product goes through a user buffer."""
    return name.startswith(("ub_overlap_", "ub_bulk_"))
