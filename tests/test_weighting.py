import doctest
import json
import math

import numpy as np
import pytest
import torch

from megatron_tw.weighting import (
    PRESETS,
    ExactConfig,
    WeightingConfig,
    check_finite,
    ties,
    token_weights,
    unfrozen_short_nll,
)
from megatron_tw.weighting.schemes import pipeline

NUM_ROWS, NUM_TARGETS = 3, 255
PRESET_OF_VARIANT: dict[str, tuple[str | None, dict]] = {
    "dense_l0.75": ("dense", {}),
    "dense_l0.5": ("dense", {"interpolation": 0.5}),
    "dense_l0.0": ("dense", {"interpolation": 0}),
    "dense_l1.0": ("dense", {"interpolation": 1.0}),
    "sparse_k0.2": ("sparse", {}),
    "sparse_k0.4": ("sparse", {"sparsification": 0.4}),
    "sparse_k0.05": ("sparse", {"sparsification": 0.05}),
    "longce_g5": ("longce", {}),
    "longce_g2": ("longce", {"truncation": 2.0}),
    "ppmi_s2_dense": ("ppmi", {}),
    "ppmi_s2_k0.2": ("ppmi", {"sparsification": 0.2}),
    "npmi_s2_dense": ("npmi", {}),
    "rho1_k0.6": ("rho1", {}),
    "quotient_dense": (None, {}),
    "softmax_dense_l0.3": (None, {}),
}

EXP_L1 = WeightingConfig(transforms=("exp",), normalization="l1")  # a masked score of 0 would become 1 and count


@pytest.fixture(scope="module")
def arrays(reference):
    return {name: torch.from_numpy(array) for name, array in np.load(reference / "weights.npz").items()}


@pytest.fixture(scope="module")
def variants(reference):
    return json.loads((reference / "weights_variants.json").read_text())


def custom(settings):
    renamed = {"logit_comparison": "comparison"}
    settings = {renamed.get(name, name): value for name, value in settings.items()}
    if "normalization" in settings:
        settings["normalization"] = settings["normalization"].lower()
    return WeightingConfig(**settings)


@pytest.mark.parametrize("name", PRESET_OF_VARIANT)
def test_reference_weights(name, arrays, variants):
    assert set(variants) == set(PRESET_OF_VARIANT)
    expected = arrays[f"weights__{name}"]
    preset, parameters = PRESET_OF_VARIANT[name]
    schemes = [custom(variants[name])] + ([WeightingConfig.preset(preset, **parameters)] if preset else [])
    for scheme in schemes:
        weights = token_weights(arrays["long_nll"], arrays["short_nll"], scheme)
        assert weights.shape == (NUM_ROWS, NUM_TARGETS)
        assert weights.dtype == torch.float32
        errors = (weights - expected).abs() / expected.abs().amax(dim=1, keepdim=True)
        assert errors.max() <= 1e-6


