"""What Megatron-Bridge's configuration can ask for that token weighting cannot go with, by the names that it has."""

from typing import Any

from megatron_tw.integrations.arguments import arguments_named
from megatron_tw.integrations.megatron_lm.checks import REFUSED
from megatron_tw.integrations.megatron_lm.options import TokenWeightingOptions

_PACKING = ("packed_sequence_specs", "offline_packing_specs", "enable_offline_packing", "enable_in_batch_packing")


def check_config(config: Any, options: TokenWeightingOptions) -> None:
    """That a run with this ConfigContainer can be token-weighted.

    Raises:
        ValueError: names the setting, and says why.
    """
    for refusal in REFUSED:
        for section in ("model", "dataset", "ddp", "dist"):
            value = getattr(getattr(config, section, None), refusal.name, None)
            if refusal.where(value):
                raise ValueError(
                    f"{section}.{refusal.name}: cannot go with token weighting, got {value}: {refusal.why}"
                )
    if not config.model.calculate_per_token_loss:
        raise ValueError(
            "model.calculate_per_token_loss: expected True with token weighting: without it every micro-batch is "
            "divided by a count of its own, and weights would not mean the same everywhere"
        )
    if getattr(config.dataset, "dataloader_type", None) == "batch":
        raise ValueError(
            'dataset.dataloader_type: expected "single" or "cyclic" with token weighting, got "batch": rows must have '
            "one length"
        )
    for name in _PACKING:
        value = getattr(config.dataset, name, None)
        if value:
            raise ValueError(
                f"dataset.{name}: cannot go with token weighting, got {value}: packed rows have no fixed length"
            )
    if getattr(getattr(config, "dist", None), "use_decentralized_pg", False):
        raise ValueError(
            "dist.use_decentralized_pg: expected False with token weighting, which asks Megatron-Core for its process "
            "groups, got True"
        )
    if getattr(getattr(config.model, "dist_train", None), "use_dist_train", False):
        raise ValueError(
            "model.dist_train.use_dist_train: cannot go with token weighting, got True: its training loop takes a "
            "schedule of its own"
        )
    if getattr(config, "peft", None) is not None:
        raise ValueError("peft: cannot go with token weighting: it was not tried")
    with arguments_named():
        options.check(config.model.seq_length)
