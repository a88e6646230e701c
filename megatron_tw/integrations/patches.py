"""Every name of another project that the integrations rebind, in one table, and how they are rebound and given back.

A replacement is made from what it stands for, which it keeps and calls. Applying twice is applying once; removing what
is not there is nothing.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_OWN = "_megatron_tw_own"


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A name that is rebound while a run is token-weighted.

    integration: which one does it. module, name: where it stands. why: what the replacement adds. optional: not every
    supported version has it.
    """

    integration: str
    module: str
    name: str
    why: str
    optional: bool = False

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"


PATCHES = (
    Patch(
        integration="megatron_lm",
        module="megatron.training.arguments",
        name="parse_args",
        why="the options of this project stand beside Megatron-LM's",
    ),
    Patch(
        integration="megatron_lm",
        module="megatron.training.arguments",
        name="validate_args",
        why="combinations that would train something else are refused before anything is allocated",
    ),
    Patch(
        integration="megatron_lm",
        module="megatron.training.initialize",
        name="parse_args",
        why="the same; up to 0.17 the name is taken from here",
        optional=True,
    ),
    Patch(
        integration="megatron_lm",
        module="megatron.training.initialize",
        name="validate_args",
        why="the same; up to 0.17 the name is taken from here",
        optional=True,
    ),
    Patch(
        integration="megatron_lm",
        module="megatron.training.training",
        name="get_forward_backward_func",
        why="a step scores its micro-batches in short windows first, and weights their losses",
    ),
    Patch(
        integration="megatron_bridge",
        module="megatron.bridge.training.train",
        name="get_forward_backward_func",
        why="a step scores its micro-batches in short windows first, and weights their losses",
    ),
)

WITHIN_A_STEP = ("output_layer.forward", "compute_language_model_loss", "rotary_pos_emb")
"""Attributes of the model that are set for the time of one schedule, and given back at its end (hidden_loss.py; the
last one only with this project's attention, own_attention.py)."""


def patches_of(integration: str) -> tuple[Patch, ...]:
    """The rows of the table that this integration rebinds."""
    return tuple(patch for patch in PATCHES if patch.integration == integration)


def apply_patches(integration: str, replacements: Mapping[str, Callable[[Any], Any]]) -> None:
    """Rebind the names of `integration`.

    replacements: by name, a function that makes the replacement from what stands there.

    Raises:
        RuntimeError: a name that is not there.
    """
    for patch in patches_of(integration):
        module = import_module(patch.module)
        own = getattr(module, patch.name, None)
        if own is None:
            if patch.optional:
                continue
            raise RuntimeError(f"{patch.target}: not in this version, so that token weighting cannot be added")
        if not hasattr(own, _OWN):
            replacement = functools.wraps(own)(replacements[patch.name](own))
            setattr(replacement, _OWN, own)
            setattr(module, patch.name, replacement)


def remove_patches(integration: str) -> None:
    """Give the names of `integration` back.

    Raises:
        RuntimeError: somebody else has wrapped a replacement since.
    """
    for patch in patches_of(integration):
        try:
            module = import_module(patch.module)
        except ImportError:
            continue
        bound = getattr(module, patch.name, None)
        if hasattr(bound, _OWN):
            if hasattr(getattr(bound, "__wrapped__", None), _OWN):
                raise RuntimeError(f"{patch.target}: wrapped by another since; take that away first")
            setattr(module, patch.name, getattr(bound, _OWN))


def applied_patches() -> tuple[Patch, ...]:
    """The rows of the table that are in force in this process. Imports nothing."""
    import sys

    return tuple(
        patch
        for patch in PATCHES
        if patch.module in sys.modules and hasattr(getattr(sys.modules[patch.module], patch.name, None), _OWN)
    )
