"""Token weighting inside Megatron-LM's own training, without a fork. See docs/integrations/megatron_lm.md.

torchrun ... -m megatron_tw.integrations.megatron_lm pretrain_gpt.py ARGUMENTS --token-weighting dense
    --short-window 8192
"""
