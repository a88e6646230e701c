"""Long-context training with a token-weighted loss, on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Transformer Engine and Apex are optional here; Megatron-Core says once per module and rank that it does without them.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*", category=UserWarning)
