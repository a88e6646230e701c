"""Errors in the words of people who give arguments in Python, not options on a command line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_ARGUMENTS = {"name": "weighting", "schedule": "weighting_schedule", "window": "short_window", "stride": "short_stride"}
"""What the library calls otherwise."""


@contextmanager
def arguments_named() -> Iterator[None]:
    """Errors name the argument as Python has it, not as programs (--short-window) or the library do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_argument_names(str(error))) from None


def _argument_names(text: str) -> str:
    """
    >>> _argument_names("--short-window: expected more than --short-stride, got -1")
    'short_window: expected more than short_stride, got -1'
    >>> _argument_names("`name`: expected one of uniform, dense, got 'dens'")
    "weighting: expected one of uniform, dense, got 'dens'"
    """
    text = re.sub(r"--([a-z][a-z-]*)", lambda name: name[1].replace("-", "_"), text)
    return re.sub(r"`(\w+)`", lambda name: _ARGUMENTS.get(name[1], name[1]), text)
