"""FLOPs of an operation by its shapes, as torch.utils.flop_counter counts them (a multiplication and an addition are
two), with two entries that it lacks; causal attention counts the pairs that are not masked.

Shape suffixes: B batch, H heads, Q queries, K keys, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

_GEMMS: dict[Any, Callable[..., int]] = {
    packet: flop_registry[packet] for packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
}
_GEMMS[aten.addmm_] = flop_registry[aten.addmm]
_GEMMS[aten.baddbmm_] = flop_registry[aten.baddbmm]

_CPU_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
_FORWARDS = (
    _CPU_FORWARD,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
_BACKWARDS = (
    _CPU_BACKWARD,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
)
ATTENTION = frozenset(_FORWARDS + _BACKWARDS)


def operation_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[str, float] | None:
    """("gemm" or "attention", FLOPs) of an operator call, None of one that counts for nothing.

    func: an overload (torch.ops.aten.mm.default).
    """
    packet = func._overloadpacket
    if packet in _GEMMS:
        factors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        return "gemm", float(_GEMMS[packet](*factors, out_val=out))
    if packet not in ATTENTION:
        return None
    if packet in _FORWARDS:
        query, key, value = args[:3]
        flops = sdpa_flop_count(query.shape, _repeated(key, query), _repeated(value, query))
    else:
        grad_out, query, key, value = args[:4]
        flops = sdpa_backward_flop_count(grad_out.shape, query.shape, _repeated(key, query), _repeated(value, query))
    causal = _argument(func, args, kwargs, "is_causal")
    return "attention", flops * (causal_share(query.shape[2], key.shape[2]) if causal else 1.0)


def causal_share(queries: int, keys: int) -> float:
    """Of all pairs of the last `queries` positions with `keys` keys, those that a causal mask leaves: half of the
    diagonal block, and all before it.

    >>> causal_share(8, 8), causal_share(4, 8)
    (0.5, 0.75)
    """
    return 1.0 - queries / (2.0 * keys)


def _repeated(key_BGKD: torch.Tensor, query_BHQD: torch.Tensor) -> torch.Size:
    """The shape of keys or values as if each query head had its own: the work is the same."""
    batch, _, length, size = key_BGKD.shape
    return torch.Size((batch, query_BHQD.shape[1], length, size))


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a call by its name in the operator's schema, wherever it was given."""
    if name in kwargs:
        return kwargs[name]
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[index] if index < len(args) else argument.default_value
    raise AssertionError(f"{func} has no argument {name}")
