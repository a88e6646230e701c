"""How a check refuses: ValueError with the option, what was expected and what was given. None is no value, and fits."""

import math
from pathlib import Path

from megatron_tw.config.options import flag


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def at_least(low: float, **values: float | None) -> None:
    for name, value in values.items():
        require(value is None or low <= value < math.inf, f"{flag(name)}: expected {low} or more, got {value}")


def at_most(high: float, **values: float | None) -> None:
    for name, value in values.items():
        require(value is None or value <= high, f"{flag(name)}: expected at most {high}, got {value}")


def above(low: float, **values: float | None) -> None:
    for name, value in values.items():
        require(value is None or low < value < math.inf, f"{flag(name)}: expected more than {low}, got {value}")


def within(low: float, high: float, **values: float | None) -> None:
    for name, value in values.items():
        require(value is None or low <= value <= high, f"{flag(name)}: expected {low} to {high}, got {value}")


def outside(output_option: str, output: str | None, **folders: str | None) -> None:
    """That folders which are written earlier are not in the way of an output that is made at the end."""
    for name, folder in folders.items():
        require(
            folder is None or output is None or not Path(folder).resolve().is_relative_to(Path(output).resolve()),
            f"{flag(name)}: expected a folder outside {output_option} {output}, which must be empty at the end, "
            f"got {folder}",
        )
