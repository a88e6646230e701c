"""Long-context training with a token-weighted loss, on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says these once per module and rank; nobody who runs it can do anything about them. Transformer Engine
# and Apex are optional here.
for _message in (
    ".*Apex (is|are) not installed.*",
    "full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch\.distributed\.\w+` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
