"""Weighting schemes by name: the numbers that have no flag, and a scheme of the user's own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SEQ_LENGTH, TINY_LLAMA, prepare_ready_rows, reference_rows, release
from transformers import AutoModelForCausalLM

from megatron_tw.config import RunConfig, WeightingOptions, parse_options
from megatron_tw.parallel.layout import destroy_layout
from megatron_tw.training.loop import train
from megatron_tw.weighting import ExactConfig, Scheme, Targets, token_weights
from megatron_tw.weighting.options import schedule_from_options
from megatron_tw.weighting.schemes import SCHEMES

ROOT = Path(__file__).parents[1]
REQUIRED = ["--data-path", "rows", "--seq-length", "512", "--train-iters", "3"]


def exact(*pairs):
    return schedule_from_options(WeightingOptions(weighting="exact", weighting_parameters=pairs)).at(0)


def test_numbers_without_a_flag(tmp_path):
    assert exact("eps=1e-3") == exact(" eps = 0.001 ") == ExactConfig(eps=1e-3)
    assert exact() == ExactConfig()
    file = tmp_path / "options.yaml"
    for text in ("{eps: 1e-3}", "\n  eps: 0.001", "[eps=0.001]", "\n- eps=0.001"):
        file.write_text(f"weighting: exact\nweighting_parameters: {text}\n")
        config = parse_options([*REQUIRED, "--config", str(file)], RunConfig)
        assert schedule_from_options(config.weighting).at(0) == ExactConfig(eps=1e-3)
        flags = [*REQUIRED, "--weighting-parameters", "eps=2", "--config", str(file)]
        assert parse_options(flags, RunConfig).weighting.weighting_parameters == ("eps=2",)


@pytest.mark.parametrize(
    ("scheme", "pairs", "message"),
    [
        ("exact", ["eps"], "--weighting-parameters: expected NAME=NUMBER, got 'eps'"),
        ("exact", ["eps="], "--weighting-parameters: expected NAME=NUMBER, got 'eps='"),
        ("exact", ["=1"], "--weighting-parameters: expected NAME=NUMBER, got '=1'"),
        ("exact", ["eps=much"], "--weighting-parameters eps: expected a finite number, got 'much'"),
        ("exact", ["eps=nan"], "--weighting-parameters eps: expected a finite number, got 'nan'"),
        ("exact", ["eps=-1"], "--weighting-parameters eps: expected a finite number in [0, inf), got -1.0"),
        ("exact", ["eps=1", "eps=2"], "--weighting-parameters eps: expected once, got twice"),
        ("exact", ["tau=64"], "--weighting-parameters tau: expected --tau, the flag that this number has"),
        ("exact", ["epsilon=1"], "--weighting-parameters epsilon: --weighting exact does not have it; expected eps"),
        ("dense", ["eps=1"], "--weighting-parameters eps: --weighting dense does not have it; it has no numbers with"),
    ],
)
def test_bad_numbers_name_the_option(scheme, pairs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        schedule_from_options(WeightingOptions(weighting=scheme, weighting_parameters=tuple(pairs)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{eps: 1, eps: 2}", "line 2: weighting_parameters: eps is set twice"),
        ("3", "--weighting-parameters: expected a list of strings or null, got 3"),
    ],
)
def test_bad_yaml_names_the_option(text, message, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"weighting: exact\nweighting_parameters: {text}\n")
    with pytest.raises(ValueError, match=message):
        parse_options([*REQUIRED, "--config", str(file)], RunConfig)


def test_weights_of_another_shape_are_refused():
    class Narrow(Scheme):
        def weights(self, targets: Targets) -> torch.Tensor:
            return targets.long_RT[:, 1:]

    with pytest.raises(ValueError, match=r"Narrow.weights: expected .* \[2, 5\], got \[2, 4\]"):
        token_weights(torch.zeros(2, 5), None, Narrow())


def train_with_own_scheme(code: str, runs: list[list[str]]) -> list[list[float]]:
    """On a rank: weighted losses of the steps of each run, with the scheme that `code` defines."""
    exec(compile(code, "docs/extending.md", "exec"), {"__name__": "own_scheme"})
    losses = []
    try:
        for argv in runs:
            release(train(parse_options(argv, RunConfig)).step.model)
            destroy_layout()
            lines = (Path(argv[-1]) / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["weighted_loss"] for line in lines])
    finally:
        SCHEMES.pop("focal")
    return losses


def test_a_scheme_in_a_few_lines(ranks, tmp_path):
    """As docs/extending.md adds it: by its name, by YAML, moved to by a schedule, and resumed from its checkpoint."""
    section = (ROOT / "docs" / "extending.md").read_text().split("## A weighting scheme")[1]
    code = section.split("```python")[1].split("```")[0]
    rows = reference_rows()
    data = prepare_ready_rows(rows, tmp_path / "rows")
    (tmp_path / "own.yaml").write_text("weighting: focal\nweighting_parameters: {power: 1}\n")
    fixed = ["--load-hf", str(TINY_LLAMA), "--data-path", str(data), "--seq-length", str(SEQ_LENGTH), "--no-shuffle"]
    fixed += ["--lr", "1e-30"]  # the weights stay what they are
    flags = ["--weighting", "focal", "--weighting-parameters", "power=1"]
    moved = [*flags, "--weighting-schedule", "0: uniform; 2 linear: base"]
    runs = [
        [*flags, "--train-iters", "2"],
        ["--config", str(tmp_path / "own.yaml"), "--train-iters", "2"],
        [*moved, "--train-iters", "3"],
        [*flags, "--load", str(tmp_path / "run0"), "--train-iters", "3"],
    ]
    saves = ["run0", "run1", "run2", "run0"]
    argvs = [[*fixed, *run, "--save", str(tmp_path / save)] for run, save in zip(runs, saves, strict=True)]
    by_flags, by_yaml, by_schedule, resumed = ranks(1).run(train_with_own_scheme, code, argvs)[0]

    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    ids = torch.from_numpy(rows[:3]).long()
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none").double()
    expected = [((1 - torch.exp(-row)) ** power * row).mean() for row, power in zip(nll, (1, 1, 1), strict=True)]
    half = [((1 - torch.exp(-row)) ** power * row).mean() for row, power in zip(nll, (0, 0.5, 1), strict=True)]
    np.testing.assert_allclose(by_flags, expected[:2], rtol=1e-5)  # fp32
    np.testing.assert_allclose(by_yaml, expected[:2], rtol=1e-5)
    np.testing.assert_allclose(by_schedule, half, rtol=1e-5)
    np.testing.assert_allclose(resumed, expected, rtol=1e-5)
