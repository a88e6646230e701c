"""What a weighting scheme is: everything that training asks of one.

Shape suffixes: R rows, T targets of a row (a row of N tokens has N - 1).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of whole rows, as a scheme sees them. Target j of a row predicts the token at position j + 1.

    long_RT: fp64 NLL (natural log) of the model in training; 0 at masked targets. short_RT: the scorer's; None without
    one. valid_RT: bool, False where masked. row_ids_R: int64, names of the rows that no layout changes. seed: of the
    choice between equals. document_starts_RT: int64, the position in the row where the document of each target's token
    begins; None: every row is one document.
    """

    long_RT: Tensor
    short_RT: Tensor | None
    valid_RT: Tensor
    row_ids_R: Tensor
    seed: int
    document_starts_RT: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """From NLLs to weights. A scheme is a frozen dataclass; its fields are its numbers, with defaults.

    A new one says `weights`, and of the rest what it needs; registered under a name (`register_scheme`), it is what
    --weighting NAME stands for, and its numbers come by --weighting-parameters, or by their flags where they have one.

    options: fields of WeightingOptions beside the numbers that it can be made with. refusals: what to say of some that
    it cannot, where there is more to say than that. when_none: what a number counts as in a move while it is None.
    by_document: of packed rows it gets every document as a row of its own; else rows, and where their documents begin.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    refusals: ClassVar[Mapping[str, str]] = {}
    when_none: ClassVar[Mapping[str, float]] = {}
    by_document: ClassVar[bool] = True

    @abstractmethod
    def weights(self, targets: Targets) -> Tensor:
        """Weights [R, T] of any float dtype; those of masked targets are not looked at, and none is on the graph.

        A row's weights must depend on that row alone, and be finite.
        """

    @property
    def needs_scorer(self) -> bool:
        """Whether the weights depend on the short NLL: then `weights` gets it."""
        return False

    @property
    def leaves_targets_out(self) -> bool:
        """Whether some targets get no weight, so that the backward pass is not for all of them."""
        return False

    def check(self) -> None:
        """Before anything is allocated: raise ValueError, which names the field, where weights could do harm.

        Errors have names of fields in `backquotes`; programs turn them into their options.
        """
        return

    def check_rows(self, seq_length: int) -> None:
        """Likewise, where rows of `seq_length` tokens are not what the scheme is for."""
        return

    @property
    def numbers(self) -> dict[str, float | None]:
        """The numbers that may move in a schedule, by name."""
        return {name: getattr(self, name) for name in self.parameters()}

    def uniform_limit(self) -> "Scheme | None":
        """This scheme with numbers that make every weight 1, which a schedule moves to and from; None: it has none."""
        return None

    @classmethod
    def parameters(cls) -> dict[str, float | None]:
        """The numbers that the scheme can be made with, and their defaults."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        missing = [name for name, default in defaults.items() if default is MISSING]
        assert not missing, f"{cls.__name__}: expected a default of {', '.join(missing)}"
        return defaults

    @classmethod
    def create(cls, **settings: Any) -> "Scheme":
        """The scheme with these of its `parameters` and `options`.

        Raises:
            ValueError: a value out of range; names the field.
        """
        return cls(**settings)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError where `value`, of the field `name`, is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}`: expected one of {', '.join(choices)}, got {value!r}")


def check_number(
    name: str,
    value: float | None,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    optional: bool = True,
) -> None:
    """Raises ValueError where `value`, of the field `name`, is no finite number in the range."""
    if value is None and optional:
        return
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = fits and (above is None or value > above)  # type: ignore[operator]
    fits = fits and (at_least is None or value >= at_least)  # type: ignore[operator]
    fits = fits and (at_most is None or value <= at_most)  # type: ignore[operator]
    if not fits:
        lower = f"({above:g}" if above is not None else f"[{at_least:g}" if at_least is not None else "(-inf"
        upper = f"{at_most:g}]" if at_most is not None else "inf)"
        raise ValueError(f"`{name}`: expected a finite number in {lower}, {upper}, got {value!r}")
