"""What a simulated rank does otherwise than a real one, all of it: calls that would need other ranks, numbers or a GPU.

Each entry replaces a global of a module, in a process that is good for nothing else afterwards.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_tw.losses import chunked_head, linear_cross_entropy, row_exchange
from megatron_tw.model import attention, kernels
from megatron_tw.planning.recorder import Recorder

aten = torch.ops.aten
_linear_cross_entropy = sys.modules[linear_cross_entropy.__module__]


def answer_for_other_ranks() -> None:
    """Collectives of Python objects: the others say what this rank says."""

    def gathered(object_list: Any, obj: Any, group: Any = None) -> Any:
        object_list[:] = [obj] * len(object_list)

    dist.all_gather_object = gathered
    dist.broadcast_object_list = lambda objects, *args, **kwargs: None


def do_without_numbers(targets_with_weight: float) -> None:
    """Where the program looks at numbers. targets_with_weight: share of the targets of a row whose weight is not 0."""
    from megatron.core.optimizer import clip_grads

    # Parameters have their dtype from the start, and a conversion would put tensors without data in their place.
    def keep(module: torch.nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        for parameter in module.parameters():
            assert convert(parameter).dtype == parameter.dtype
        return module

    torch.nn.Module._apply = keep  # type: ignore[method-assign]

    # torch.tensor(list of tensors) reads them past every mode.
    def l2_norm(chunk_size: int, flag: Tensor, tensors: list[list[Tensor]], per_tensor: bool, *args: Any) -> Any:
        return torch.stack([torch.norm(tensor) for tensor in tensors[0]]).norm().reshape(1), None

    clip_grads.l2_norm_impl = l2_norm

    # A tensor of another class without data; a fake one cannot become it.
    make_mask = attention.bottom_right_causal

    def mask(queries: int, keys: int) -> Any:
        with _disable_current_modes():
            return make_mask(queries, keys)

    attention.bottom_right_causal = mask

    _choose_targets(targets_with_weight)


def _choose_targets(share: float) -> None:
    """Which gradients of the loss are not zero: those of `share` of the targets of this rank's tokens."""
    head = chunked_head.ChunkedHeadFunction
    backward, agree = head.backward, row_exchange.RowExchange.agree
    generator = torch.Generator().manual_seed(1)
    labelled: list[Tensor] = []

    def note_labels(ctx: Any, grad: Tensor) -> Any:
        labelled[:] = [ctx.saved_tensors[3] != ctx.head.ignore_index]
        return backward(ctx, grad)

    def choose(self: Any, chosen_GL: Tensor) -> Tensor:
        agree(self, chosen_GL)
        with _disable_current_modes():  # else the draws would be numbers that nobody knows, as all in floating point
            # Drawn, not evenly spread: shards of a row have more or fewer, and the fullest decides what is sent.
            draws_GL = torch.rand(chosen_GL.shape, generator=generator).masked_fill(~labelled[0], 2.0)
            count = max(1, round(share * int(labelled[0].sum())))
            chosen_GL = draws_GL <= draws_GL.flatten().kthvalue(count).values
        labelled.clear()
        return chosen_GL

    head.backward = staticmethod(note_labels)  # type: ignore[assignment]
    row_exchange.RowExchange.agree = choose  # type: ignore[method-assign]


