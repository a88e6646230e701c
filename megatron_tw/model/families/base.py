"""What a model family is: the parts that each file of this folder fills in."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_tw.model.families.table import Parameter

_REQUIRED: Any = object()
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Key:
    """A key of config.json: the field of Architecture that it gives, its JSON type, and what a missing key means to
    transformers. Integers are 1 or more, numbers more than 0. A nullable key is decided from the others where it is
    null."""

    field: str
    type: type
    default: Any = _REQUIRED
    nullable: bool = False

    def read(self, name: str, raw: Mapping[str, Any], source: str) -> Any:
        """The value in a parsed config.json; `source` names the file in errors.

        Raises:
            ValueError: missing, of another JSON type, or out of range.
        """
        value = raw.get(name, self.default)
        if value is _REQUIRED:
            raise ValueError(f"{source}: missing {name}")
        if value is None and self.nullable:
            return None
        return json_value(value, self.type, f"{source}: {name}", or_null=self.nullable)


def json_value(value: Any, kind: type, what: str, *, or_null: bool = False) -> Any:
    """A value of config.json that must be an integer of 1 or more (and of 64 bits), a number more than 0, or true or
    false.

    Raises:
        ValueError: it is not; begins with `what`.
    """
    if isinstance(value, int) and value > _LARGEST:
        raise ValueError(f"{what}: expected at most {_LARGEST}, got {value}")
    if kind is bool:
        fits, expected = isinstance(value, bool), "true or false"
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        expected = "an integer of 1 or more"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        expected = "a number more than 0"
    if not fits:
        raise ValueError(f"{what}: expected {expected}{', or null' if or_null else ''}, got {value!r}")
    return value


@dataclass(frozen=True)
class Fixed:
    """A key of config.json with which the model here agrees only where it has this value, as where it is missing."""

    value: Any
    why: str = ""

    def check(self, name: str, raw: Mapping[str, Any], source: str) -> None:
        """Raises ValueError where the file says something else."""
        value = raw.get(name, self.value)
        if value != self.value or isinstance(value, bool) != isinstance(self.value, bool):
            why = f" ({self.why})" if self.why else ""
            raise ValueError(f"{source}: {name}: expected {self.value!r}, got {value!r}{why}")


def keys_of(
    *,
    epsilon: str,
    epsilon_default: float,
    max_position_embeddings: int,
    key_value_heads: int | None = None,
    head_dim: int | None = None,
) -> dict[str, Key]:
    """The keys that all families read. epsilon: the name of the norms' epsilon. The others: what transformers takes
    where the key is missing. key_value_heads None: as many as query heads. head_dim None: hidden size / heads."""
    return {
        "num_hidden_layers": Key("num_layers", int),
        "hidden_size": Key("hidden_size", int),
        "intermediate_size": Key("ffn_hidden_size", int),
        "num_attention_heads": Key("num_attention_heads", int),
        "num_key_value_heads": Key("num_query_groups", int, default=key_value_heads, nullable=True),
        "vocab_size": Key("vocab_size", int),
        "head_dim": Key("head_dim", int, default=head_dim, nullable=head_dim is None),
        epsilon: Key("norm_epsilon", float, default=epsilon_default),
        "tie_word_embeddings": Key("tied_embeddings", bool, default=False),
        "max_position_embeddings": Key("max_position_embeddings", int, default=max_position_embeddings),
    }


QUANTIZED = {"quantization_config": Fixed(None, "weights are read as floats; export the model without quantization")}
"""Refused by all families."""


def sees_all(raw: Mapping[str, Any], source: str) -> int | None:
    """The attention span of a family in which every token sees all before it."""
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers.

    architecture: the class that an export names. keys, fixed: what config.json may say. tensors: every parameter.
    megatron: fields of Megatron-Core's TransformerConfig. layer: its layer, of ours or Transformer Engine's modules
    (family, transformer_engine) -> spec. attention_span: tokens that a token sees at most, from config.json; None
    where all before it. partial_rotary: what transformers takes where config.json has no `partial_rotary_factor`;
    None where all of a head is rotated. fused_activation: whether Megatron-Core fuses this activation with the bias.
    buffers: names (a regular expression) of tensors that follow from config.json, which old folders hold.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, Key]
    fixed: Mapping[str, Fixed]
    tensors: tuple[Parameter, ...]
    megatron: Mapping[str, Any]
    layer: Callable[["Family", bool], ModuleSpec]
    attention_span: Callable[[Mapping[str, Any], str], int | None] = sees_all
    partial_rotary: float | None = None
    buffers: str = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    fused_activation: bool = True

    @property
    def has_head_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return any("output_layer.bias" in parameter.names for parameter in self.tensors)
