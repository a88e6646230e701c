"""Every name of others that the integrations rebind, in two tables: names of modules, while a run is token-weighted
(and how they are rebound and given back), and attributes of objects, within one call. Nothing else is rebound: a test
compares the tables with the code of all files here.

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


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Of an object that is not ours: set within a call, and given back at its end, after an exception too.

    file: where it is set, in this folder. name: as it stands there. why: what it is for.
    """

    file: str
    name: str
    why: str


WITHIN_A_CALL = (
    Attribute(
        file="huggingface/head.py",
        name="head.forward",
        why="the model's output projection answers with NLLs, within one forward pass",
    ),
    Attribute(
        file="megatron_lm/hidden_loss.py",
        name="end.output_layer.forward",
        why="hands the hidden states through, within one call of the schedule",
    ),
    Attribute(
        file="megatron_lm/hidden_loss.py",
        name="end.compute_language_model_loss",
        why="makes the NLL from hidden states, within one call of the schedule",
    ),
    Attribute(
        file="megatron_lm/own_attention.py",
        name="chunk.rotary_pos_emb",
        why="angles of the slice that a call names, within one call of the schedule; with this project's attention",
    ),
    Attribute(
        file="megatron_lm/own_attention.py",
        name="chunk.register_forward_pre_hook",
        why="says over which ranks rows lie, within one call of the schedule; with this project's attention",
    ),
    Attribute(
        file="megatron_lm/window_pass.py",
        name="config.timers",
        why="the schedule's timers are the long pass's, so none within the scoring",
    ),
    Attribute(
        file="megatron_lm/window_pass.py",
        name="chunk.eval",
        why="nothing is dropped within the scoring",
    ),
    Attribute(
        file="huggingface/scoring.py",
        name="os.environ[_EFFICIENT]",
        why="a frozen scorer is loaded whole on every process, while it is loaded",
    ),
    Attribute(
        file="huggingface/trainer.py",
        name="model.eval",
        why="nothing is dropped within the scoring; the Trainer's own step turns training on again",
    ),
    Attribute(file="megatron_lm/__main__.py", name="sys.argv", why="the script's own, while it runs"),
    Attribute(file="megatron_lm/__main__.py", name="sys.path[0]", why="the script's folder, while it runs"),
)


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
