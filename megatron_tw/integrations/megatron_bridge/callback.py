"""A callback of Megatron-Bridge that puts the token-weighted schedule in its training loop's hands.

The schedule is the one of the Megatron-LM plug-in; what differs is where a run says how far it is, and what it is
configured with.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from megatron_tw.config import WeightingOptions, WindowsConfig
from megatron_tw.integrations.arguments import arguments_named
from megatron_tw.integrations.megatron_bridge.checks import check_config
from megatron_tw.integrations.megatron_lm.options import TokenWeightingOptions
from megatron_tw.integrations.megatron_lm.schedule import Step, TokenWeightedSchedule
from megatron_tw.integrations.megatron_lm.seams import CORE_SEAMS, check_seams, seam
from megatron_tw.integrations.patches import apply_patches, remove_patches

NAME = "megatron_bridge"
_STEP = (
    "forward_step_func data_iterator model optimizer scheduler global_state pg_collection forward_backward_func "
    "p2p_communicator"
)
BRIDGE_SEAMS = (
    seam(
        "megatron.bridge.training.train",
        "get_forward_backward_func",
        "pp_size vp_size",
        "pp_size vp_size schedule_pg_collection",
    ),
    seam("megatron.bridge.training.train", "train_step", _STEP),
    seam("megatron.bridge.training.pretrain", "pretrain", "config forward_step_func callbacks"),
    seam("megatron.bridge.training.finetune", "finetune", "config forward_step_func callbacks"),
    seam("megatron.bridge.training.callbacks", "Callback.on_data_init_start", "self context"),
)


class TokenWeighting:
    """One of `callbacks` of `pretrain` and `finetune`.

    weighting: the scheme, as `--weighting` takes it. options: fields of WeightingOptions and WindowsConfig (those of
    the command line, with underscores), and bos_id.

    The schedule is in place from `on_data_init_start` until Megatron-Bridge's loop has taken it, which is once a run;
    `remove` takes it away from a run that ended in between.

    Raises:
        TypeError: an unknown option.
        ValueError: a value out of range, or options that do not go together; names the argument.
    """

    def __init__(self, weighting: str, *, bos_id: int | None = None, **options: Any) -> None:
        known = {field.name for kind in (WeightingOptions, WindowsConfig) for field in fields(kind)}
        if unknown := options.keys() - known:
            raise TypeError(f"TokenWeighting: expected options of {', '.join(sorted(known))}, got {min(unknown)}")
        windows = {field.name for field in fields(WindowsConfig)} & options.keys()
        self.options = TokenWeightingOptions(
            weighting=WeightingOptions(
                weighting=weighting, **{name: options[name] for name in options.keys() - windows}
            ),
            windows=WindowsConfig(**{name: options[name] for name in windows}),
            bos_id=bos_id,
        )
        with arguments_named():
            self.options.check(2**62)  # rows long enough for any window; others when they come

    def on_data_init_start(self, context: Any) -> None:
        """Called by Megatron-Bridge when the model stands and its loop has not begun.

        Raises:
            ValueError: the configuration cannot go with token weighting; names what.
            RuntimeError: this version of Megatron-Bridge or Megatron-Core is not one that was tried.
        """
        check_seams(CORE_SEAMS + BRIDGE_SEAMS)
        check_config(context.state.cfg, self.options)
        state = context.state

        def step() -> Step:
            done = state.train_state
            return Step(iteration=done.step, consumed=done.consumed_train_samples, seed=state.cfg.rng.seed)

        def weighted(own: Callable[..., Any]) -> Callable[..., Any]:
            def get_forward_backward_func(*groups: Any, **named: Any) -> Callable[..., Any]:
                self.remove()
                return TokenWeightedSchedule(own(*groups, **named), self.options, step)

            return get_forward_backward_func

        self.remove()  # what a run that failed has left
        apply_patches(NAME, {"get_forward_backward_func": weighted})

    @staticmethod
    def remove() -> None:
        """Give back the name that is rebound, in this process; nothing where none is."""
        remove_patches(NAME)
