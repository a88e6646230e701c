"""The fused kernels on tiles of logits against plain PyTorch, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from megatron_tw.losses import linear_cross_entropy, logit_tiles

pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for GPUs, and takes 0.9 GB")
from megatron_tw.losses import triton_tiles

WIDTH = triton_tiles.COLUMNS * 2 + 5  # more than a program holds at a time, and no multiple of it
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_tile(dtype):
    """Tile, label (first and last column, columns of other tiles), label's logit, running maximum and sum."""
    generator = torch.Generator().manual_seed(0)
    tile = (3 * torch.randn(5, WIDTH, generator=generator)).to(dtype)
    label = torch.tensor([0, -3, WIDTH - 1, WIDTH, 77])
    target = torch.randn(5, generator=generator)
    maximum = torch.tensor([-torch.inf, 1.0, 20.0, 0.0, -5.0])
    total = torch.tensor([0.0, 2.0, 3.0, 1.0, 1.0])
    return [tensor.to(DEVICE) for tensor in (tile, label, target, maximum, total)]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_plain_pytorch(dtype, keep):
    plain = logit_tiles.PLAIN
    ours, expected = make_tile(dtype), make_tile(dtype)
    triton_tiles.add_statistics_(*ours, keep=keep)
    plain.add_statistics_(*expected, keep=keep)
    torch.testing.assert_close(ours[3:], expected[3:], rtol=1e-4, atol=0.0)  # sums of 4000 in fp32, in another order
    rtol = 1e-5 if dtype == torch.float32 else 2**-7  # bf16: one unit in the last place
    if keep:
        torch.testing.assert_close(ours[0], expected[0], rtol=rtol, atol=1e-9)
    tile, label, target, maximum, total = expected
    if not keep:
        tile = make_tile(dtype)[0]
    lse = maximum + total.log()
    lse[1] = torch.inf  # a row without gradient
    scales = (
        torch.tensor([0.5, 0.0, -2.0, 1.0, 3.0], device=DEVICE),
        torch.tensor([0.4, 0.0, -2.0, 1.0, 3.0], device=DEVICE),
    )
    shift = maximum if keep else None
    gradients = tile.clone(), tile.clone()
    triton_tiles.logit_gradient_(gradients[0], label, target, lse, *scales, shift)
    plain.logit_gradient_(gradients[1], label, target, lse, *scales, shift)
    assert (gradients[1][1] == 0).all()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("keep_logits_bytes", [0, 1 << 20])
def test_loss_with_kernels_equals_loss_without(monkeypatch, keep_logits_bytes):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 1, 4, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(9, 4, generator=generator).to(DEVICE).requires_grad_()
    bias = torch.randn(9, generator=generator).to(DEVICE).requires_grad_()
    labels = torch.tensor([3, 0, -100, 8, 1, 6], device=DEVICE)[:, None]
    results = []
    for operations in (triton_tiles, logit_tiles.PLAIN):
        monkeypatch.setattr("megatron_tw.losses.chunked_head.tile_operations", lambda *_, chosen=operations: chosen)
        options = {"vocab_size": 9, "chunk_tokens": 4, "tile_entries": 4, "keep_logits_bytes": keep_logits_bytes}
        nll = linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
        results.append((nll.detach(), *torch.autograd.grad((nll * nll.detach()).sum(), (hidden, weight, bias))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