def run_compiled_functions_fused(recorder: Recorder, modules: Sequence[str] = ("megatron.core",)) -> None:
    """torch.compile makes one kernel of an elementwise function: what is between its inputs and outputs is never in
    memory."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(tuple(modules)):
            continue
        for attribute, value in list(vars(module).items()):
            original = getattr(value, "_torchdynamo_orig_callable", None)
            if original is not None and callable(value) and not isinstance(value, type):
                setattr(module, attribute, _as_one_kernel(original, recorder))


def _as_one_kernel(function: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with recorder.uncounted():
            out = function(*args, **kwargs)
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                recorder.ledger.see(tensor)
        return out

    return call


def take_branches_of_gpu(recorder: Recorder) -> None:
    """What the code chooses by the tensor's device, as it chooses on a GPU with Triton, and with Transformer Engine's
    or Apex's fused optimizer."""
    from megatron.core.optimizer import clip_grads

    _linear_cross_entropy.CHUNK_TOKENS["cpu"] = _linear_cross_entropy.CHUNK_TOKENS["cuda"]
    _linear_cross_entropy.TILE_BYTES["cpu"] = _linear_cross_entropy.TILE_BYTES["cuda"]
    chunked_head.tile_operations = lambda device, sum_dtype: _InPlace()
    chunked_head.add_product_ = _add_product_as_on_gpu
    F.scaled_dot_product_attention = _attention_of_gpu
    recorder.workspace[aten._scaled_dot_product_flash_attention_backward] = _flash_backward_workspace
    run_compiled_functions_fused(recorder)
    there = kernels.Parts(gpu=True, capability=kernels.HOPPER, compiler=True)
    kernels.Parts.here = staticmethod(lambda device, *, transformer_engine: there)  # type: ignore[method-assign]

    def scale(chunk_size: int, flag: Tensor, tensors: list[list[Tensor]], factor: Any) -> None:
        for source, target in zip(tensors[0], tensors[1], strict=True):
            assert source is target
            target.mul_(factor)

    clip_grads.multi_tensor_scale_impl = scale


def fuse_optimizer(optimizer: Any) -> None:
    """One kernel for the update, as the optimizers of Transformer Engine and Apex have it; it allocates nothing."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


class _InPlace:
    """The Triton kernels of losses/triton_tiles.py: they work in the tile."""

    def add_statistics_(self, *args: Any, **kwargs: Any) -> None:
        return

    def logit_gradient_(self, *args: Any, **kwargs: Any) -> None:
        return


def _add_product_as_on_gpu(sum_XY: Tensor, left_XK: Tensor, right_KY: Tensor) -> None:
    """`add_product_` on a GPU: factors stay in low precision."""
    if left_XK.dtype == sum_XY.dtype:
        sum_XY.addmm_(left_XK, right_KY)
    else:
        torch.addmm(sum_XY, left_XK, right_KY, out_dtype=torch.float32, out=sum_XY)


def _attention_of_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What PyTorch takes on a GPU for causal attention: FlashAttention in bf16; in fp32 the memory-efficient kernel,
    or with grouped heads, which that one does not have, all scores at once."""
    assert is_causal or attn_mask is not None, "attention here is causal"
    outputs: tuple[Tensor, ...]
    if query.dtype != torch.float32:
        outputs = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    elif is_causal and not enable_gqa:
        saves = torch.is_grad_enabled() and query.requires_grad
        outputs = aten._scaled_dot_product_efficient_attention(query, key, value, None, saves, 0.0, True, scale=scale)
    else:
        mask = None if is_causal else attn_mask._materialize(query.device)
        outputs = aten._scaled_dot_product_attention_math(
            query, key, value, mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
    return outputs[0]


def _flash_backward_workspace(
    grad_out: Tensor, query_BHQD: Tensor, key_BGKD: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """What PyTorch's FlashAttention 2 allocates beside its outputs (mha_bwd in flash_api.cpp): the softmax's dot
    products and an fp32 sum of the queries' gradient, padded to blocks of 128 queries; with grouped heads the gradients
    of keys and values of every query head."""
    batch, heads, queries, size = query_BHQD.shape
    padded = -(-queries // 128) * 128
    working = [
        torch.empty(batch, heads, padded, dtype=torch.float32),
        torch.empty(batch, heads, padded, -(-size // 32) * 32, dtype=torch.float32),
    ]
    if heads != key_BGKD.shape[1]:
        working += [key_BGKD.new_empty(batch, heads, key_BGKD.shape[2], size) for _ in range(2)]
    return working
