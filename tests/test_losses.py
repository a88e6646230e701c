"""The loss on one rank, against full logits. Its cost: test_losses_cost.py. Parallel ranks: test_losses_parallel.py."""

import pytest
import torch
import torch.nn.functional as F

from megatron_tw.losses import linear_cross_entropy, vocab_parallel_cross_entropy

SEQ, BATCH, HIDDEN, VOCAB, PADDED = 12, 2, 5, 7, 8


def make_inputs(dtype=torch.float64, seq=SEQ, batch=BATCH, width=HIDDEN, vocab=VOCAB, padded=PADDED, seed=0):
    """Hidden states, padded weight (padding far from zero, to be noticed) and labels with some -100."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(seq, batch, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, width, generator=generator, dtype=torch.float64)
    weight[vocab:] += 5.0
    labels = torch.randint(vocab, (seq, batch), generator=generator)
    labels[torch.rand(seq, batch, generator=generator) < 0.15] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def make_bias(dtype=torch.float64, padded=PADDED):
    """As large as the logits themselves, and far from zero where the padding is."""
    bias = torch.randn(padded, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    bias[-1] += 20.0
    return bias.to(dtype).requires_grad_()


def reference_nll(hidden, weight, labels, vocab=VOCAB, bias=None):
    logits = F.linear(hidden, weight, bias)[..., :vocab]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(
        labels.shape
    )


def gradients(nll, weights, *inputs):
    return torch.autograd.grad((nll * weights).sum(), inputs)


def token_weight_cases(seq, batch):
    generator = torch.Generator().manual_seed(1)
    random = torch.rand(seq, batch, generator=generator, dtype=torch.float64)
    one = torch.zeros_like(random)
    one[seq - 2, batch - 1] = 3.0
    return {
        "random": random,
        "a third is zero": random * (random > 0.33),
        "negative": random - 0.5,
        "all zero": torch.zeros_like(random),
        "one row": one,
        "first quarter only": random * (torch.arange(seq) < seq // 4)[:, None],
    }


ROW_BYTES = PADDED * 8  # logits of a token in fp64
SPLITS = [  # of the work: into chunks, into tiles, and into what forward keeps and what backward makes again
    {"chunk_tokens": 1},
    {"chunk_tokens": 7, "tile_entries": 3},
    {"chunk_tokens": 10_000, "tile_entries": 1},
    {"chunk_tokens": 7, "tile_entries": 3, "keep_logits_bytes": 11 * ROW_BYTES},
    {"chunk_tokens": 5, "keep_logits_bytes": 1000 * ROW_BYTES},
    {},
]


@pytest.mark.parametrize("case", token_weight_cases(SEQ, BATCH))
@pytest.mark.parametrize("split", SPLITS)
def test_equals_full_logits_in_fp64(case, split):
    hidden, weight, labels = make_inputs()
    token_weights = token_weight_cases(SEQ, BATCH)[case]
    expected = reference_nll(hidden, weight, labels)
    nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, **split)
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    assert (nll[labels == -100] == 0).all()
    expected_gradients = gradients(expected, token_weights, hidden, weight)
    torch.testing.assert_close(
        gradients(nll, token_weights, hidden, weight), expected_gradients, rtol=1e-11, atol=1e-12
    )
    logits = F.linear(hidden, weight)
    nll = vocab_parallel_cross_entropy(logits, labels, vocab_size=VOCAB)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(nll, token_weights, hidden, weight), expected_gradients, rtol=1e-11, atol=1e-12
    )


def reference_top1(hidden, weight, labels, vocab=VOCAB, bias=None):
    return F.linear(hidden, weight, bias)[..., :vocab].argmax(-1) == labels


@pytest.mark.parametrize("split", SPLITS)
def test_top1_is_the_argmax_of_the_whole_vocabulary(split):
    hidden, weight, labels = make_inputs()
    first = F.linear(hidden, weight)[..., :VOCAB].argmax(-1)
    labels = torch.where((torch.arange(SEQ) % 2 == 0)[:, None] & (labels != -100), first, labels)
    expected = reference_top1(hidden, weight, labels)
    assert 0 < expected.sum() < (labels != -100).sum()
    top1 = torch.ones_like(labels, dtype=torch.bool)
    nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, top1=top1, **split)
    assert torch.equal(top1, expected)
    assert torch.equal(nll, linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, **split))
    swapped = torch.empty(BATCH, SEQ, dtype=torch.bool)
    linear_cross_entropy(
        hidden.transpose(0, 1), weight, labels.T, batch_first=True, vocab_size=VOCAB, top1=swapped, **split
    )
    assert torch.equal(swapped, expected.T)
    linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), top1=top1, **split)
    assert not top1.any()


@pytest.mark.parametrize("case", token_weight_cases(SEQ, BATCH))
@pytest.mark.parametrize("split", SPLITS)
def test_output_bias_equals_full_logits_in_fp64(case, split):
    hidden, weight, labels = make_inputs()
    bias, token_weights = make_bias(), token_weight_cases(SEQ, BATCH)[case]
    expected = reference_nll(hidden, weight, labels, bias=bias)
    nll = linear_cross_entropy(hidden, weight, labels, bias=bias, vocab_size=VOCAB, **split)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # as scoring does
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, bias=bias, vocab_size=VOCAB, **split), nll)
    actual = gradients(nll, token_weights, hidden, weight, bias)
    expected_gradients = gradients(expected, token_weights, hidden, weight, bias)
    torch.testing.assert_close(actual, expected_gradients, rtol=1e-11, atol=1e-12)
    nll = linear_cross_entropy(hidden.detach(), weight.detach(), labels, bias=bias, vocab_size=VOCAB, **split)
    torch.testing.assert_close(gradients(nll, token_weights, bias)[0], actual[2], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", token_weight_cases(4, 2))
def test_gradcheck(case):
    hidden, weight, labels = make_inputs(seq=4)
    bias, token_weights = make_bias(), token_weight_cases(4, 2)[case]

    def loss_with_bias(hidden, weight, bias):
        return loss(hidden, weight, bias=bias, z_loss=0.1)

    def loss(hidden, weight, **options):
        options = {"vocab_size": VOCAB, "chunk_tokens": 3, "tile_entries": 4} | options
        return linear_cross_entropy(hidden, weight, labels, **options) * token_weights

    def loss_of_kept_logits(hidden, weight):
        return loss(hidden, weight, keep_logits_bytes=5 * ROW_BYTES, z_loss=0.1)

    def loss_of_logits(hidden, weight):
        return vocab_parallel_cross_entropy(F.linear(hidden, weight), labels, vocab_size=VOCAB) * token_weights

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    # Its second backward makes the logits again, so it is the same up to rounding only.
    assert torch.autograd.gradcheck(loss_of_kept_logits, (hidden, weight), nondet_tol=1e-12)
    assert torch.autograd.gradcheck(loss_of_logits, (hidden, weight))
    assert torch.autograd.gradcheck(loss_with_bias, (hidden, weight, bias))


def test_only_the_gradient_that_is_wanted():
    hidden, weight, labels = make_inputs()
    full = gradients(reference_nll(hidden, weight, labels), 1.0, hidden, weight)
    nll = linear_cross_entropy(hidden.detach(), weight, labels, vocab_size=VOCAB)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), weight)[0], full[1])
    nll = linear_cross_entropy(hidden, weight.detach(), labels, vocab_size=VOCAB)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), hidden)[0], full[0])


def test_a_second_backward_makes_again_what_the_first_has_used_up():
    hidden, weight, labels = make_inputs()
    nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, keep_logits_bytes=1 << 20)
    first = torch.autograd.grad(nll.sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), (hidden, weight)), first)


@pytest.mark.parametrize("keep_logits_bytes", [0, 5 * ROW_BYTES])
def test_z_loss(keep_logits_bytes):
    hidden, weight, labels = make_inputs()
    lse = F.linear(hidden, weight)[..., :VOCAB].logsumexp(dim=-1)
    expected = reference_nll(hidden, weight, labels) + 0.01 * torch.where(labels == -100, 0.0, lse**2)
    options = {"vocab_size": VOCAB, "z_loss": 0.01, "keep_logits_bytes": keep_logits_bytes}
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    torch.testing.assert_close(loss, expected)
    token_weights = token_weight_cases(SEQ, BATCH)["a third is zero"]
    torch.testing.assert_close(
        gradients(loss, token_weights, hidden, weight), gradients(expected, token_weights, hidden, weight)
    )


def test_all_labels_ignored_and_no_tokens_at_all():
    hidden, weight, labels = make_inputs()
    nll = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), vocab_size=VOCAB)
    assert (nll == 0).all()
    assert all((grad == 0).all() for grad in gradients(nll, 1.0, hidden, weight))
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0], vocab_size=VOCAB)
    assert empty.shape == (0, BATCH)
    assert all((grad == 0).all() for grad in gradients(empty, 1.0, hidden, weight))


def test_weights_of_a_64th_give_exactly_a_64th():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels = make_inputs(dtype)
        nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_tokens=5)
        whole = gradients(nll, 1.0, hidden, weight)
        nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_tokens=5)
        part = gradients(nll, 1 / 64, hidden, weight)
        assert all(torch.equal(a / 64, b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("keep_logits_bytes", [0, 7 * ROW_BYTES])
def test_bitwise_the_same_twice_and_inputs_unchanged(keep_logits_bytes):
    hidden, weight, labels = make_inputs(torch.float32)
    before = hidden.detach().clone(), weight.detach().clone(), labels.clone()
    results = []
    for _ in range(2):
        options = {"chunk_tokens": 4, "tile_entries": 3, "keep_logits_bytes": keep_logits_bytes}
        nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, **options)
        results.append((nll, *gradients(nll, 1.0, hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, labels), before, strict=True))


@pytest.mark.parametrize("keep_logits_bytes", [0, 1 << 20])
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize(("weighted", "biased"), [(False, False), (True, False), (True, True)])
def test_bf16_error_is_not_above_that_of_the_plain_bf16_path(weighted, biased, certain, keep_logits_bytes):
    """Norms of the errors against fp64 on the same bf16 numbers. Plain: bf16 logits, then cross-entropy in fp32.

    In the certain case a label's probability is near 1: there the error of its logit must cancel, or nothing is left.
    """
    bound = 0.8 if certain else 1.05  # measured: 0.59 to 0.75, and 0.83 to 1.00; the label's logit is fp32 here
    sizes = {"seq": 96, "batch": 2, "width": 64, "vocab": 509, "padded": 512, "seed": 2}
    hidden, weight, labels = make_inputs(torch.bfloat16, **sizes)
    hidden.data.mul_(0.5)
    if certain:
        hidden.data += 0.3 * weight.data[labels.clamp(min=0)]
    token_weights = token_weight_cases(96, 2)["a third is zero"].float() if weighted else torch.ones(96, 2)
    bias = make_bias(torch.bfloat16, 512) if biased else None
    inputs = [hidden, weight] + [bias] * biased
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_hidden, exact_weight, *exact_bias = exact_inputs
    exact_nll = reference_nll(exact_hidden, exact_weight, labels, 509, *exact_bias)
    assert (exact_nll.median() < 0.1) == certain
    exact = exact_nll, *gradients(exact_nll, token_weights, *exact_inputs)
    logits = F.linear(hidden, weight, bias)[..., :509].float().flatten(0, 1)
    plain_nll = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)
    plain = plain_nll, *gradients(plain_nll, token_weights, *inputs)
    options = {"chunk_tokens": 20, "tile_entries": 200, "keep_logits_bytes": keep_logits_bytes}
    nll = linear_cross_entropy(hidden, weight, labels, bias=bias, vocab_size=509, **options)
    assert nll.dtype == torch.float32
    ours = nll, *gradients(nll, token_weights, *inputs)
    for our, their, right in zip(ours, plain, exact, strict=True):
        assert (our - right).norm() <= bound * (their - right).norm()


@pytest.mark.parametrize("bad_label", [VOCAB, -1, -101, 2**40])
def test_label_out_of_range_is_an_error(bad_label):
    hidden, weight, labels = make_inputs()
    labels[3, 1] = bad_label
    message = f"labels: expected 0 to {VOCAB - 1}, or -100 to ignore, got {bad_label}"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(F.linear(hidden, weight), labels, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(SEQ, BATCH)}, "labels: expected int64"),
        ({"labels": torch.zeros(SEQ, dtype=torch.int64)}, "labels: expected .seq, batch., got shape"),
        ({"labels": torch.zeros(SEQ + 1, BATCH, dtype=torch.int64)}, "hidden: expected .13, 2, 5. for labels"),
        ({"weight": torch.zeros(PADDED, HIDDEN + 1)}, "hidden: expected .12, 2, 6. "),
        (
            {"weight": torch.zeros(PADDED, HIDDEN)},
            "weight: expected the dtype of hidden torch.float64, got torch.float32",
        ),
        ({"bias": torch.zeros(PADDED - 1, dtype=torch.float64)}, "bias: expected .8., one for each row .*, got .7."),
        ({"bias": torch.zeros(PADDED)}, "bias: expected the dtype of weight torch.float64, got torch.float32"),
        ({"vocab_size": PADDED + 1}, "vocab_size: expected 1 to 8 .*got 9"),
        ({"chunk_tokens": 0}, "chunk_tokens: expected 1 or more, got 0"),
        ({"tile_entries": -1}, "tile_entries: expected 1 or more, got -1"),
        ({"keep_logits_bytes": -1}, "keep_logits_bytes: expected 0 or more, got -1"),
        ({"top1": torch.zeros(SEQ, BATCH)}, r"top1: expected bool \[12, 2\], as labels, got torch.float32"),
        ({"top1": torch.zeros(BATCH, SEQ, dtype=torch.bool)}, r"top1: expected bool \[12, 2\], .* \[2, 12\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, labels = make_inputs()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "labels": labels} | change))


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[[300.0, -300.0]]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    nll = linear_cross_entropy(hidden, weight, torch.tensor([[1]]))
    assert nll.item() == 600.0
    hidden_grad, _ = gradients(nll, 1.0, hidden, weight)
    assert hidden_grad.flatten().tolist() == [1.0, -1.0]
