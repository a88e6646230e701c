"""The loss amid what training does around it: Megatron's main_grad, tied embeddings, autocast, recompute."""

import pytest
import torch
import torch.nn.functional as F
from test_losses import BATCH, SEQ, VOCAB, gradients, make_bias, make_inputs, reference_nll, token_weight_cases
from torch.utils.checkpoint import checkpoint

from megatron_tw.losses import linear_cross_entropy


def add_main_grad(weight, dtype):
    """What Megatron's DistributedDataParallel puts on a parameter, and its hook (distributed_data_parallel.py)."""
    weight.main_grad = torch.ones(weight.shape, dtype=dtype)
    weight.grad_added_to_main_grad = False
    seen = []

    def hook(*_):
        seen.append(weight.grad)
        if weight.grad is not None and (not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False)):
            weight.main_grad.add_(weight.grad)
        weight.grad = None

    weight.grad_accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    weight.grad_accumulator.register_hook(hook)
    return seen


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["a third is zero", "all zero"])
def test_gradients_of_weight_and_bias_go_into_main_grad(main_dtype, case):
    hidden, weight, labels = make_inputs(torch.float32)
    bias, token_weights = make_bias(torch.float32), token_weight_cases(SEQ, BATCH)[case].float()
    expected = gradients(reference_nll(hidden, weight, labels, bias=bias), token_weights, weight, bias)
    seen = add_main_grad(weight, main_dtype), add_main_grad(bias, main_dtype)
    for _ in range(2):  # two micro-batches
        nll = linear_cross_entropy(hidden, weight, labels, bias=bias, vocab_size=VOCAB, chunk_tokens=7)
        (nll * token_weights).sum().backward()
    tolerance = 1e-5 if main_dtype == torch.float32 else 2e-2  # two roundings to 8 bits
    for parameter, gradient, grads in zip((weight, bias), expected, seen, strict=True):
        torch.testing.assert_close(parameter.main_grad.float(), 1 + 2 * gradient, rtol=tolerance, atol=tolerance)
        assert parameter.grad_added_to_main_grad
        assert len(grads) == 2
        assert all(grad is not None for grad in grads), "Megatron's overlapped reduction refuses a missing gradient"


@pytest.mark.parametrize("case", ["random", "all zero"])
def test_tied_embeddings(case):
    """The embedding's gradient comes by autograd, the output layer's by main_grad: both must arrive, once."""
    _, weight, labels = make_inputs(torch.float32)
    ids = labels.clamp(min=0)
    token_weights = token_weight_cases(SEQ, BATCH)[case].float()
    nll = reference_nll(F.embedding(ids, weight), weight, labels)
    expected = 1 + torch.autograd.grad((nll * token_weights).sum(), weight)[0]
    add_main_grad(weight, torch.float32)
    weight.zero_out_wgrad = True  # as Megatron's LanguageModule marks a tied embedding
    nll = linear_cross_entropy(F.embedding(ids, weight), weight, labels, vocab_size=VOCAB)
    (nll * token_weights).sum().backward()
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-5, atol=1e-6)


def test_tied_embeddings_without_main_grad():
    _, weight, labels = make_inputs()
    ids = labels.clamp(min=0)
    expected = torch.autograd.grad(reference_nll(F.embedding(ids, weight), weight, labels).sum(), weight)
    nll = linear_cross_entropy(F.embedding(ids, weight), weight, labels, vocab_size=VOCAB)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), weight), expected)


def test_autocast_and_recompute():
    hidden, weight, labels = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
        cast = gradients(nll, 1.0, hidden, weight)
    assert nll.dtype == torch.float32
    assert [grad.dtype for grad in cast] == [torch.float32, torch.float32]
    low_hidden, low_weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    low_nll = linear_cross_entropy(low_hidden, low_weight, labels, vocab_size=VOCAB)
    assert torch.equal(nll, low_nll)
    for ours, theirs in zip(cast, gradients(low_nll, 1.0, low_hidden, low_weight), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)
    plain = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    again = checkpoint(linear_cross_entropy, hidden, weight, labels, vocab_size=VOCAB, use_reentrant=False)
    assert torch.equal(again, plain)
    for ours, theirs in zip(gradients(again, 1.0, hidden, weight), gradients(plain, 1.0, hidden, weight), strict=True):
        assert torch.equal(ours, theirs)
