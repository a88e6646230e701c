"""From a configuration to a Megatron-Core model, Hugging Face names in and out, and the long and the short-window
forward."""
