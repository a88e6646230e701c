"""Imports without PyTorch's compiler.

Megatron-Core hands many of its small functions to `torch.compile` when it is imported, which imports the compiler: half
of a program's start, also where none of these functions is ever called.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def compile_late() -> Iterator[None]:
    """Within, `torch.compile` gives functions that are compiled when they are first called."""
    import torch

    compile_now = torch.compile
    torch.compile = functools.partial(_compile_late, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _compile_late(compile_now: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    """`torch.compile(model, **options)` for a function, or the decorator where none is given."""
    if model is None:
        return functools.partial(_compile_late, compile_now, **options)
    compiled: Any = None

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = compile_now(model, **options)
        return compiled(*args, **kwargs)

    return call
