"""Scorers by name: what --scorer and its options may be, before any file is opened."""

from dataclasses import replace

import pytest

from megatron_tw.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WindowsConfig,
)
from megatron_tw.training.scorers import check_scorer_options

BASE = RunConfig(
    data=DataConfig(data_path="rows", seq_length=256),
    train=TrainConfig(train_iters=3),
    model=ModelConfig(load_hf="model"),
    windows=WindowsConfig(short_window=64),
)


@pytest.mark.parametrize(
    ("options", "window", "needed", "message"),
    [
        ({"scorer": "bigram"}, 64, True, "--scorer: expected one of ema, frozen, unfrozen, got bigram"),
        ({}, None, True, "--short-window: the weighting needs a scorer's windows, got none"),
        ({}, 256, False, "--short-window: expected less than 256, the tokens of a row, where a"),
        ({"scorer": "frozen", "scores": "scores"}, 64, False, "--scorer frozen: the weighting uses no scorer's NLL"),
        ({"scores": "scores"}, 64, True, "--scores: is for --scorer frozen, got --scorer unfrozen"),
        ({"scorer": "ema", "scorer_hf": "hf"}, 64, True, "--scorer-hf: is for --scorer frozen, got --scorer ema"),
        ({"scorer_ema_decay": 0.9}, 64, False, "--scorer-ema-decay: is for --scorer ema, got --scorer unfrozen"),
    ],
)
def test_each_check_names_the_option(options, window, needed, message):
    config = replace(BASE, scorer=ScorerConfig(**options), windows=WindowsConfig(short_window=window))
    with pytest.raises(ValueError) as caught:
        check_scorer_options(config, needed=needed)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "needed"),
    [({}, False), ({}, True), ({"scorer": "ema", "scorer_ema_decay": 0.9}, True), ({"scorer": "frozen"}, True)],
)
def test_good_combinations_pass(options, needed):
    check_scorer_options(replace(BASE, scorer=ScorerConfig(**options)), needed=needed)
