"""The plug-in, put in and taken out: the patches of the table, and what stands in their place."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_tw.integrations.megatron_lm.checks import check_arguments
from megatron_tw.integrations.megatron_lm.options import MAIN, add_arguments, options_from
from megatron_tw.integrations.megatron_lm.schedule import Step, TokenWeightedSchedule
from megatron_tw.integrations.megatron_lm.seams import check_seams
from megatron_tw.integrations.patches import apply_patches, remove_patches

NAME = "megatron_lm"


def install() -> None:
    """Have Megatron-LM's `pretrain()` take the options of token weighting, and do as they say. Twice is once. For a
    script of one's own, before it parses its arguments; the launcher does it for one that knows nothing of it.

    Raises:
        RuntimeError: this version of Megatron is not one that was tried.
    """
    check_seams()
    apply_patches(
        NAME,
        {
            "parse_args": _parse_with_options,
            "validate_args": _validate_with_options,
            "get_forward_backward_func": _weighted_schedule,
        },
    )


def remove() -> None:
    """Give Megatron-LM its own names back. What it was not installed in stays as it is."""
    remove_patches(NAME)


def _parse_with_options(own: Callable[..., Any]) -> Callable[..., Any]:
    def parse_args(extra_args_provider: Any = None, ignore_unknown_args: bool = False) -> argparse.Namespace:
        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = parser if extra_args_provider is None else extra_args_provider(parser)
            known = {action.dest for action in parser._actions}
            return parser if MAIN in known else add_arguments(parser)  # a script may name add_arguments itself

        args: argparse.Namespace = own(provider, ignore_unknown_args)
        return args

    return parse_args


def _validate_with_options(own: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: argparse.Namespace, defaults: Any = None) -> Any:
        validated = own(args, {} if defaults is None else defaults)
        options = options_from(args)
        if options is not None:
            check_arguments(args, options)
        return validated

    return validate_args


def _weighted_schedule(own: Callable[..., Any]) -> Callable[..., Any]:
    def get_forward_backward_func(*groups: Any, **named: Any) -> Callable[..., Any]:
        from megatron.training import get_args

        schedule: Callable[..., Any] = own(*groups, **named)
        options = options_from(get_args())
        return schedule if options is None else TokenWeightedSchedule(schedule, options, _step)

    return get_forward_backward_func


def _step() -> Step:
    from megatron.training import get_args

    args = get_args()
    return Step(iteration=args.curr_iteration, consumed=args.consumed_train_samples, seed=args.seed)
