"""Key tokens: the targets whose prediction needs the long context; and LongPPL, the perplexity on them.

Source: LongPPL (Fang et al., ICLR 2025). Its key tokens have, under one evaluator model,

    log p_long - log p_short > 2   and   log p_long > -2

in NLLs: short - long > `gain`, and long < `max_long_nll`. Here the second condition is off unless it is asked for: the
first alone is the definition of this project's comparisons. One evaluator chooses the set, once, for all the models
that are compared.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tw.evaluation.position import mean_nll
from megatron_tw.evaluation.result import EvaluationResult

GAIN = 2.0
"""Nats by which the long context lowers the NLL of a key token; LongPPL's alpha."""
LONGPPL_MAX_LONG_NLL = 2.0
"""LongPPL's second condition, for `max_long_nll`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyTokens:
    """One fixed set of targets."""

    mask: npt.NDArray[np.bool_]
    """[R, T]."""
    source: EvaluationResult
    """The evaluation that chose them."""
    name: str
    """Of the source, for people."""
    gain: float
    max_long_nll: float | None

    @property
    def count(self) -> int:
        """How many; 0 is possible, and then nothing can be said about them."""
        return int(self.mask.sum())

    def describe(self) -> str:
        """The definition, and how many there are."""
        header = self.source.header
        also = "" if self.max_long_nll is None else f" and is then below {self.max_long_nll:g}"
        share = self.count / max(1, int(self.source.valid.sum()))
        return (
            f"targets whose NLL under {self.name} drops by more than {self.gain:g} from a window of "
            f"{header.short_window} tokens to the whole row{also}: {self.count:,} ({share:.3%} of the targets)"
        )


def key_tokens(
    long_nll_RT: npt.NDArray[np.floating],
    short_nll_RT: npt.NDArray[np.floating],
    *,
    valid_RT: npt.NDArray[np.bool_] | None = None,
    gain: float = GAIN,
    max_long_nll: float | None = None,
) -> npt.NDArray[np.bool_]:
    """Mask of the key tokens: short - long > gain, and long < max_long_nll unless that is None.

    Raises:
        ValueError: a gain that is not positive (targets within the first window, where short = long, would be key), or
            such a bound on the long NLL.
    """
    if not 0 < gain < math.inf:
        raise ValueError(f"--gain: expected a positive number of nats, got {gain:g}")
    if max_long_nll is not None and not 0 < max_long_nll < math.inf:
        raise ValueError(f"--max-long-nll: expected a positive number of nats, got {max_long_nll:g}")
    assert long_nll_RT.shape == short_nll_RT.shape
    mask_RT = short_nll_RT.astype(np.float64) - long_nll_RT.astype(np.float64) > gain
    if max_long_nll is not None:
        mask_RT &= long_nll_RT < max_long_nll
    return mask_RT if valid_RT is None else mask_RT & valid_RT


def choose_key_tokens(
    result: EvaluationResult, name: str, *, gain: float = GAIN, max_long_nll: float | None = None
) -> KeyTokens:
    """The key tokens under the model of `result`.

    Raises:
        ValueError: the evaluation has no short NLL.
    """
    if result.short_nll is None:
        raise ValueError(
            f"--key-tokens {name}: the evaluation has no short NLL; evaluate with --short-window and --short-stride"
        )
    mask_RT = key_tokens(result.long_nll, result.short_nll, valid_RT=result.valid, gain=gain, max_long_nll=max_long_nll)
    return KeyTokens(mask=mask_RT, source=result, name=name, gain=gain, max_long_nll=max_long_nll)


def long_ppl(long_nll_RT: npt.NDArray[np.floating], key_RT: npt.NDArray[np.bool_]) -> float | None:
    """exp(mean NLL over the key tokens); None: the set is empty."""
    mean = mean_nll(long_nll_RT, key_RT)
    return None if mean is None else math.exp(mean)
