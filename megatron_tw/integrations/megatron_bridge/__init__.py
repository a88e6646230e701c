"""Token weighting inside Megatron-Bridge's `pretrain` and `finetune`. See docs/integrations/megatron_bridge.md.

from megatron_tw.integrations.megatron_bridge import TokenWeighting

pretrain(config, forward_step, callbacks=[TokenWeighting("dense", short_window=8192)])
"""

from megatron_tw.integrations.megatron_bridge.callback import TokenWeighting

__all__ = ["TokenWeighting"]
