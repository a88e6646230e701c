"""One file a model family: what of its config.json is read and what refused, Megatron-Core's settings and layer, and
one table of tensors, from which import, export and all checks read."""

from typing import Any

from megatron_tw.model.families.base import Family, Fixed, Key, json_value, keys_of
from megatron_tw.model.families.layers import decoder_layer
from megatron_tw.model.families.llama import LLAMA
from megatron_tw.model.families.mistral import MISTRAL
from megatron_tw.model.families.phi import PHI
from megatron_tw.model.families.qwen2 import QWEN2
from megatron_tw.model.families.qwen3 import QWEN3
from megatron_tw.model.families.table import Parameter

__all__ = [
    "Family",
    "Fixed",
    "Key",
    "Parameter",
    "decoder_layer",
    "family_of",
    "json_value",
    "keys_of",
    "known_families",
    "register_family",
]

_FAMILIES: dict[str, Family] = {}
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "llama4", "llama4_text", "deepseek_v3", "gpt_oss", "olmoe")
_REFUSED = {
    **dict.fromkeys(_MIXTURES, "a mixture of experts"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "its norms and embeddings are scaled otherwise"),
    "phi3": "its weights are fused otherwise, and its long variants use longrope",
}


def register_family(family: Family) -> Family:
    """Make a family known under its `model_type`.

    Raises:
        ValueError: there is one of this name.
    """
    if family.model_type in _FAMILIES:
        raise ValueError(f"a family named {family.model_type} is registered already")
    _FAMILIES[family.model_type] = family
    return family


def known_families() -> tuple[str, ...]:
    """The model types that can be read."""
    return tuple(sorted(_FAMILIES))


def family_of(raw: dict[str, Any], source: str) -> Family:
    """The family that a parsed config.json names; `source` names the file in errors.

    Raises:
        ValueError: none of those known.
    """
    name = raw.get("model_type")
    if isinstance(name, str) and name in _FAMILIES:
        return _FAMILIES[name]
    why = f" ({_REFUSED[name]})" if isinstance(name, str) and name in _REFUSED else ""
    raise ValueError(f"{source}: model_type: expected one of {', '.join(known_families())}, got {name!r}{why}")


for _family in (LLAMA, MISTRAL, PHI, QWEN2, QWEN3):
    register_family(_family)