@pytest.mark.parametrize("preset", ["dense", "sparse", "longce", "ppmi", "npmi", "rho1", "exact", "uniform", "exp, l1"])
def test_masked_targets_do_not_exist(preset, arrays):
    """Weights of a row with holes equal those of the shorter row without them; NaN in the holes does no harm."""
    scheme = EXP_L1 if preset == "exp, l1" else WeightingConfig.preset(preset)
    long_nll, short_nll = arrays["long_nll"].clone(), arrays["short_nll"].clone()
    valid = torch.rand(long_nll.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    if preset == "exact":  # it goes by position, so only a tail that is cut off is the same as a shorter row
        scheme = ExactConfig(tau=16)
        valid = (torch.arange(NUM_TARGETS) < 170).expand_as(valid)
    long_nll[~valid], short_nll[~valid] = torch.nan, torch.inf
    weights = token_weights(long_nll, short_nll, scheme, valid=valid)
    assert (weights[~valid] == 0).all()
    for row in range(NUM_ROWS):
        kept = valid[row]
        alone = token_weights(long_nll[row : row + 1, kept], short_nll[row : row + 1, kept], scheme)
        torch.testing.assert_close(weights[row, kept], alone[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_row_without_a_valid_target(preset, arrays):
    valid = torch.ones(NUM_ROWS, NUM_TARGETS)
    valid[1] = 0
    weights = token_weights(arrays["long_nll"], arrays["short_nll"], WeightingConfig.preset(preset), valid=valid)
    assert (weights[1] == 0).all()
    assert weights.isfinite().all()
    assert weights[0].sum() > 0
    softmax = token_weights(
        arrays["long_nll"], arrays["short_nll"], WeightingConfig(normalization="softmax"), valid=valid
    )
    assert (softmax[1] == 0).all()
    assert softmax.isfinite().all()


def test_zero_scores_are_uniform_when_dense_and_kappa_of_them_when_sparse(arrays):
    nll = arrays["long_nll"]
    for preset in ("dense", "ppmi", "npmi"):
        assert (token_weights(nll, nll, WeightingConfig.preset(preset)) == 1).all()
    sparse = token_weights(nll, nll, WeightingConfig.preset("sparse"))
    assert ((sparse > 0).sum(dim=1) == 51).all()
    assert (sparse.unique() == torch.tensor([0.0, 5.0])).all()


def test_ties_depend_on_seed_row_id_and_position_only(arrays):
    nll = arrays["long_nll"]
    sparse = WeightingConfig.preset("sparse")
    row_ids = torch.tensor([7, 123456789012, 9])
    weights = token_weights(nll, nll, sparse, row_ids=row_ids, seed=3)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights, token_weights(nll, nll, sparse, row_ids=row_ids, seed=4))
    order = torch.tensor([2, 0, 1])  # the rows in another order, and one by one, as another layout would hold them
    assert torch.equal(token_weights(nll, nll, sparse, row_ids=row_ids[order], seed=3), weights[order])
    for row in range(NUM_ROWS):
        alone = token_weights(nll[row : row + 1], nll[row : row + 1], sparse, row_ids=row_ids[row : row + 1], seed=3)
        assert torch.equal(alone[0], weights[row])
    # Pinned: this choice must not change between versions, or a resumed run changes its mind.
    assert weights[0].nonzero().flatten()[:6].tolist() == [0, 2, 7, 20, 29, 41]


def test_ties_are_spread_over_the_row():
    nll = torch.zeros(64, 1000)
    chosen = token_weights(nll, nll, WeightingConfig.preset("sparse", sparsification=0.1)) > 0
    assert ((chosen.sum(dim=1)) == 100).all()
    # 1280 of 6400 fall in each fifth; 4.5 standard deviations (27) of that count
    assert (chosen.sum(dim=0).view(5, 200).sum(dim=1) - 1280).abs().max() < 4.5 * math.sqrt(6400 * 0.2 * 0.8 * 0.9)


def test_hash_equals_plain_python_integers():
    def splitmix64(state):
        bits = (state + ties.GOLDEN_GAMMA) % 2**64
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    assert doctest.testmod(ties) == (0, 1)
    row_ids, seed = [0, 5, 2**62 + 11], -17
    hashes = ties.tie_break(torch.tensor(row_ids), 40, seed)
    for row, row_id in enumerate(row_ids):
        start = splitmix64(splitmix64(seed % 2**64) ^ row_id)
        expected = [splitmix64((start + target * ties.GOLDEN_GAMMA) % 2**64) for target in range(1, 41)]
        assert [value % 2**64 for value in hashes[row].tolist()] == expected


@pytest.mark.parametrize(
    ("kappa", "num_valid", "expected"), [(0.2, 255, 51), (0.001, 255, 1), (0.6, 5, 3), (0.7, 1, 1), (1.0, 9, 9)]
)
def test_kappa_counts_valid_targets(kappa, num_valid, expected, arrays):
    valid = torch.arange(NUM_TARGETS).expand(NUM_ROWS, -1) < num_valid
    scheme = WeightingConfig(transforms=("absolute",), sparsification=kappa)
    weights = token_weights(arrays["long_nll"], arrays["short_nll"], scheme, valid=valid)
    assert (weights.sum(dim=1) == expected).all()
    assert set(weights.unique().tolist()) <= {0.0, 1.0}


def test_no_gradient_and_no_change_of_inputs(arrays):
    long_nll, short_nll = arrays["long_nll"].clone().requires_grad_(), arrays["short_nll"].clone()
    for preset in PRESETS:
        assert not token_weights(long_nll, short_nll, WeightingConfig.preset(preset)).requires_grad
    assert torch.equal(long_nll, arrays["long_nll"])
    assert torch.equal(short_nll, arrays["short_nll"])


def test_interpolation_needs_no_normalization():
    weights = token_weights(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), WeightingConfig(interpolation=0.25))
    assert weights.tolist() == [[0.25 + 0.75 * 2, 0.25]]


def test_exact_by_hand():
    """16 tokens, tau 4: buckets [4, 8) and [8, 16) hold 4 and 8 targets; gamma 1 makes r = 3 and 1.5, their mean 2."""
    scheme = WeightingConfig.preset("exact", alpha=0.3, gamma=1.0, tau=4)
    weights = token_weights(torch.zeros(1, 15), None, scheme)
    torch.testing.assert_close(weights, torch.tensor([[1.0] * 3 + [1 + 0.3 * 3 / 2] * 4 + [1 + 0.3 * 1.5 / 2] * 8]))
    # The same row as two documents of 8 tokens: a tail of one bucket, and a first token without context.
    starts = torch.tensor([[0] * 7 + [8] * 8])
    packed = token_weights(torch.zeros(1, 15), None, scheme, document_starts=starts)
    torch.testing.assert_close(packed, torch.tensor([[1.0] * 3 + [1.3] * 4 + [1.0] * 4 + [1.3] * 4]))
    # tau that is no power of two: the tail begins at the next bucket.
    assert (token_weights(torch.zeros(1, 15), None, ExactConfig(tau=5))[0, :7] == 1).all()
    assert (token_weights(torch.zeros(1, 15), None, ExactConfig(tau=64)) == 1).all()


def test_unfrozen_short_nll_counts_target_n_in(arrays):
    short_nll = unfrozen_short_nll(arrays["long_nll"], arrays["short_nll"], 64)
    assert torch.equal(short_nll[:, :64], arrays["long_nll"][:, :64])  # targets 1 .. 64
    assert torch.equal(short_nll[:, 64:], arrays["short_nll"][:, 64:])


def test_check_finite_names_the_place():
    nll = torch.zeros(2, 5)
    nll[1, 3] = torch.nan
    valid = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"short NLL: expected finite values, got nan at row 42, position 4, rank 3 \(1 such"
    ):
        check_finite(nll, valid=valid, row_ids=torch.tensor([17, 42]), name="short NLL", rank=3)
    valid[1, 3] = False
    check_finite(nll, valid=valid)
    with pytest.raises(ValueError, match=r"NLL: .*-inf at row 0, position 1 "):
        check_finite(torch.tensor([[-torch.inf]]))


