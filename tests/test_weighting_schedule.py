import doctest
import re

import pytest
import torch

from megatron_tw.config import RunConfig, WeightingOptions
from megatron_tw.config.options import options_of
from megatron_tw.weighting import PRESETS, ExactConfig, WeightingConfig, parse_schedule, schedule, token_weights
from megatron_tw.weighting.options import schedule_from_options
from megatron_tw.weighting.schemes import SCHEMES

UNIFORM = WeightingConfig.preset("uniform")
LONG_NLL, SHORT_NLL = torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(0)) * 5


def numbers(stages, name, steps):
    return [getattr(stages.at(step), name) for step in steps]


def test_docstring_example():
    assert doctest.testmod(schedule) == (0, 2)


def test_stages_hold_until_the_next_one():
    stages = parse_schedule("0: dense; 100: sparse sparsification=0.4")
    assert stages.at(0) == stages.at(99) == WeightingConfig.preset("dense")
    assert stages.at(100) == stages.at(10**6) == WeightingConfig.preset("sparse", sparsification=0.4)
    assert stages.needs_scorer


def test_numbers_move_and_then_stay():
    linear = parse_schedule("0: sparse sparsification=1.0; 10 linear: sparse sparsification=0.2")
    assert numbers(linear, "sparsification", (0, 5, 10, 11)) == pytest.approx([1.0, 0.6, 0.2, 0.2])
    cosine = parse_schedule("0: longce truncation=2; 3 cosine: longce truncation=6")
    assert numbers(cosine, "truncation", range(5)) == pytest.approx([2, 3, 5, 6, 6])
    later = parse_schedule("0: dense; 10: dense interpolation=0.5; 30 linear: dense interpolation=0")
    assert numbers(later, "interpolation", (9, 10, 20, 30)) == pytest.approx([0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("name", ["dense", "sparse", "longce", "ppmi", "npmi", "rho1", "exact"])
def test_warm_in_from_uniform_mixes_the_weights(name):
    parameters = "tau=8" if name == "exact" else ""
    stages = parse_schedule(f"0: uniform; 4 linear: {name} {parameters}".strip())
    full = token_weights(LONG_NLL, SHORT_NLL, stages.at(4))
    assert not stages.at(0).needs_scorer or name == "exact"
    for step in range(5):
        weights = token_weights(LONG_NLL, SHORT_NLL, stages.at(step))
        torch.testing.assert_close(weights, (1 - step / 4) + step / 4 * full)
    back = parse_schedule(f"0: {name} {parameters}; 4 cosine: uniform")
    assert (token_weights(LONG_NLL, SHORT_NLL, back.at(4)) == 1).all()
    torch.testing.assert_close(token_weights(LONG_NLL, SHORT_NLL, back.at(2)), (1 + full) / 2)


def test_lists_and_mappings_read_like_the_string():
    text = parse_schedule("0: uniform;10 linear :dense interpolation=0.5 ; 20: uniform;")
    assert text == parse_schedule(["0: uniform", "10 linear: dense interpolation=0.5", "20: uniform"])
    assert text == parse_schedule([{0: "uniform"}, {"10 linear": "dense interpolation=0.5"}, {20: "uniform"}])
    assert text == parse_schedule({0: "uniform", "10 linear": "dense interpolation=0.5", 20: "uniform"})


def test_base_is_the_scheme_of_the_other_options():
    custom = WeightingConfig(comparison="quotient", transforms=("absolute",), normalization="l1", interpolation=0.3)
    stages = parse_schedule("0: uniform; 8 linear: base; 9: base interpolation=0.9", base=custom)
    assert stages.at(8) == custom
    assert numbers(stages, "interpolation", (9, 4)) == pytest.approx([0.9, 0.65])
    exact = parse_schedule("0: base alpha=0; 2 linear: base", base=ExactConfig(alpha=0.4))
    assert exact.at(1) == ExactConfig(alpha=0.2)
    assert not exact.needs_scorer


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("", "expected the first stage at step 0"),
        ("5: dense", "expected the first stage at step 0"),
        ("0 linear: dense", "expected the first stage at step 0, without linear or cosine"),
        ("0: dense; 0: sparse", "expected steps in rising order, got 0 after 0"),
        ("0: dense; 9: sparse; 3: dense", "expected steps in rising order, got 3 after 9"),
        ("0: dense; 9 quadratic: sparse", "expected 'STEP: SCHEME .*linear or cosine.*got '9 quadratic: sparse'"),
        ("dense", "expected 'STEP: SCHEME .*got 'dense'"),
        ("0: dense 0.5", "expected 'STEP: SCHEME .*got '0: dense 0.5'"),
        ("0: dense interpolation=much", "in '0: dense interpolation=much': could not convert"),
        ("0: dense interpolation=2", r"in '0: dense interpolation=2': `interpolation`: .*\[0, 1\], got 2.0"),
        ("0: dense interpolation=0.5 interpolation=0.75", "in '.*': interpolation: expected once, got twice"),
        ("0: densest", "in '0: densest': `name`: expected one of uniform"),
        ("0: sparse interpolation=0.5", "in '.*': `interpolation`: the scheme sparse takes sparsification"),
        ("0: base", "base stands for the argument `base`, which is not given"),
        ("0: dense; 9 linear: sparse", "sparsification cannot move from None to 0.2"),
        ("0: dense; 9 linear: longce", "only the numbers of one scheme can move"),
        ("0: dense; 9 linear: exact", "only the numbers of one scheme can move"),
        ("0: ppmi; 9 linear: ppmi sparsification=0.2", "sparsification cannot move from None to 0.2"),
        ("0: ppmi shift=2; 9 linear: ppmi shift=3", "only the numbers of one scheme can move"),
    ],
)
def test_bad_schedules_say_what_is_wrong(entries, message):
    with pytest.raises(ValueError, match=f"^`schedule`: .*{message}"):
        parse_schedule(entries)


