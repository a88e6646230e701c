"""The loss on a GPU against fp64 on the CPU. All of it skips without one."""

import pytest
import torch
from test_losses import gradients, make_inputs, reference_nll, token_weight_cases

from megatron_tw.losses import linear_cross_entropy
from megatron_tw.losses.parameter_gradient import add_product_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SIZES = {"seq": 96, "batch": 2, "width": 64, "vocab": 509, "padded": 512, "seed": 2}


@pytest.mark.parametrize("keep_logits_bytes", [0, 1 << 20])
@pytest.mark.parametrize("case", ["random", "a third is zero", "all zero"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_fp64(dtype, bound, case, keep_logits_bytes):
    """Norms of the errors, relative. bf16: two roundings to 8 bits."""
    hidden, weight, labels = make_inputs(dtype, **SIZES)
    token_weights = token_weight_cases(96, 2)[case]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact_nll = reference_nll(exact_inputs[0], exact_inputs[1], labels, 509)
    exact = exact_nll, *gradients(exact_nll, token_weights, *exact_inputs)
    hidden, weight = (tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight))
    options = {"vocab_size": 509, "chunk_tokens": 50, "tile_entries": 200, "keep_logits_bytes": keep_logits_bytes}
    nll = linear_cross_entropy(hidden, weight, labels.cuda(), **options)
    ours = nll, *gradients(nll, token_weights.float().cuda(), hidden, weight)
    for our, right in zip(ours, exact, strict=True):
        assert (our.detach().cpu() - right.detach()).norm() <= bound * right.detach().norm()


def test_low_precision_products_are_summed_in_fp32():
    ones, total = torch.ones(8, 512, dtype=torch.bfloat16, device="cuda"), torch.full((8, 8), 0.25, device="cuda")
    add_product_(total, ones, ones.T)
    assert (total == 512.25).all()  # bf16 has no such number
