"""Scorers by name: what --scorer and its options may be, before any file is opened; and one of the user's own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import SEQ_LENGTH, TINY_LLAMA, VOCAB, prepare_ready_rows, reference_rows, release

from megatron_tw.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WindowsConfig,
    parse_options,
)
from megatron_tw.parallel.layout import destroy_layout
from megatron_tw.training.loop import train
from megatron_tw.training.scorers import check_scorer_options
from megatron_tw.training.scorers.base import _SCORERS

BASE = RunConfig(
    data=DataConfig(data_path=("rows",), seq_length=256),
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


def train_with_own_scorer(code: str, argv: list[str]) -> list[float]:
    """On a rank: short losses of the steps of a run whose scorer `code` defines."""
    exec(compile(code, "docs/extending.md", "exec"), {"__name__": "own_scorer"})
    try:
        run = train(parse_options(argv, RunConfig))
        assert type(run.step.scorer).__name__ == "UnigramScorer"
        release(run.step.model)
    finally:
        _SCORERS.pop("unigram")
        destroy_layout()
    return [json.loads(line)["short_lm_loss"] for line in (Path(argv[-1]) / "metrics.jsonl").read_text().splitlines()]


def test_a_scorer_in_a_few_lines(ranks, tmp_path):
    """As docs/extending.md adds it."""
    section = (Path(__file__).parents[1] / "docs" / "extending.md").read_text().split("## A scorer")[1]
    code = section.split("```python")[1].split("```")[0]
    rows = reference_rows()
    data = prepare_ready_rows(rows, tmp_path / "rows")
    argv = ["--load-hf", str(TINY_LLAMA), "--data-path", str(data), "--seq-length", str(SEQ_LENGTH), "--no-shuffle"]
    argv += ["--scorer", "unigram", "--short-window", "64", "--weighting", "dense", "--train-iters", str(len(rows))]
    losses = ranks(1).run(train_with_own_scorer, code, [*argv, "--save", str(tmp_path / "run")])[0]
    counts = 1.0 + np.bincount(rows.flatten(), minlength=VOCAB)
    expected = -np.log(counts / counts.sum())[rows[:, 1:]].mean(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)  # fp32
