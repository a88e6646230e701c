"""The loss on tensor-parallel gloo ranks equals the loss of full logits on one rank, in fp64: NLL and gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_losses import gradients, make_bias, make_inputs, reference_nll, reference_top1, token_weight_cases

from megatron_tw.losses import linear_cross_entropy, vocab_parallel_cross_entropy

SEQ, BATCH = 8, 2
SIZES = {"seq": SEQ, "batch": BATCH, "vocab": 13, "padded": 16}  # at TP 4 the last shard has 1 true entry of 4
ALL_PADDING = {"seq": SEQ, "batch": BATCH, "vocab": 8, "padded": 16}  # at TP 4 the last two shards have none


def local_slice(tensor):
    return tensor.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()


def assert_equal_to_full_logits(sequence_parallel):
    """On every rank: NLL, gradient of hidden and gradient of the weight shard, for every kind of token weights."""
    group = dist.group.WORLD
    row_bytes = 8 * SIZES["padded"] // dist.get_world_size()
    some_kept = {"chunk_tokens": 6, "tile_entries": 3, "keep_logits_bytes": 9 * row_bytes}
    splits: tuple[dict[str, Any], ...] = (
        {"chunk_tokens": 1},
        {"chunk_tokens": 6, "tile_entries": 3},
        some_kept,
        {"keep_logits_bytes": 1 << 20},
    )
    for sizes, own_splits in ((SIZES, splits), (ALL_PADDING, (some_kept,))):
        hidden, weight, labels = make_inputs(**sizes)
        own_hidden = local_slice(hidden) if sequence_parallel else hidden
        own_weight = local_slice(weight)
        vocab = sizes["vocab"]
        assert_bias_equals_full_logits(own_hidden, hidden, weight, labels, vocab, sequence_parallel, own_splits)
        expected_nll = reference_nll(hidden, weight, labels, vocab)
        for token_weights in token_weight_cases(SEQ, BATCH).values():
            expected_loss = (expected_nll * token_weights).sum()
            expected_hidden, expected_weight = torch.autograd.grad(expected_loss, (hidden, weight), retain_graph=True)
            if sequence_parallel:
                expected_hidden = local_slice(expected_hidden)
            expected = expected_hidden, local_slice(expected_weight)
            for split in own_splits:
                nll = linear_cross_entropy(
                    own_hidden,
                    own_weight,
                    labels,
                    tp_group=group,
                    sequence_parallel=sequence_parallel,
                    vocab_size=vocab,
                    **split,
                )
                torch.testing.assert_close(nll, expected_nll, rtol=1e-12, atol=1e-12)
                actual = gradients(nll, token_weights, own_hidden, own_weight)
                torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
            if sequence_parallel:  # logits are always those of the full local sequence
                continue
            own_logits = (hidden @ own_weight.T).detach().requires_grad_()
            nll = vocab_parallel_cross_entropy(own_logits, labels, tp_group=group, vocab_size=vocab)
            torch.testing.assert_close(nll, expected_nll, rtol=1e-12, atol=1e-12)
            (logits_grad,) = torch.autograd.grad((nll * token_weights).sum(), own_logits)
            weight_grad = torch.einsum("sbv,sbh->vh", logits_grad, hidden)
            torch.testing.assert_close(weight_grad, expected[1], rtol=1e-11, atol=1e-12)


def assert_bias_equals_full_logits(own_hidden, hidden, weight, labels, vocab, sequence_parallel, splits):
    bias = make_bias(padded=len(weight))
    own_weight, own_bias = local_slice(weight), local_slice(bias)
    first = torch.nn.functional.linear(hidden, weight, bias)[..., :vocab].argmax(-1)
    labels = torch.where((torch.arange(SEQ) % 2 == 0)[:, None] & (labels != -100), first, labels)
    expected_nll = reference_nll(hidden, weight, labels, vocab, bias)
    token_weights = token_weight_cases(SEQ, BATCH)["a third is zero"]
    expected_hidden, *expected = gradients(expected_nll, token_weights, hidden, weight, bias)
    expected_hidden = local_slice(expected_hidden) if sequence_parallel else expected_hidden
    options = {"tp_group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "vocab_size": vocab}
    expected_top1 = reference_top1(hidden, weight, labels, vocab, bias)
    assert 0 < expected_top1.sum() < labels.numel()
    for split in splits:
        top1 = torch.ones_like(labels, dtype=torch.bool)
        nll = linear_cross_entropy(own_hidden, own_weight, labels, bias=own_bias, top1=top1, **options, **split)
        torch.testing.assert_close(nll, expected_nll, rtol=1e-12, atol=1e-12)
        assert torch.equal(top1, expected_top1)
        actual = gradients(nll, token_weights, own_hidden, own_weight, own_bias)
        torch.testing.assert_close(actual, (expected_hidden, *map(local_slice, expected)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp_size", [4, 2])  # the slower index, and the other tests' size last: each pool starts once
def test_equals_full_logits(ranks, tp_size, sequence_parallel):
    ranks(tp_size).run(assert_equal_to_full_logits, sequence_parallel)


def count_collectives(sequence_parallel):
    """Names and sizes of the collectives of forward and backward, when one row has a weight."""
    hidden, weight, labels = make_inputs(**SIZES)
    own_hidden = local_slice(hidden) if sequence_parallel else hidden
    calls = []
    originals = {
        name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    }
    for name, original in originals.items():

        def counted(*args, name=name, original=original, **kwargs):
            calls.append((name, args[0].numel()))
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    try:
        nll = linear_cross_entropy(
            own_hidden,
            local_slice(weight),
            labels,
            tp_group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            vocab_size=SIZES["vocab"],
            chunk_tokens=8,
        )
        forward_calls, calls[:] = list(calls), []
        nll[0, 0].backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return forward_calls, calls


def test_collectives_are_few_and_only_as_large_as_the_chosen_rows(ranks):
    tokens, width = SEQ * BATCH, 5
    for forward_calls, backward_calls in ranks(2).run(count_collectives, False):
        assert forward_calls == [("all_reduce", tokens), ("all_reduce", 2 * tokens)]
        assert backward_calls == [("all_reduce", tokens), ("all_reduce", width)]
    for forward_calls, backward_calls in ranks(2).run(count_collectives, True):
        chunks = [("all_gather_into_tensor", 8 * width)] * (tokens // 8)
        assert forward_calls == [*chunks, ("all_reduce", tokens), ("all_reduce", 2 * tokens)]
        assert backward_calls == [
            ("all_reduce", tokens),
            ("all_gather_into_tensor", 2 * width),
            ("reduce_scatter_tensor", width),
        ]


def weigh_by_rank():
    """Token weights that differ on the ranks (they should not): zero on rank 1, where rank 0 has a row."""
    hidden, weight, labels = make_inputs(**SIZES)
    token_weights = token_weight_cases(SEQ, BATCH)["one row" if dist.get_rank() == 0 else "all zero"]
    for sequence_parallel in (False, True):
        own_hidden = local_slice(hidden) if sequence_parallel else hidden
        nll = linear_cross_entropy(
            own_hidden,
            local_slice(weight),
            labels,
            tp_group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            vocab_size=SIZES["vocab"],
        )
        (nll * token_weights).sum().backward()


def test_ranks_that_disagree_about_zero_weights_do_not_hang(ranks):
    ranks(2).run(weigh_by_rank)


def sum_over_context_ranks():
    """One valid token in a row that is cut over context-parallel ranks: their gradients sum to those of one rank."""
    hidden, weight, labels = make_inputs(**SIZES)
    labels = torch.full_like(labels, -100)
    labels[SEQ - 1, 0] = 3
    expected = gradients(reference_nll(hidden, weight, labels, 13), 1.0, hidden, weight)
    own_hidden, own_labels = local_slice(hidden), labels.chunk(dist.get_world_size())[dist.get_rank()]
    nll = linear_cross_entropy(own_hidden, weight, own_labels, vocab_size=13)
    hidden_grad, weight_grad = gradients(nll, 1.0, own_hidden, weight)
    dist.all_reduce(weight_grad)
    torch.testing.assert_close(weight_grad, expected[1])
    torch.testing.assert_close(hidden_grad, local_slice(expected[0]))


def test_one_valid_token_over_context_parallel_ranks(ranks):
    ranks(2).run(sum_over_context_ranks)


def odd_sequence():
    hidden, weight, labels = make_inputs(seq=15)
    linear_cross_entropy(hidden, weight, labels, tp_group=dist.group.WORLD, sequence_parallel=True)


def test_sequence_that_cannot_be_split_is_an_error(ranks):
    with pytest.raises(ValueError, match="labels: expected a sequence divisible by the tensor-parallel size 2, got 15"):
        ranks(2).run(odd_sequence)
