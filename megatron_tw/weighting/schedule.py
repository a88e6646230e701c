"""Weighting that changes over the steps of a run: stages that follow each other, at once or by moving the numbers.

    --weighting-schedule "0: uniform; 100 linear: dense interpolation=0.75; 300: sparse sparsification=0.2"

is uniform at step 0, moves to lambda 0.75 until step 100, stays there, and is sparse from step 300 on. In YAML:

    weighting_schedule:
      - 0: uniform
      - 100 linear: dense interpolation=0.75
      - 300: sparse sparsification=0.2
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_tw.weighting.config import ExactConfig, Weighting, WeightingConfig

BASE = "base"  # the scheme that the run's other weighting options make
STAGE = re.compile(r"(?P<step>\d+)(?:\s+(?P<move>\w+))?\s*:\s*(?P<scheme>\w+)(?P<parameters>(?:\s+\w+=\S+)*)")
MOVES = {"linear": lambda done: done, "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2}

ScheduleEntries = str | Mapping[Any, str] | Iterable[str | Mapping[Any, str]]


class Stage(NamedTuple):
    """A scheme that holds from `step` on. With a `move`, the numbers go there from the stage before, all the way."""

    step: int
    move: str | None
    scheme: Weighting


@dataclass(frozen=True)
class WeightingSchedule:
    """Stages in the order of their steps, the first at step 0. Step k is the one that k steps have gone before."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        steps = [stage.step for stage in self.stages]
        if not steps or steps[0] != 0 or self.stages[0].move is not None:
            raise ValueError("--weighting-schedule: expected the first stage at step 0, without linear or cosine")
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            if stage.step <= before.step:
                raise ValueError(
                    f"--weighting-schedule: expected steps in rising order, got {stage.step} after {before.step}"
                )
            if stage.move is not None:
                _mix(before.scheme, stage.scheme, 0.5)  # raises now, not in the middle of a run

    def at(self, step: int) -> Weighting:
        """The scheme of a step.

        >>> schedule = parse_schedule("0: uniform; 100 linear: dense interpolation=0.6; 300: sparse sparsification=0.2")
        >>> [schedule.at(step).interpolation for step in (0, 50, 100, 299)], schedule.at(300).sparsification
        ([1.0, 0.8, 0.6, 0.6], 0.2)
        """
        index = max(index for index, stage in enumerate(self.stages) if stage.step <= step)
        now, after = self.stages[index], self.stages[index + 1 : index + 2]
        if not after or after[0].move is None:
            return now.scheme
        done = (step - now.step) / (after[0].step - now.step)
        return _mix(now.scheme, after[0].scheme, MOVES[after[0].move](done))

    @property
    def needs_scorer(self) -> bool:
        """Whether any step does; `at(step).needs_scorer` says which."""
        return any(stage.scheme.needs_scorer for stage in self.stages)

    @property
    def leaves_targets_out(self) -> bool:
        """Whether a stage gives some targets no weight, by sparsification without interpolation."""
        schemes = [stage.scheme for stage in self.stages if isinstance(stage.scheme, WeightingConfig)]
        return any((scheme.sparsification or 1.0) < 1.0 and not scheme.interpolation for scheme in schemes)


def parse_schedule(entries: ScheduleEntries, *, base: Weighting | None = None) -> WeightingSchedule:
    """The schedule of `--weighting-schedule`.

    Stages are "STEP: SCHEME NAME=NUMBER ...", or "STEP linear: ..." and "STEP cosine: ..." to move there from the one
    before. SCHEME is a preset with its parameters, or `base`, the scheme of the run's other options. Only numbers of
    one scheme can move; uniform counts as any scheme with lambda 1 (exact: alpha 0), so moving from it is a warm-in.

    Args:
        entries: stages in one string, separated by ";", or a list of stages, or mappings as YAML reads them.
        base: what `base` stands for.

    Raises:
        ValueError: names the stage that cannot be read, or cannot be reached by a move.
    """
    return WeightingSchedule(tuple(_parse_stage(text, base) for text in _stage_texts(entries)))


def _stage_texts(entries: ScheduleEntries) -> list[str]:
    if isinstance(entries, str):
        return [text.strip() for text in entries.split(";") if text.strip()]
    if isinstance(entries, Mapping):
        return [f"{when}: {scheme}" for when, scheme in entries.items()]
    return [text for entry in entries for text in _stage_texts(entry)]


def _parse_stage(text: str, base: Weighting | None) -> Stage:
    match = STAGE.fullmatch(text)
    if match is None or (match["move"] is not None and match["move"] not in MOVES):
        raise ValueError(
            f"--weighting-schedule: expected 'STEP: SCHEME NAME=NUMBER ...', {' or '.join(MOVES)} after STEP to move, "
            f"got {text!r}"
        )
    try:
        pairs = (pair.split("=", 1) for pair in match["parameters"].split())
        parameters: dict[str, Any] = {name: float(number) for name, number in pairs}
        if match["scheme"] != BASE:
            scheme = WeightingConfig.preset(match["scheme"], **parameters)
        elif base is None:
            raise ValueError(f"{BASE} stands for the scheme of --weighting, which is not given")
        else:
            known = _numbers(base)
            if unknown := [name for name in parameters if name not in known]:
                raise ValueError(f"{BASE} has the numbers {', '.join(known)}, not {', '.join(unknown)}")
            scheme = replace(base, **parameters)
    except ValueError as error:
        raise ValueError(f"--weighting-schedule: in {text!r}: {error}") from None
    return Stage(int(match["step"]), match["move"], scheme)


def _numbers(scheme: Weighting) -> dict[str, Any]:
    """The fields that can move."""
    names = (
        ("alpha", "gamma", "tau")
        if isinstance(scheme, ExactConfig)
        else ("truncation", "sparsification", "interpolation")
    )
    return {name: getattr(scheme, name) for name in names}


def _as_uniform(scheme: Weighting) -> Weighting:
    return replace(scheme, alpha=0.0) if isinstance(scheme, ExactConfig) else replace(scheme, interpolation=1.0)


def _mix(before: Weighting, after: Weighting, share: float) -> Weighting:
    """The scheme a `share` of the way from `before` to `after`."""
    uniform = WeightingConfig.preset("uniform")
    before, after = (
        _as_uniform(after) if before == uniform else before,
        _as_uniform(before) if after == uniform else after,
    )
    if type(before) is not type(after) or replace(before, **_numbers(after)) != after:
        raise ValueError(
            f"--weighting-schedule: only the numbers of one scheme can move, got {before} and then {after}"
        )
    mixed: dict[str, Any] = {}
    for (name, start), end in zip(_numbers(before).items(), _numbers(after).values(), strict=True):
        if start == end:
            mixed[name] = start
            continue
        if name == "interpolation":  # no interpolation is lambda 0
            start, end = start or 0.0, end or 0.0
        if start is None or end is None:
            raise ValueError(f"--weighting-schedule: {name} cannot move from {start} to {end}, give both as numbers")
        mixed[name] = (1 - share) * start + share * end
    return replace(after, **mixed)
