"""From the options of a run to its weighting scheme."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from megatron_tw.config import WeightingOptions
from megatron_tw.config.errors import as_options
from megatron_tw.config.options import flag
from megatron_tw.weighting.schedule import Stage, WeightingSchedule, parse_schedule
from megatron_tw.weighting.schemes import Scheme, SchemeKind, scheme_kind

_SETTINGS = [
    field.name
    for field in fields(WeightingOptions)
    if field.name not in ("weighting", "weighting_schedule", "weighting_parameters")
]
"""Options that are a scheme's own, under the names that it knows them by."""
_ARGUMENTS = {"name": "weighting", "schedule": "weighting_schedule"}
"""Arguments of this folder's functions that are options of another name."""


def schedule_from_options(options: WeightingOptions, *, seq_length: int | None = None) -> WeightingSchedule:
    """The run's scheme at every step: `--weighting-schedule`, or one scheme throughout.

    seq_length: tokens of a row, where they are known.

    Raises:
        ValueError: a stage that cannot be read, an option that its scheme does not have or that no stage uses, weights
            that may be negative, or rows that a stage is not for; names the option.
    """
    with as_options(_option):
        schedule = _schedule(options)
        schedule.check()
        if seq_length is not None:
            schedule.check_rows(seq_length)
    return schedule


def _option(argument: str) -> str:
    """The option that stands for an argument."""
    name = _ARGUMENTS.get(argument, argument)
    own_number = name not in (*_SETTINGS, *_ARGUMENTS.values())
    return f"--weighting-parameters {name}" if own_number else flag(name)


def _schedule(options: WeightingOptions) -> WeightingSchedule:
    scheme = _scheme_from_options(options)
    if options.weighting_schedule is None:
        schedule = WeightingSchedule((Stage(0, None, scheme),))
    else:
        schedule = parse_schedule(options.weighting_schedule, base=scheme)
        if options != WeightingOptions(weighting_schedule=options.weighting_schedule) and not any(
            stage.scheme == scheme for stage in schedule.stages
        ):
            raise ValueError(f"--weighting-schedule: no stage is base, the scheme of --weighting {options.weighting}")
    return schedule


def _scheme_from_options(options: WeightingOptions) -> Scheme:
    """The scheme that `--weighting` names, with the other options in place of its own settings.

    Raises:
        ValueError: unknown scheme, a value out of range, or an option that the scheme does not have; names the option.
    """
    kind = scheme_kind(options.weighting)
    given = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    known = kind.options | kind.parameters().keys()
    for name in given:
        if name not in known:
            refusal = kind.refusals.get(name, f"--weighting {options.weighting} does not have this option")
            raise ValueError(f"{flag(name)}: {refusal}")
    return kind.create(**given, **_own_numbers(options.weighting_parameters or (), kind, options.weighting))


def _own_numbers(pairs: Iterable[str], kind: SchemeKind, scheme: str) -> dict[str, float]:
    """The numbers of `--weighting-parameters`, which are those of the scheme that have no flag.

    Raises:
        ValueError: a text that is no NAME=NUMBER, a name that the scheme does not have, that has a flag, or that comes
            twice.
    """
    own = [name for name in kind.parameters() if name not in _SETTINGS]
    numbers: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not (name and equals and text):
            raise ValueError(f"--weighting-parameters: expected NAME=NUMBER, got {pair!r}")
        if name in _SETTINGS:
            raise ValueError(f"--weighting-parameters {name}: expected {flag(name)}, the flag that this number has")
        if name not in own:
            takes = f"expected {', '.join(own)}" if own else "it has no numbers without a flag"
            raise ValueError(f"--weighting-parameters {name}: --weighting {scheme} does not have it; {takes}")
        if name in numbers:
            raise ValueError(f"--weighting-parameters {name}: expected once, got twice")
        try:
            numbers[name] = float(text)
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise ValueError(f"--weighting-parameters {name}: expected a finite number, got {text!r}")
    return numbers
