"""What a Trainer is told of token weighting: one frozen dataclass, with the names of this project's options."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from megatron_tw.config import ShortWindows, WindowsConfig, check_windows
from megatron_tw.integrations.arguments import arguments_named
from megatron_tw.weighting import Scheme, WeightingSchedule, parse_schedule
from megatron_tw.weighting.schedule import ScheduleEntries, Stage
from megatron_tw.weighting.schemes import preset

ScorerName = Literal["unfrozen", "frozen", "column"]
COLUMN = "short_nll"
"""The column of a dataset that holds the short NLL, as `labels` are laid out: entry j is that of token j, entry 0 is
not read."""


@dataclass(frozen=True, kw_only=True)
class TokenWeightingConfig:
    """How a Trainer weights its tokens.

    Raises:
        ValueError: a value out of range, or arguments that do not go together; names the argument.
    """

    weighting: str | Scheme = "dense"
    """The name of a scheme (uniform, dense, sparse, longce, ppmi, npmi, rho1, exact, or one that was registered), or a
    scheme itself (WeightingConfig, ExactConfig)."""
    weighting_parameters: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the named scheme, such as {"interpolation": 0.75}; others keep their published values."""
    weighting_schedule: ScheduleEntries | None = None
    """Schemes that follow each other over the steps (see `parse_schedule`), in which `base` is `weighting`."""
    scorer: ScorerName = "unfrozen"
    """Whose NLL the long NLL is compared with, where the scheme compares: the model in training, limited to short
    windows (unfrozen); another model, which stays as it is (frozen); or the dataset's column `short_nll` (column)."""
    scorer_hf: str | nn.Module | None = None
    """The frozen scorer: a folder or a name on the hub, or a causal language model that is loaded already."""
    short_window: int | None = None
    """Tokens of a short window: the context that the base model was trained on."""
    short_stride: int | None = None
    """Tokens from one window to the next (None: (1 - window/row) x window, or less to keep the least context)."""
    min_short_context: int | None = None
    """Least context that a target beyond the first window must have, in tokens (None: a quarter of the window)."""
    scoring_micro_batch: int | None = None
    """Windows of one forward pass on a rank (None: as many as hold the tokens of a micro-batch)."""
    bos_id: int | None = None
    """Token that stands first in every window of a row that begins with it (None: the model's `bos_token_id`)."""
    seed: int | None = None
    """Of the choice between equal scores in sparse schemes (None: the Trainer's `seed`)."""

    def __post_init__(self) -> None:
        with arguments_named():
            schedule = self.schedule
            schedule.check()
            if self.short_window is not None:
                check_windows(self.windows, 2**62)  # a row long enough for any window; others when they come
            elif self.short_stride is not None:
                raise ValueError("short_stride: expected short_window with it, got None")
        if self.scorer not in get_args(ScorerName):
            raise ValueError(f"scorer: expected one of {', '.join(get_args(ScorerName))}, got {self.scorer!r}")
        if (self.scorer == "frozen") != (self.scorer_hf is not None):
            raise ValueError(
                f"scorer_hf: expected {'a model' if self.scorer == 'frozen' else 'None'} with scorer={self.scorer!r}, "
                f"got {self.scorer_hf if isinstance(self.scorer_hf, str) else type(self.scorer_hf).__name__}"
            )
        if schedule.needs_scorer and self.scorer != "column" and self.short_window is None:
            raise ValueError(
                f"short_window: expected the tokens of a short context, which weighting={self.weighting!r} compares "
                "with, got None"
            )

    @property
    def schedule(self) -> WeightingSchedule:
        """The scheme of every step.

        Raises:
            ValueError: see `preset` and `parse_schedule`.
        """
        scheme = self.weighting
        if isinstance(scheme, str):
            scheme = preset(scheme, **self.weighting_parameters)
        elif not isinstance(scheme, Scheme):
            raise ValueError(f"weighting: expected a name or a scheme, got {type(scheme).__name__}")
        elif self.weighting_parameters:
            raise ValueError("weighting_parameters: expected none beside a weighting that is a scheme with its numbers")
        if self.weighting_schedule is None:
            return WeightingSchedule((Stage(0, None, scheme),))
        return parse_schedule(self.weighting_schedule, base=scheme)

    @property
    def windows(self) -> WindowsConfig:
        return WindowsConfig(
            short_window=self.short_window,
            short_stride=self.short_stride,
            min_short_context=self.min_short_context,
            scoring_micro_batch=self.scoring_micro_batch,
        )

    def windows_of(self, length: int) -> ShortWindows:
        """The short windows of a row of `length` tokens, longer than one window.

        Raises:
            ValueError: they leave some target too little context.
        """
        with arguments_named():
            check_windows(self.windows, length)
        decided = self.windows.of_rows(length)
        assert decided is not None, "no short_window"
        return decided


def as_config(value: Any) -> TokenWeightingConfig:
    """What a trainer was given as `token_weighting`.

    Raises:
        ValueError: nothing, or something else.
    """
    if isinstance(value, TokenWeightingConfig):
        return value
    raise ValueError(
        "token_weighting: expected a TokenWeightingConfig, as an argument of the trainer or as an attribute of its "
        f"class, got {value!r}"
    )
