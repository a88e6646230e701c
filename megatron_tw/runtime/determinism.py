"""--deterministic-mode: what libraries read from the environment and from PyTorch, as Megatron-LM's training code sets
it (megatron/training/determinism.py). Megatron-Core's part is a field of its configuration."""

import os
from collections.abc import Callable, MutableMapping

import torch

_NCCL_ALGORITHMS = {"Ring", "CollnetDirect", "CollnetChain", "^NVLS"}
"""Those whose sums are in the same order each time; of the trees NCCL does not promise it."""
_WANTED: dict[str, tuple[str, str, Callable[[str], bool]]] = {
    "NCCL_ALGO": (
        "Ring",
        f"some of {', '.join(sorted(_NCCL_ALGORITHMS))}",
        lambda value: {name.strip() for name in value.split(",")} <= _NCCL_ALGORITHMS,
    ),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":4096:8 or :16:8", lambda value: value in (":4096:8", ":16:8")),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", "0", lambda value: value == "0"),
}
"""By variable: the value where nobody gave one; what else is right, in words and as a test."""


def be_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set, and have PyTorch refuse what is not deterministic. Before CUDA and NCCL begin: they read the
    environment once.

    Raises:
        ValueError: a variable says the opposite.
    """
    for name, (_, expected, right) in _WANTED.items():
        if name in environment and not right(environment[name]):
            raise ValueError(f"--deterministic-mode: {name}: expected {expected}, got {environment[name]!r}")
    for name, (value, _, _) in _WANTED.items():
        environment.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
