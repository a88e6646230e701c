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

from megatron_tw.weighting.schemes import Scheme, preset

BASE = "base"  # the scheme that the run's other weighting options make
STAGE = re.compile(r"(?P<step>\d+)(?:\s+(?P<move>\w+))?\s*:\s*(?P<scheme>\w+)(?P<parameters>(?:\s+\w+=\S+)*)")
MOVES = {"linear": lambda done: done, "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2}

ScheduleEntries = str | Mapping[Any, str] | Iterable[str | Mapping[Any, str]]


class Stage(NamedTuple):
    """A scheme that holds from `step` on. With a `move`, the numbers go there from the stage before, all the way."""

    step: int
    move: str | None
    scheme: Scheme


@dataclass(frozen=True)
class WeightingSchedule:
    """Stages in the order of their steps, the first at step 0. Step k is the one that k steps have gone before."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        steps = [stage.step for stage in self.stages]
        if not steps or steps[0] != 0 or self.stages[0].move is not None:
            raise ValueError("`schedule`: expected the first stage at step 0, without linear or cosine")
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            if stage.step <= before.step:
                raise ValueError(f"`schedule`: expected steps in rising order, got {stage.step} after {before.step}")
            if stage.move is not None:
                _mix(before.scheme, stage.scheme, 0.5)  # raises now, not in the middle of a run

    def at(self, step: int) -> Scheme:
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
        """Whether a stage gives some targets no weight."""
        return any(stage.scheme.leaves_targets_out for stage in self.stages)

    def check(self) -> None:
        """Raises ValueError where the weights of a stage could do harm."""
        for stage in self.stages:
            stage.scheme.check()

    def check_rows(self, seq_length: int) -> None:
        """Raises ValueError where rows of `seq_length` tokens are not what a stage is for."""
        for stage in self.stages:
            stage.scheme.check_rows(seq_length)


def parse_schedule(schedule: ScheduleEntries, *, base: Scheme | None = None) -> WeightingSchedule:
    """The schedule that a text (of `--weighting-schedule`, say) describes.

    Stages are "STEP: SCHEME NAME=NUMBER ...", or "STEP linear: ..." and "STEP cosine: ..." to move there from the one
    before. SCHEME is a registered one with its numbers, or `base`, that of the run's other options. Only numbers of one
    scheme can move; uniform counts as any scheme with lambda 1 (exact: alpha 0), so moving from it is a warm-in.

    Args:
        schedule: stages in one string, separated by ";", or a list of stages, or mappings as YAML reads them.
        base: what `base` stands for.

    Raises:
        ValueError: names the stage that cannot be read, or cannot be reached by a move.
    """
    return WeightingSchedule(tuple(_parse_stage(text, base) for text in _stage_texts(schedule)))


def _stage_texts(entries: ScheduleEntries) -> list[str]:
    if isinstance(entries, str):
        return [text.strip() for text in entries.split(";") if text.strip()]
    if isinstance(entries, Mapping):
        return [f"{when}: {scheme}" for when, scheme in entries.items()]
    return [text for entry in entries for text in _stage_texts(entry)]


def _parse_stage(text: str, base: Scheme | None) -> Stage:
    match = STAGE.fullmatch(text)
    if match is None or (match["move"] is not None and match["move"] not in MOVES):
        raise ValueError(
            f"`schedule`: expected 'STEP: SCHEME NAME=NUMBER ...', {' or '.join(MOVES)} after STEP to move, "
            f"got {text!r}"
        )
    try:
        parameters = read_numbers(match["parameters"].split())
        if match["scheme"] != BASE:
            scheme = preset(match["scheme"], **parameters)
        elif base is None:
            raise ValueError(f"{BASE} stands for the argument `base`, which is not given")
        else:
            known = base.numbers
            if unknown := [name for name in parameters if name not in known]:
                raise ValueError(f"{BASE} has the numbers {', '.join(known)}, not {', '.join(unknown)}")
            scheme = replace(base, **parameters)
    except ValueError as error:
        raise ValueError(f"`schedule`: in {text!r}: {error}") from None
    return Stage(int(match["step"]), match["move"], scheme)


def read_numbers(pairs: Iterable[str]) -> dict[str, Any]:
    """What texts `NAME=NUMBER` say. Raises ValueError for another text, and a name that comes twice."""
    numbers: dict[str, Any] = {}
    for pair in pairs:
        name, number = pair.split("=", 1)
        if name in numbers:
            raise ValueError(f"{name}: expected once, got twice")
        numbers[name] = float(number)
    return numbers


def _mix(before: Scheme, after: Scheme, share: float) -> Scheme:
    """The scheme a `share` of the way from `before` to `after`."""
    uniform = preset("uniform")
    before, after = (
        (after.uniform_limit() or before) if before == uniform else before,
        (before.uniform_limit() or after) if after == uniform else after,
    )
    if type(before) is not type(after) or replace(before, **after.numbers) != after:
        raise ValueError(f"`schedule`: only the numbers of one scheme can move, got {before} and then {after}")
    mixed: dict[str, Any] = {}
    for (name, start), end in zip(before.numbers.items(), after.numbers.values(), strict=True):
        if start == end:
            mixed[name] = start
            continue
        start, end = (after.when_none.get(name) if value is None else value for value in (start, end))
        if start is None or end is None:
            raise ValueError(f"`schedule`: {name} cannot move from {start} to {end}, give both as numbers")
        mixed[name] = (1 - share) * start + share * end
    return replace(after, **mixed)