def test_docstring_examples():
    assert doctest.testmod(pipeline) == (0, 1)


def test_which_schemes_need_a_scorer():
    needed = {name for name in PRESETS if WeightingConfig.preset(name).needs_scorer}
    assert needed == {"dense", "sparse", "longce", "ppmi", "npmi", "rho1"}
    assert not WeightingConfig.preset("dense", interpolation=1.0).needs_scorer
    assert (token_weights(torch.rand(2, 9), None, WeightingConfig.preset("uniform")) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WeightingConfig.preset("dens"), "`name`: expected one of uniform, dense, .*got 'dens'"),
        (
            lambda: WeightingConfig.preset("dense", sparsification=0.2),
            "`sparsification`: the scheme dense takes interpolation",
        ),
        (lambda: WeightingConfig.preset("uniform", shift=2), "`shift`: the scheme uniform takes no parameter"),
        (lambda: WeightingConfig.preset("ppmi", shift=0), "`shift`: expected a number > 0, got '0'"),
        (lambda: WeightingConfig.preset("npmi", shift=None), "`shift`: expected a number > 0, got 'None'"),
        (lambda: WeightingConfig.preset("exact", tau=0), "`tau`: "),
        (lambda: WeightingConfig.preset("exact", alpha=None), "`alpha`: .*got None"),
        (
            lambda: WeightingConfig(comparison="ratio"),
            "`comparison`: expected one of difference, quotient, got 'ratio'",
        ),
        (lambda: WeightingConfig(normalization="L1"), "`normalization`: expected one of l1, softmax, got 'L1'"),
        (lambda: WeightingConfig(transforms=("sqrt",)), "`transforms`: expected any of minus, .*got 'sqrt'"),
        (lambda: WeightingConfig(transforms=("",)), "`transforms`: .*got ''"),
        (lambda: WeightingConfig(transforms=("shift",)), "`transforms`: .*got 'shift'"),
        (lambda: WeightingConfig(transforms=("minus 2",)), "`transforms`: .*got 'minus 2'"),
        (lambda: WeightingConfig(transforms=("shift -1",)), "`shift`: expected a number > 0, got '-1'"),
        (
            lambda: WeightingConfig(sparsification=0.0),
            r"`sparsification`: expected a finite number in \(0, 1\], got 0.0",
        ),
        (lambda: WeightingConfig(sparsification=1.5), "`sparsification`: .*got 1.5"),
        (
            lambda: WeightingConfig(interpolation=-0.1),
            r"`interpolation`: expected a finite number in \[0, 1\], got -0.1",
        ),
        (lambda: WeightingConfig(interpolation=True), "`interpolation`: .*got True"),
        (lambda: WeightingConfig(truncation=math.inf), "`truncation`: .*got inf"),
        (lambda: WeightingConfig(truncation=math.nan), "`truncation`: .*got nan"),
        (
            lambda: token_weights(torch.zeros(2, 3), None, WeightingConfig.preset("dense")),
            "`short_nll`: .* got None",
        ),
        (lambda: token_weights(torch.zeros(3), None, WeightingConfig.preset("uniform")), r"expected \[rows, targets\]"),
        (
            lambda: token_weights(torch.zeros(2, 3), torch.zeros(2, 4), WeightingConfig.preset("dense")),
            "`short_nll`: .*shape",
        ),
        (lambda: WeightingConfig(transforms="absolute"), "`transforms`: expected a list of them, got .absolute"),  # type: ignore[arg-type]
        (lambda: token_weights(torch.zeros(2, 3), None, "dense"), "`scheme`: expected a scheme, .* got .dense"),  # type: ignore[arg-type]
        (
            lambda: token_weights(torch.zeros(2, 3), None, WeightingConfig.preset("uniform"), row_ids=torch.arange(3)),
            r"`row_ids`: expected one for each of 2 rows, got shape \[3\]",
        ),
    ],
)
def test_bad_settings_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
