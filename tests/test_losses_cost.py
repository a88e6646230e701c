"""What the loss costs: FLOPs, what is saved for backward, and memory. What it computes: test_losses.py."""

import weakref

import pytest
import torch
from test_losses import BATCH, HIDDEN, ROW_BYTES, SEQ, VOCAB, gradients, make_inputs, token_weight_cases
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_tw.losses import linear_cross_entropy


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


def test_kept_logits_of_a_chunk_are_one_buffer():
    hidden, weight, labels = make_inputs()
    _, kept = saved_tensors(hidden, weight, labels, vocab_size=VOCAB, tile_entries=3, keep_logits_bytes=1 << 20)
    tiles = [tensor for tensor in kept if tensor.dim() == 2]
    assert len(tiles) > 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in tiles}) == 1
