"""From a configuration to a Megatron-Core model, Hugging Face names in and out, and the long and the short-window
forward."""

from megatron_tw.config.late_compile import compile_late

with compile_late():  # programs meet Megatron-Core here first
    import megatron.core  # noqa: F401
