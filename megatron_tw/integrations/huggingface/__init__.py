"""Token weighting in the Hugging Face Trainer, and in what is built on it: TRL's SFTTrainer, axolotl.

    config.py    TokenWeightingConfig: what to weight by
    trainer.py   TokenWeightingMixin and TokenWeightingTrainer
    batches.py   what a batch holds: rows, their lengths and masks
    scoring.py   short NLL of a step's rows
    head.py      a causal language model that answers with NLLs in place of logits

docs/integrations/huggingface.md shows it at work.
"""

from megatron_tw.integrations.huggingface.config import TokenWeightingConfig
from megatron_tw.integrations.huggingface.trainer import TokenWeightingMixin, TokenWeightingTrainer

__all__ = ["TokenWeightingConfig", "TokenWeightingMixin", "TokenWeightingTrainer"]
