"""Warnings of libraries that nobody who runs a program can do anything about."""

import warnings

_MESSAGES = (
    # Megatron-Core says these once per module and rank. Transformer Engine and Apex are optional here.
    ".*Apex (is|are) not installed.*",
    "full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch\.distributed\.\w+` is deprecated",
)


def quiet_libraries() -> None:
    """Show them no more in this process. For programs, before they import Megatron-Core; a library leaves warnings
    alone."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
