"""The schemes by name, as --weighting and the stages of a schedule name them."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from megatron_tw.weighting.schemes.base import Scheme


class SchemeKind(Protocol):
    """What is registered under a name: a subclass of Scheme, or what makes schemes of one (see `Preset`)."""

    @property
    def options(self) -> frozenset[str]: ...

    @property
    def refusals(self) -> Mapping[str, str]: ...

    def parameters(self) -> dict[str, float | None]: ...

    def create(self, **settings: Any) -> Scheme: ...


Kind = TypeVar("Kind", bound=SchemeKind)

SCHEMES: dict[str, SchemeKind] = {}
"""In the order in which errors list them. `register_scheme` adds to it."""


def register_scheme(name: str) -> Callable[[Kind], Kind]:
    """Decorator: what `--weighting NAME` stands for."""

    def register(kind: Kind) -> Kind:
        assert name not in SCHEMES, f"two schemes named {name}"
        kind.parameters()  # fails here, if at all
        SCHEMES[name] = kind
        return kind

    return register


def scheme_kind(name: str) -> SchemeKind:
    """What is registered under `name`.

    Raises:
        ValueError: nothing is; the known names are listed.
    """
    if name not in SCHEMES:
        raise ValueError(f"`name`: expected one of {', '.join(SCHEMES)}, got {name!r}")
    return SCHEMES[name]


def preset(name: str, **parameters: float | None) -> Scheme:
    """The scheme called `name`, with published settings for the numbers that `parameters` leaves open.

    Raises:
        ValueError: unknown scheme or number (the known ones are listed), or a value out of range.
    """
    kind = scheme_kind(name)
    known = kind.parameters()
    for parameter in parameters:
        if parameter not in known:
            takes = ", ".join(known) or "no parameter"
            raise ValueError(f"`{parameter}`: the scheme {name} takes {takes}")
    return kind.create(**parameters)
