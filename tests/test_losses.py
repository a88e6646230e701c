"""The loss on one rank, against full logits. Parallel ranks: test_losses_parallel.py."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

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


def reference_nll(hidden, weight, labels, vocab=VOCAB):
    logits = F.linear(hidden, weight)[..., :vocab]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(
        labels.shape
    )


def gradients(nll, weights, hidden, weight):
    return torch.autograd.grad((nll * weights).sum(), (hidden, weight))


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


@pytest.mark.parametrize("case", token_weight_cases(4, 2))
def test_gradcheck(case):
    hidden, weight, labels = make_inputs(seq=4)
    token_weights = token_weight_cases(4, 2)[case]

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


def test_only_the_gradient_that_is_wanted():
    hidden, weight, labels = make_inputs()
    full = gradients(reference_nll(hidden, weight, labels), 1.0, hidden, weight)
    nll = linear_cross_entropy(hidden.detach(), weight, labels, vocab_size=VOCAB)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), weight)[0], full[1])
    nll = linear_cross_entropy(hidden, weight.detach(), labels, vocab_size=VOCAB)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), hidden)[0], full[0])


def addmm_flops(_, left, right, *, out_shape=None, **kwargs):
    """FLOPs of an in-place addmm_, which torch's counter leaves out, from the shapes of its matrices."""
    return 2 * left[0] * left[1] * right[1]


def count_flops():
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})


@pytest.mark.parametrize("keep_logits_bytes", [0, 1 << 20])
@pytest.mark.parametrize(("case", "rows"), [("random", None), ("one row", 1), ("all zero", 0)])
def test_backward_works_only_on_rows_with_a_gradient(case, rows, keep_logits_bytes):
    hidden, weight, labels = make_inputs()
    labels[labels == -100] = 0
    options = {"vocab_size": VOCAB, "tile_entries": 3, "keep_logits_bytes": keep_logits_bytes}
    nll = linear_cross_entropy(hidden, weight, labels, **options)
    with count_flops() as counter:
        hidden_grad, weight_grad = gradients(nll, token_weight_cases(SEQ, BATCH)[case], hidden, weight)
    rows = SEQ * BATCH if rows is None else rows
    gemms = 2 if keep_logits_bytes else 3  # logits again, unless they were kept, and two gradients
    assert counter.get_total_flops() == gemms * 2 * rows * HIDDEN * VOCAB
    assert hidden_grad.shape == hidden.shape
    assert weight_grad.shape == weight.shape
    if rows == 0:
        assert (hidden_grad == 0).all()
        assert (weight_grad == 0).all()


def test_forward_works_only_on_rows_with_a_label():
    hidden, weight, labels = make_inputs()
    with count_flops() as counter:
        linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    num_labelled = int((labels != -100).sum())
    assert 0 < num_labelled < labels.numel()
    assert counter.get_total_flops() == 2 * num_labelled * HIDDEN * VOCAB


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
@pytest.mark.parametrize("weighted", [False, True])
def test_bf16_error_is_not_above_that_of_the_plain_bf16_path(weighted, certain, keep_logits_bytes):
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
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    exact_nll = reference_nll(exact_hidden, exact_weight, labels, 509)
    assert (exact_nll.median() < 0.1) == certain
    exact = exact_nll, *gradients(exact_nll, token_weights, exact_hidden, exact_weight)
    logits = F.linear(hidden, weight)[..., :509].float().flatten(0, 1)
    plain_nll = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)
    plain = plain_nll, *gradients(plain_nll, token_weights, hidden, weight)
    options = {"chunk_tokens": 20, "tile_entries": 200, "keep_logits_bytes": keep_logits_bytes}
    nll = linear_cross_entropy(hidden, weight, labels, vocab_size=509, **options)
    assert nll.dtype == torch.float32
    ours = nll, *gradients(nll, token_weights, hidden, weight)
    for our, their, right in zip(ours, plain, exact, strict=True):
        assert (our - right).norm() <= bound * (their - right).norm()


