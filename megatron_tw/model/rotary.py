"""Rotary position embedding: what a config.json says of it, other ways to stretch it, its frequencies and angles.

Megatron-Core hard-codes the constants of llama3 scaling; here the checkpoint's own `rope_parameters` decide, through
transformers' ROPE_INIT_FUNCTIONS, so that logits agree.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tw.config import ModelConfig
from megatron_tw.model.families import Family, json_value
from megatron_tw.model.sequence import SequenceShard
from megatron_tw.objective.zigzag import zigzag_positions

if TYPE_CHECKING:
    from megatron_tw.model.architecture import Architecture

_NEEDED: dict[str, dict[str, type]] = {
    "default": {},
    "linear": {"factor": float},
    "llama3": {
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "original_max_position_embeddings": int,
    },
    "yarn": {"factor": float, "original_max_position_embeddings": int},
}
_OPTIONAL: dict[str, dict[str, type]] = {
    "yarn": {
        "attention_factor": float,
        "beta_fast": float,
        "beta_slow": float,
        "mscale": float,
        "mscale_all_dim": float,
        "truncate": bool,
    }
}
_REFUSED = {
    "dynamic": "its frequencies depend on each input's length, so that no one model is trained; ntk fixes them",
    "longrope": "its frequencies depend on each input's length, so that no one model is trained",
}
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Origin:
    """What a model was before its context was ever stretched, kept over all stages.

    length: tokens of its context, None where nobody says. rope_theta: before `ntk` changed it.
    """

    length: int | None
    rope_theta: float


@dataclass(frozen=True)
class Rotary:
    """Inverse frequencies [rotary size / 2] fp32, and the factor on cos and sin (yarn's; 1 for most)."""

    inv_freq: Tensor
    attention_factor: float


def read_rope(raw: Mapping[str, Any], family: Family, max_length: int, source: str) -> dict[str, Any]:
    """transformers 5's `rope_parameters` of a parsed config.json, or transformers 4's `rope_theta` and `rope_scaling`
    in that form: rope_type, rope_theta and what the type needs.

    Raises:
        ValueError: an unknown type, a key of another type or range or one too many, or two that contradict each other;
        the message names the file and the key.
    """
    given = {}
    for name in ("rope_scaling", "rope_parameters"):  # the first of them wins in transformers
        value = raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{source}: {name}: expected an object or null, got {value!r}")
        if value:
            given[name] = _read_one(value, raw, family, max_length, f"{source}: {name}")
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        raise ValueError(f"{source}: rope_scaling and rope_parameters contradict each other")
    return next(iter(given.values())) if given else _read_one({}, raw, family, max_length, source)


def _read_one(
    given: dict[str, Any], raw: Mapping[str, Any], family: Family, max_length: int, what: str
) -> dict[str, Any]:
    rope = {key: value for key, value in given.items() if key != "type"}
    kind = rope.setdefault("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _NEEDED:
        why = f" ({_REFUSED[kind]})" if isinstance(kind, str) and kind in _REFUSED else ""
        raise ValueError(f"{what}: rope_type: expected one of {', '.join(_NEEDED)}, got {kind!r}{why}")
    outer = [key for key in ("rope_theta", "partial_rotary_factor", _ORIGINAL) if raw.get(key) is not None]
    for key in outer:
        if (key != _ORIGINAL or _ORIGINAL in _NEEDED[kind]) and rope.setdefault(key, raw[key]) != raw[key]:
            raise ValueError(f"{what}: {key} {rope[key]!r} contradicts the {key} {raw[key]!r} beside it")
    rope.setdefault("rope_theta", 10000.0)
    if _ORIGINAL in _NEEDED[kind]:  # else transformers takes the model's, which an extension changes
        rope.setdefault(_ORIGINAL, max_length)
    partial = rope.pop("partial_rotary_factor", None)
    if family.partial_rotary is not None:
        partial = family.partial_rotary if partial is None else partial
        rope["partial_rotary_factor"] = json_value(partial, float, f"{what}: partial_rotary_factor")
    if (partial or 1) > 1 or (family.partial_rotary is None and partial not in (None, 1)):
        expected = "at most 1" if family.partial_rotary is not None else f"none, or 1 in a {family.model_type} model"
        raise ValueError(f"{what}: partial_rotary_factor: expected {expected}, got {partial!r}")
    _check_numbers(rope, kind, what)
    return rope


def _check_numbers(rope: dict[str, Any], kind: str, what: str) -> None:
    needed = {"rope_theta": float, **_NEEDED[kind]}
    optional = _OPTIONAL.get(kind, {})
    for key in needed:
        if key not in rope:
            raise ValueError(f"{what}: missing {key}, which rope_type {kind} needs")
    for key, value in rope.items():
        if key in needed:
            json_value(value, needed[key], f"{what}: {key}")
        elif key in optional:
            if value is not None:
                json_value(value, optional[key], f"{what}: {key}", or_null=True)
        elif key not in ("rope_type", "partial_rotary_factor"):
            raise ValueError(f"{what}: {key}: a key that rope_type {kind} does not have")
    if rope.get("factor", 1) < 1:
        raise ValueError(f"{what}: factor: expected 1 or more, got {rope['factor']!r}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(
            f"{what}: high_freq_factor: expected more than low_freq_factor {rope['low_freq_factor']!r}, got "
            f"{rope['high_freq_factor']!r}"
        )


def read_origin(raw: Mapping[str, Any], rope: Mapping[str, Any], max_length: int, source: str) -> Origin:
    """What an export of ours wrote as `extended_from`, else what follows from the rope.

    Raises:
        ValueError: `extended_from` is damaged.
    """
    first, what = raw.get("extended_from"), f"{source}: extended_from"
    if first is not None:
        if not isinstance(first, dict):
            raise ValueError(f"{what}: expected an object, got {first!r}")
        length, theta = first.get(_ORIGINAL), first.get("rope_theta")
        if length is not None:
            length = json_value(length, int, f"{what}: {_ORIGINAL}", or_null=True)
        return Origin(length, float(json_value(theta, float, f"{what}: rope_theta")))
    length = None if rope["rope_type"] == "linear" else rope.get(_ORIGINAL, max_length)
    return Origin(length, float(rope["rope_theta"]))


def origin_entry(rope: Mapping[str, Any], origin: Origin, max_length: int) -> dict[str, Any]:
    """`extended_from` for an export whose context is `max_length`; empty where it says nothing new."""
    if read_origin({}, rope, max_length, "") == origin:
        return {}
    return {"extended_from": {_ORIGINAL: origin.length, "rope_theta": origin.rope_theta}}


def stretch_rope(
    rope: dict[str, Any], origin: Origin, rotary_dim: int, model: ModelConfig, length: int | None
) -> tuple[dict[str, Any], Origin]:
    """The rope as --rotary-base and --rope-scaling-type ask for it, and the origin that it then has.

    A scaling starts from the origin, never from a rope that is scaled already, so that stages and resumed runs come to
    the same. ntk (bloc97): default frequencies with theta * factor^(d / (d - 2)), d the rotary size; the slowest then
    is factor times slower, the fastest as fast as before.

    length: tokens of the new context, None where nobody says.

    Raises:
        ValueError: no factor is given and none follows from the lengths; names the option.
    """
    scaling = model.rope_scaling_type
    if scaling is None:
        if model.rotary_base in (None, rope["rope_theta"]):
            return rope, origin
        base = float(model.rotary_base)
        return {**rope, "rope_theta": base}, Origin(origin.length, base)
    base = origin.rope_theta if model.rotary_base is None else float(model.rotary_base)
    kept = {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    new: dict[str, Any] = {"rope_type": "default", "rope_theta": base, **kept}
    origin = Origin(origin.length, base)
    if scaling == "none":
        return new, origin
    factor = scaling_factor(origin, model, length)
    if scaling == "ntk":
        if rotary_dim <= 2:
            raise ValueError(f"--rope-scaling-type ntk: expected more than 2 rotated dimensions, got {rotary_dim}")
        new["rope_theta"] = base * factor ** (rotary_dim / (rotary_dim - 2))
        return new, origin
    new |= {"rope_type": scaling, "factor": factor}
    if scaling == "llama3":
        new |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if _ORIGINAL in _NEEDED[scaling]:
        if origin.length is None:
            raise ValueError(f"--rope-scaling-type {scaling}: config.json does not say from which length it was scaled")
        new[_ORIGINAL] = origin.length
    return new, origin


def scaling_factor(origin: Origin, model: ModelConfig, length: int | None) -> float:
    """--rope-scaling-factor, or the new length over the original.

    Raises:
        ValueError: none is given, and none follows.
    """
    if model.rope_scaling_factor is not None:
        return float(model.rope_scaling_factor)
    what = f"--rope-scaling-factor: expected one for --rope-scaling-type {model.rope_scaling_type}"
    if length is None:
        raise ValueError(f"{what}, or --seq-length, got neither")
    if origin.length is None:
        raise ValueError(f"{what}: config.json does not say from which length it was scaled")
    if length < origin.length:
        raise ValueError(f"{what}: {length} tokens are fewer than the model's original {origin.length}")
    return length / origin.length


def rotary_embedding(architecture: "Architecture") -> Rotary:
    """What transformers computes for this rope."""
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = architecture.rope
    if rope["rope_type"] == "default":
        size = architecture.rotary_dim
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        return Rotary(1.0 / (architecture.rotary_base**exponents), 1.0)
    hf: Any = PreTrainedConfig()
    hf.head_dim, hf.hidden_size, hf.num_attention_heads = architecture.rotary_dim, architecture.rotary_dim, 1
    hf.max_position_embeddings = architecture.max_position_embeddings
    hf.rope_parameters = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, torch.device("cpu"))
    return Rotary(inv_freq, float(attention_factor))


def multiply_cos_and_sin(config: TransformerConfig, factor: float) -> None:
    """Have Megatron-Core's attention multiply cos and sin by `factor`, as transformers does: it stretches the rotated
    part of queries and keys alone. (A factor on the softmax's scale would stretch the rest too.)

    Megatron-Core makes its factor as (0.1 * mscale * ln(scaling) + 1) / (0.1 * mscale_all_dim * ln(scaling) + 1).
    """
    if factor != 1.0:
        config.yarn_rotary_scaling_factor = math.exp(10.0)
        config.yarn_mscale, config.yarn_mscale_all_dim = factor - 1.0, 0.0


class ShardedRotaryEmbedding(RotaryEmbedding):
    """Angles [local tokens, 1, 1, rotary size] in fp32 for the tokens that this rank holds of a `SequenceShard`; the
    rest of a head is not rotated."""

    def __init__(self, inv_freq: Tensor, device: torch.device) -> None:
        torch.nn.Module.__init__(self)
        self.rotary_interleaved = False
        # A plain attribute, not a buffer: it must stay fp32 when the model is cast to bf16, and is in no checkpoint.
        self.inv_freq = inv_freq.to(device=device, dtype=torch.float32)
        self._angles = lru_cache(maxsize=4)(self._compute_angles)

    def get_rotary_seq_len(self, *args, packed_seq_params: SequenceShard | None = None, **kwargs):  # type: ignore[no-untyped-def]
        """Megatron-Core asks for a length and hands it to `forward`; the whole layout goes the same way."""
        shard = packed_seq_params if packed_seq_params is not None else args[-1]
        assert isinstance(shard, SequenceShard), "every forward pass names its SequenceShard"
        return shard

    def forward(self, shard: SequenceShard, offset: int = 0, packed_seq: bool = False, cp_group=None) -> Tensor:  # type: ignore[no-untyped-def]
        if shard.packed is not None:
            return self._angles_at(shard.packed.within)
        return self._angles(shard.sequence_length, shard.rank, shard.size)

    def _compute_angles(self, sequence_length: int, rank: int, size: int) -> Tensor:
        return self._angles_at(zigzag_positions(sequence_length, rank=rank, size=size, device=self.inv_freq.device))

    def _angles_at(self, positions: Tensor) -> Tensor:
        angles = torch.outer(positions.float(), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
