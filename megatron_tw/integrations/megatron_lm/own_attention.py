"""Models whose core attention is this project's: a call says over which ranks its sequences lie, so that short windows
need not lie over all that a row lies over. Its layers have no parameters, and checkpoints are the same.

A model gets it from its layer spec (spec.py). The rotary angles, which Megatron's module slices over the whole
context-parallel group, come from this project's for the time of a schedule.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import nn

from megatron_tw.integrations.megatron_lm.hidden_loss import language_model
from megatron_tw.model.attention import ContextParallelAttention
from megatron_tw.model.rotary import ShardedRotaryEmbedding
from megatron_tw.model.sequence import SequenceShard

__all__ = ["SequenceShard", "has_own_attention", "own_attention_of_rows"]


def has_own_attention(model: Sequence[nn.Module], pp_group: dist.ProcessGroup) -> bool:
    """Whether the layers of this model, of which a pipeline stage has these chunks, have this project's core attention.
    Collective over the stages, of which some may have no layer.

    Raises:
        ValueError: some have.
    """
    kinds = {type(part).__name__ for chunk in model for part in chunk.modules() if _is_core_attention(part)}
    own = {name for name in kinds if name in (ContextParallelAttention.__name__, "ShardedTEAttention")}
    if own and own != kinds:
        raise ValueError(f"--spec: expected one core attention in all layers, got {', '.join(sorted(kinds))}")
    found = torch.tensor(bool(own), dtype=torch.int32, device=next(model[0].parameters()).device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=pp_group)
    return bool(found)


def _is_core_attention(part: nn.Module) -> bool:
    return isinstance(part, ContextParallelAttention) or type(part).__name__ in (
        "DotProductAttention",
        "TEDotProductAttention",
        "ShardedTEAttention",
    )


@contextmanager
def own_attention_of_rows(model: Sequence[nn.Module], cp_group: Any, seq_length: int) -> Iterator[None]:
    """Within the block, forward passes that do not say how their sequences lie are rows over `cp_group`."""
    inner = [language_model(chunk) for chunk in model]
    rotary = {chunk: chunk.rotary_pos_emb for chunk in inner if hasattr(chunk, "rotary_pos_emb")}

    def say_layout(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("packed_seq_params") is None:
            kwargs = {**kwargs, "packed_seq_params": SequenceShard.over(cp_group, seq_length)}
        return args, kwargs

    hooks = [chunk.register_forward_pre_hook(say_layout, with_kwargs=True) for chunk in inner]
    try:
        for chunk, own in rotary.items():
            chunk.rotary_pos_emb = _sharded(own)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for chunk, own in rotary.items():
            chunk.rotary_pos_emb = own


def _sharded(rotary: Any) -> ShardedRotaryEmbedding:
    """The same angles, for whatever slice a call names.

    Raises:
        ValueError: a rotary embedding with more to it than its frequencies.
    """
    plain = type(rotary) is RotaryEmbedding and not rotary.rotary_interleaved
    if not plain or rotary.seq_len_interpolation_factor is not None:
        raise ValueError(
            f"--spec: this project's attention knows Megatron's plain rotary embedding, got {type(rotary).__name__} "
            "(or --rotary-interleaved, or --rotary-seq-len-interpolation-factor)"
        )
    return ShardedRotaryEmbedding(rotary.inv_freq, torch.device(rotary.inv_freq.device))