def saved_tensors(*inputs, **options):
    """What the loss of these inputs keeps for backward, beyond the inputs."""
    live: list[torch.Tensor] = []

    def pack(tensor):
        live.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        nll = linear_cross_entropy(*inputs, **options)
    kept = [tensor for chunk in getattr(nll.grad_fn, "kept_chunks", []) for tile in chunk.kept for tensor in tile]
    pointers = {tensor.data_ptr() for tensor in inputs}
    return [tensor for tensor in live if tensor.data_ptr() not in pointers], kept


def test_under_no_grad_nothing_is_saved():
    hidden, weight, labels = make_inputs()
    with torch.no_grad():
        assert saved_tensors(hidden, weight, labels, vocab_size=VOCAB, keep_logits_bytes=1 << 20) == ([], [])
        nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    assert not nll.requires_grad


def test_saves_hidden_weight_labels_and_two_numbers_a_token():
    saved, kept = saved_tensors(*make_inputs(), vocab_size=VOCAB)
    assert [tensor.numel() for tensor in saved] == [SEQ * BATCH, SEQ * BATCH]  # log-sum-exp and the label's logit
    assert kept == []


def test_keeps_logits_of_as_many_tokens_as_fit():
    hidden, weight, labels = make_inputs()
    options = {"vocab_size": VOCAB, "chunk_tokens": 4, "keep_logits_bytes": 10 * ROW_BYTES + 1}
    _, kept = saved_tensors(hidden, weight, labels, **options)
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 7), (4,), (4, 7), (4,), (2, 7), (2,)]


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
def test_weight_gradient_goes_into_main_grad(main_dtype, case):
    hidden, weight, labels = make_inputs(torch.float32)
    token_weights = token_weight_cases(SEQ, BATCH)[case].float()
    expected = 1 + 2 * gradients(reference_nll(hidden, weight, labels), token_weights, hidden, weight)[1]
    seen = add_main_grad(weight, main_dtype)
    for _ in range(2):  # two micro-batches
        nll = linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB, chunk_tokens=7)
        (nll * token_weights).sum().backward()
    tolerance = 1e-5 if main_dtype == torch.float32 else 2e-2  # two roundings to 8 bits
    torch.testing.assert_close(weight.main_grad.float(), expected, rtol=tolerance, atol=tolerance)
    assert weight.grad_added_to_main_grad
    assert len(seen) == 2
    assert all(grad is not None for grad in seen), "Megatron's overlapped reduction refuses a missing gradient"


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
        ({"vocab_size": PADDED + 1}, "vocab_size: expected 1 to 8 .*got 9"),
        ({"chunk_tokens": 0}, "chunk_tokens: expected 1 or more, got 0"),
        ({"tile_entries": -1}, "tile_entries: expected 1 or more, got -1"),
        ({"keep_logits_bytes": -1}, "keep_logits_bytes: expected 0 or more, got -1"),
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


class AllocatedBytes(TorchDispatchMode):
    """Bytes of the tensors made under this mode that are alive at a time, counted once for each storage."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in known | self.live.keys():
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("kappa", [1.0, 0.2])
def test_memory_grows_by_at_most_64_bytes_a_token(kappa):
    """Beyond hidden states and their gradient: no logits, nothing of the hidden size."""
    width, peaks = 16, []
    for tokens in (4096, 65536):
        hidden, weight, labels = make_inputs(torch.float32, tokens, 1, width, 64, 64)
        token_weights = (torch.rand(tokens, 1, generator=torch.Generator().manual_seed(1)) < kappa).float()
        with AllocatedBytes() as allocated:
            nll = linear_cross_entropy(hidden, weight, labels)
            gradients(nll, token_weights, hidden, weight)
        assert allocated.peak > tokens * width * 4  # the gradient of hidden is counted
        peaks.append(allocated.peak - tokens * width * 4)
    assert peaks[1] - peaks[0] <= 64 * (65536 - 4096)