def test_base_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="base has the numbers truncation, sparsification, interpolation, not alpha"):
        parse_schedule("0: base alpha=1", base=UNIFORM)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, WeightingConfig.preset("uniform")),
        ({"weighting": "dense", "interpolation": 0.5}, WeightingConfig.preset("dense", interpolation=0.5)),
        (
            {"weighting": "sparse", "truncation": 3.0},
            WeightingConfig(transforms=("absolute",), normalization="l1", sparsification=0.2, truncation=3.0),
        ),
        ({"weighting": "exact", "tau": 2048.0}, ExactConfig(tau=2048.0)),
        ({"weighting": "custom", "transforms": ("absolute",)}, WeightingConfig(transforms=("absolute",))),
    ],
)
def test_options_make_a_scheme(options, expected):
    schedule = schedule_from_options(WeightingOptions(**options))
    assert schedule.at(0) == schedule.at(10**6) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "dens"}, "--weighting: expected one of .*'dens'"),
        ({"weighting": "uniform", "interpolation": 0.5}, "--interpolation: --weighting uniform does not have"),
        ({"weighting": "exact", "sparsification": 0.5}, "--sparsification: --weighting exact does not have"),
        ({"weighting": "dense", "shift": 2.0}, "--shift: --weighting dense does not have"),
        ({"weighting": "custom", "shift": 2.0}, "--shift: a custom scheme says it in --transforms"),
        ({"weighting": "custom", "tau": 2.0}, "--tau: a custom scheme does not have"),
        ({"weighting_schedule": "0: dens"}, "--weighting-schedule: in '0: dens': --weighting: expected one of uniform"),
        ({"weighting_schedule": "0: exact eps=-1"}, "in '0: exact eps=-1': --weighting-parameters eps: expected a"),
        ({"weighting_schedule": "0: dense tau=9"}, "in '0: dense tau=9': --tau: the scheme dense takes interpolation"),
        ({"weighting": "custom"}, "--weighting custom: expected --transforms"),
        (
            {"weighting": "dense", "weighting_schedule": "0: sparse"},
            "no stage is base, the scheme of --weighting dense",
        ),
        ({"weighting": "custom", "normalization": "l1"}, "--transforms: none leaves weights below 0"),
        ({"weighting": "longce", "transforms": ("minus",)}, "--transforms: minus leaves weights below 0"),
        (
            {"weighting": "dense", "transforms": ("absolute", "shift 2")},
            "--transforms: absolute shift 2 leaves weights",
        ),
    ],
)
def test_options_that_a_scheme_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_options(WeightingOptions(**options))


def test_base_stands_for_the_other_options():
    options = WeightingOptions(weighting="dense", interpolation=0.5, weighting_schedule="0: uniform; 10: base")
    schedule = schedule_from_options(options)
    assert not schedule.at(9).needs_scorer
    assert schedule.at(10) == WeightingConfig.preset("dense", interpolation=0.5)


@pytest.mark.parametrize(
    ("text", "leaves_out"),
    [
        ("0: dense", False),
        ("0: uniform; 5: sparse sparsification=0.4", True),
        ("0: sparse sparsification=1.0", False),
        ("0: ppmi shift=2 sparsification=0.2", True),
        ("0: exact", False),
    ],
)
def test_whether_targets_are_left_out(text, leaves_out):
    assert parse_schedule(text).leaves_targets_out == leaves_out


def test_no_target_is_left_out_where_uniform_is_mixed_in():
    mixed = WeightingConfig(transforms=("absolute",), sparsification=0.2, interpolation=0.5)
    assert not parse_schedule("0: base", base=mixed).leaves_targets_out


def test_the_tail_of_exact_lies_within_the_row():
    parse_schedule("0: exact tau=255").check_rows(256)
    with pytest.raises(ValueError, match="`tau`: expected less than the 256 tokens of a row, got 256"):
        parse_schedule("0: uniform; 9: exact tau=256").check_rows(256)


def test_every_preset_can_be_asked_for():
    assert tuple(SCHEMES) == (*PRESETS, "custom")
    help_text = options_of(RunConfig)["weighting"].help
    assert all(re.search(rf"\b{name}\b", help_text) for name in SCHEMES)
    assert not any(
        scheme.may_be_negative
        for name in PRESETS
        if isinstance(scheme := WeightingConfig.preset(name), WeightingConfig)
    )
