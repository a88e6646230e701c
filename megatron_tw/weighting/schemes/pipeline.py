"""The schemes that compare two NLLs of a target (arXiv 2503.09202): steps from scores to weights, each one optional.

Shape suffixes: R rows, T targets of a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_tw.weighting.schemes.base import Scheme, Targets, check_choice, check_number
from megatron_tw.weighting.schemes.registry import preset
from megatron_tw.weighting.ties import top_targets

COMPARISONS = ("difference", "quotient")
NORMALIZATIONS = ("l1", "softmax")
TRANSFORMS = ("minus", "absolute", "exp", "max", "shift S")
STEPS = frozenset({"comparison", "transforms", "truncation", "sparsification", "normalization", "interpolation"})
QUOTIENT_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class WeightingConfig(Scheme):
    """From a target's two NLLs to its weight (arXiv 2503.09202): steps in the order of the fields; None skips one."""

    comparison: str = "difference"
    """`difference`: long NLL - short NLL. `quotient`: (long NLL + 1e-5) / (short NLL + 1e-5)."""
    transforms: tuple[str, ...] = ()
    """In the order given: `minus` (negate), `absolute`, `exp`, `max` (clip below at 0), `shift S` (subtract log S)."""
    truncation: float | None = None
    """Gamma: clip scores above at this value."""
    sparsification: float | None = None
    """Kappa in (0, 1]: the top max(1, int(kappa * L)) of a row's L valid targets get 1, the others 0."""
    normalization: str | None = None
    """`l1`: scores / (their sum of magnitudes) * L. `softmax`: softmax over the row, times L."""
    interpolation: float | None = None
    """Lambda in [0, 1]: weight = lambda + (1 - lambda) * score; 1 is plain cross-entropy."""

    when_none: ClassVar[Mapping[str, float]] = {"interpolation": 0.0}

    def __post_init__(self) -> None:
        check_choice("comparison", self.comparison, COMPARISONS)
        given: Any = self.transforms
        if isinstance(given, str):  # a sequence too, of letters
            raise ValueError(f"`transforms`: expected a list of them, got {given!r}")
        object.__setattr__(self, "transforms", tuple(self.transforms))  # YAML gives a list
        for transform in self.transforms:
            parse_transform(transform)
        check_number("truncation", self.truncation)
        check_number("sparsification", self.sparsification, above=0.0, at_most=1.0)
        if self.normalization is not None:
            check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_number("interpolation", self.interpolation, at_least=0.0, at_most=1.0)

    @property
    def needs_scorer(self) -> bool:
        """Whether weights depend on the short NLL: not with lambda = 1 or kappa = 1, which are plain cross-entropy."""
        return self.interpolation != 1.0 and self.sparsification != 1.0

    @property
    def leaves_targets_out(self) -> bool:
        """Whether some get no weight, by sparsification without interpolation."""
        return (self.sparsification or 1.0) < 1.0 and not self.interpolation

    @property
    def may_be_negative(self) -> bool:
        """Whether a weight can be below 0, which would teach the model to miss the target."""
        if self.sparsification is not None or self.normalization == "softmax" or self.interpolation == 1.0:
            return False
        negative = self.comparison == "difference"
        for transform, _ in map(parse_transform, self.transforms):
            negative = transform not in ("absolute", "exp", "max") and (negative or transform in ("minus", "shift"))
        return negative

    @property
    def numbers(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("truncation", "sparsification", "interpolation")}

    def uniform_limit(self) -> "WeightingConfig":
        return replace(self, interpolation=1.0)

    def check(self) -> None:
        if self.may_be_negative:
            raise ValueError(
                f"`transforms`: {' '.join(self.transforms) or 'none'} leaves weights below 0, which teach the "
                "model to miss its targets; expected absolute, exp or max at the end, or `sparsification`"
            )

    @staticmethod
    def preset(name: str, **parameters: float | None) -> Scheme:
        """Any registered scheme: see `preset` in registry.py."""
        return preset(name, **parameters)

    def weights(self, targets: Targets) -> Tensor:
        if not self.needs_scorer:
            return torch.ones_like(targets.long_RT)
        assert targets.short_RT is not None
        return self._weights(self._scores(targets.long_RT, targets.short_RT), targets)

    def _scores(self, long_RT: Tensor, short_RT: Tensor) -> Tensor:
        if self.comparison == "difference":
            scores_RT = long_RT - short_RT
        else:
            scores_RT = (long_RT + QUOTIENT_EPS) / (short_RT + QUOTIENT_EPS)
        for name, amount in map(parse_transform, self.transforms):
            match name:
                case "minus":
                    scores_RT = -scores_RT
                case "absolute":
                    scores_RT = scores_RT.abs()
                case "exp":
                    scores_RT = scores_RT.exp()
                case "max":
                    scores_RT = scores_RT.clamp(min=0.0)
                case "shift":
                    scores_RT = scores_RT - math.log(amount)
                case _:
                    raise AssertionError(name)
        return scores_RT if self.truncation is None else scores_RT.clamp(max=self.truncation)

    def _weights(self, scores_RT: Tensor, targets: Targets) -> Tensor:
        valid_RT = targets.valid_RT
        lengths_R = valid_RT.sum(dim=1)
        if self.sparsification is not None:
            # In fp64, as Python's int(kappa * L): in fp32 0.2 * 255 may come out below 51.
            counts_R = (self.sparsification * lengths_R.double()).long().clamp(min=1).minimum(lengths_R)
            scores_RT = top_targets(scores_RT, counts_R, valid_RT, targets.row_ids_R, targets.seed).double()
        if self.normalization == "l1":
            sums_R1 = torch.where(valid_RT, scores_RT.abs(), 0.0).sum(dim=1, keepdim=True)
            scores_RT = torch.where(sums_R1 > 0, scores_RT * (lengths_R[:, None] / sums_R1), 1.0)
        elif self.normalization == "softmax":
            scores_RT = scores_RT.masked_fill(~valid_RT, -torch.inf).softmax(dim=1) * lengths_R[:, None]
        if self.interpolation is not None:
            scores_RT = self.interpolation + (1.0 - self.interpolation) * scores_RT
        return scores_RT


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A kind of pipeline by a published name.

    settings: the steps that make it. numbers: what a schedule's stage may give, and the defaults; `shift` is the amount
    of the transform `shift`. options, refusals: as in Scheme; every step may be given another setting, unless said.
    """

    settings: Mapping[str, Any]
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    options: frozenset[str] = STEPS
    refusals: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> dict[str, float | None]:
        return dict(self.numbers)

    def create(self, **settings: Any) -> WeightingConfig:
        """The pipeline with these numbers and steps in place of its own.

        Raises:
            ValueError: a value out of range; names the field.
        """
        given = {name: value for name, value in settings.items() if name in self.numbers}
        values = {**self.settings, **self.numbers, **given}
        shift = f"shift {values.pop('shift', None)}"
        values["transforms"] = tuple(
            shift if transform == "shift" else transform for transform in values.pop("transforms", ())
        )
        steps = {name: value for name, value in settings.items() if name not in self.numbers}
        return replace(WeightingConfig(**values), **steps)


def parse_transform(text: str) -> tuple[str, float]:
    """Name and amount of a transform; the amount of those that take none is 0.

    >>> parse_transform("shift 2"), parse_transform("exp")
    (('shift', 2.0), ('exp', 0.0))
    """
    name, *amounts = str(text).split() or [""]
    if f"{name} S" in TRANSFORMS and len(amounts) == 1:
        try:
            amount = float(amounts[0])
        except ValueError:
            amount = math.nan
        if not (0 < amount < math.inf):
            raise ValueError(f"`shift`: expected a number > 0, got {amounts[0]!r} (in `transforms` {text!r})")
        return name, amount
    if name not in TRANSFORMS or amounts:
        raise ValueError(f"`transforms`: expected any of {', '.join(TRANSFORMS)}, got {text!r}")
    return name, 0.0
