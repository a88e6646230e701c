"""How scores become weights: the settings of a scheme, checked where they are made, and presets by published names."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

COMPARISONS = ("difference", "quotient")
NORMALIZATIONS = ("l1", "softmax")
TRANSFORMS = ("minus", "absolute", "exp", "max", "shift S")


@dataclass(frozen=True, kw_only=True)
class WeightingConfig:
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

    def __post_init__(self) -> None:
        _check_choice("comparison", self.comparison, COMPARISONS)
        object.__setattr__(self, "transforms", tuple(self.transforms))  # YAML gives a list
        for transform in self.transforms:
            parse_transform(transform)
        _check_number("truncation", self.truncation)
        _check_number("sparsification", self.sparsification, above=0.0, at_most=1.0)
        if self.normalization is not None:
            _check_choice("normalization", self.normalization, NORMALIZATIONS)
        _check_number("interpolation", self.interpolation, at_least=0.0, at_most=1.0)

    @property
    def needs_scorer(self) -> bool:
        """Whether weights depend on the short NLL: not with lambda = 1 or kappa = 1, which are plain cross-entropy."""
        return self.interpolation != 1.0 and self.sparsification != 1.0

    @property
    def may_be_negative(self) -> bool:
        """Whether a weight can be below 0, which would teach the model to miss the target."""
        if self.sparsification is not None or self.normalization == "softmax" or self.interpolation == 1.0:
            return False
        negative = self.comparison == "difference"
        for transform, _ in map(parse_transform, self.transforms):
            negative = transform not in ("absolute", "exp", "max") and (negative or transform in ("minus", "shift"))
        return negative

    @staticmethod
    def preset(name: str, **parameters: float | None) -> "Weighting":
        """The scheme called `name`, with published settings for what `parameters` (see `PRESETS`) leaves open.

        Raises:
            ValueError: unknown preset or parameter (the known ones are listed), or a value out of range.
        """
        if name not in PRESETS:
            raise ValueError(f"--weighting: expected one of {', '.join(PRESETS)}, got {name!r}")
        preset = PRESETS[name]
        for parameter in parameters:
            if parameter not in preset.parameters:
                known = ", ".join(preset.parameters) or "no parameter"
                raise ValueError(f"--{parameter.replace('_', '-')}: --weighting {name} takes {known}")
        values = preset.settings | preset.parameters | parameters
        if name == "exact":
            return ExactConfig(**values)
        shift = f"shift {values.pop('shift', None)}"
        values["transforms"] = tuple(
            shift if transform == "shift" else transform for transform in values.pop("transforms", ())
        )
        return WeightingConfig(**values)


@dataclass(frozen=True, kw_only=True)
class ExactConfig:
    """EXACT (arXiv 2605.10544): weights from the length of a target's context alone, so it needs no scorer.

    Targets are put in log2 buckets of their context (tokens since the start of their document). In the tail, which is
    the buckets that start at `tau` or more, a bucket with the share q_b of the row's tail targets gets the weight
    1 + alpha * r_b / sum_j(q_j * r_j) with r_b = (q_b + eps)^-gamma; other targets get 1. The mean weight of the tail
    is 1 + alpha.
    """

    alpha: float = 0.15
    """Mean extra weight of a tail target, >= 0."""
    gamma: float = 0.5
    """How much rare lengths are favoured; 0 weighs the whole tail alike."""
    tau: float = 1024
    """Least context in tokens of the tail; published: 1024, 2048, 4096 for rows of 4096, 8192, 16384 tokens."""
    eps: float = 1e-8
    """Added to a share before the power."""

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, at_least=0.0, optional=False)
        _check_number("gamma", self.gamma, optional=False)
        _check_number("tau", self.tau, at_least=1.0, optional=False)
        _check_number("eps", self.eps, at_least=0.0, optional=False)

    @property
    def needs_scorer(self) -> bool:
        return False


Weighting = WeightingConfig | ExactConfig


class Preset(NamedTuple):
    """What a scheme fixes, and its parameters with their defaults; `shift` is the amount of the transform `shift`."""

    settings: dict[str, Any]
    parameters: dict[str, float | None]


PRESETS: dict[str, Preset] = {
    "uniform": Preset({"interpolation": 1.0}, {}),
    "dense": Preset({"transforms": ["absolute"], "normalization": "l1"}, {"interpolation": 0.75}),
    "sparse": Preset({"transforms": ["absolute"], "normalization": "l1"}, {"sparsification": 0.2}),
    "longce": Preset({"transforms": ["minus", "exp"]}, {"truncation": 5.0}),  # LongCE, ICLR 2025
    "ppmi": Preset(
        {"transforms": ["minus", "shift", "max"], "normalization": "l1"}, {"shift": 2.0, "sparsification": None}
    ),
    "npmi": Preset(  # negative PMI
        {"transforms": ["shift", "max"], "normalization": "l1"}, {"shift": 2.0, "sparsification": None}
    ),
    "rho1": Preset({"normalization": "l1"}, {"sparsification": 0.6}),  # Rho-1: the excess loss over the scorer's
    "exact": Preset({}, {"alpha": 0.15, "gamma": 0.5, "tau": 1024}),
}


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
            raise ValueError(f"--shift: expected a number > 0, got {amounts[0]!r} (in --transforms {text!r})")
        return name, amount
    if name not in TRANSFORMS or amounts:
        raise ValueError(f"--transforms: expected any of {', '.join(TRANSFORMS)}, got {text!r}")
    return name, 0.0


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"--{option}: expected one of {', '.join(choices)}, got {value!r}")


def _check_number(
    option: str,
    value: float | None,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    optional: bool = True,
) -> None:
    if value is None and optional:
        return
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = fits and (above is None or value > above)  # type: ignore[operator]
    fits = fits and (at_least is None or value >= at_least)  # type: ignore[operator]
    fits = fits and (at_most is None or value <= at_most)  # type: ignore[operator]
    if not fits:
        lower = f"({above:g}" if above is not None else f"[{at_least:g}" if at_least is not None else "(-inf"
        upper = f"{at_most:g}]" if at_most is not None else "inf)"
        raise ValueError(f"--{option}: expected a finite number in {lower}, {upper}, got {value!r}")
