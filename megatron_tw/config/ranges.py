"""How a check refuses: ValueError with the option, what was expected and what was given. None is no value, and fits."""

import math

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
