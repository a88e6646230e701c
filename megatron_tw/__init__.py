"""Long-context training with a token-weighted loss, on Megatron-Core."""

__version__ = "0.1.0"
