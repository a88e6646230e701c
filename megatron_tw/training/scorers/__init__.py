"""Who says what a target's NLL is in a short window: the model in training, a fixed model, or a moving average.

    unfrozen       the model in training itself; targets 1..n take the long NLL instead (arXiv 2503.09202)
    frozen, cached short NLLs that tools/score_tokens.py wrote once
    frozen, live   a second model from a Hugging Face folder, on the last pipeline stage
    ema            a moving average of the model in training, kept in fp32 beside it

Each is a class, registered under the name that --scorer takes (`register_scorer`); docs/extending.md adds one.
"""

from megatron_tw.training.scorers.base import (
    Scorer,
    ScorerInputs,
    ScorerMaker,
    TrainedModel,
    check_scorer_options,
    open_scorer,
    reads_updated_weights,
    register_scorer,
)
from megatron_tw.training.scorers.ema import EmaScorer
from megatron_tw.training.scorers.frozen import CachedFrozenScorer, FrozenScorer, LiveFrozenScorer
from megatron_tw.training.scorers.unfrozen import UnfrozenScorer

__all__ = [
    "CachedFrozenScorer",
    "EmaScorer",
    "FrozenScorer",
    "LiveFrozenScorer",
    "Scorer",
    "ScorerInputs",
    "ScorerMaker",
    "TrainedModel",
    "UnfrozenScorer",
    "check_scorer_options",
    "open_scorer",
    "reads_updated_weights",
    "register_scorer",
]
