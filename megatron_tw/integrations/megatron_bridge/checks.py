"""What Megatron-Bridge's configuration can ask for that token weighting cannot go with, by the names that it has."""

from typing import Any

from megatron_tw.integrations.megatron_lm.checks import REFUSED
from megatron_tw.integrations.megatron_lm.options import TokenWeightingOptions


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
    packing = getattr(config.dataset, "packed_sequence_specs", None)
    if packing is not None and getattr(packing, "packed_sequence_size", 1) > 0:
        raise ValueError(
            "dataset.packed_sequence_specs: cannot go with token weighting: packed rows have no fixed length"
        )
    if getattr(config, "peft", None) is not None:
        raise ValueError("peft: cannot go with token weighting: it was not tried")
    options.check(config.model.seq_length)
