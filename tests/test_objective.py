"""The objective equals full logits in plain PyTorch, in every layout, and is what the training step computes."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import STRIDE, WINDOW, Axes, layout_of, load_tiny, reference_rows
from torch import Tensor

import megatron_tw.model.gpt as gpt
from megatron_tw.model.forward import call_model, long_sequences, row_layout
from megatron_tw.objective import RowLayout, StepReport, WeightedLoss, weighted_cross_entropy, weighted_loss
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training.step import StepBatch, TrainingStep
from megatron_tw.weighting import WeightingConfig, plan_windows, unfrozen_short_nll
from megatron_tw.weighting.schedule import Stage, WeightingSchedule

BATCH, SEQ, HIDDEN, VOCAB, PADDED = 2, 8, 5, 11, 12
SCHEMES = {
    "dense": WeightingConfig.preset("dense", interpolation=0.75),
    "sparse": WeightingConfig.preset("sparse", sparsification=0.4),
    "uniform": WeightingConfig.preset("uniform"),
}
MASKS = ("none", "last", "a context-parallel shard", "a row", "all but one", "all")


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [batch, seq, hidden], head, its bias and short NLL [batch, seq], fp64."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((BATCH, SEQ, HIDDEN), (PADDED, HIDDEN), (PADDED,))
    )
    return hidden, weight, bias, 3 * torch.rand(BATCH, SEQ, generator=generator, dtype=torch.float64)


def make_labels(mask: str) -> Tensor:
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(4))
    match mask:
        case "last":
            labels[:, -1] = -100
        case "a context-parallel shard":  # of rank 1 of 2 in zigzag, and one more
            labels[:, 2:6] = -100
            labels[0, 7] = -100
        case "a row":
            labels[0] = -100
        case "all but one":
            labels[0, :] = labels[1, :5] = labels[1, 6:] = -100
        case "all":
            labels[:] = -100
    return labels


def naive_weights(scores: list[float], scheme: str) -> list[float]:
    """The published formulas, for the valid targets of one row."""
    if scheme == "uniform" or not scores:
        return [1.0] * len(scores)
    magnitudes = [abs(score) for score in scores]
    if scheme == "sparse":
        chosen = sorted(magnitudes, reverse=True)[: max(1, int(0.4 * len(scores)))]
        return [len(scores) / len(chosen) if magnitude in chosen else 0.0 for magnitude in magnitudes]
    return [0.75 + 0.25 * magnitude * len(scores) / sum(magnitudes) for magnitude in magnitudes]


def naive_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, short: Tensor, scheme: str
) -> tuple[Tensor, int]:
    """Sum of weight x NLL from full logits, and the count of targets."""
    logits = (hidden @ weight.T + bias)[..., :VOCAB]
    total, count = hidden.new_zeros(()), 0
    for row in range(BATCH):
        places = (labels[row] != -100).nonzero()[:, 0].tolist()
        nlls = [-logits[row, place].log_softmax(0)[labels[row, place]] for place in places]
        scores = [float(nll.detach()) - float(short[row, place]) for nll, place in zip(nlls, places, strict=True)]
        total = total + sum(w * nll for w, nll in zip(naive_weights(scores, scheme), nlls, strict=True))
        count += len(places)
    return total, count


def report() -> StepReport:
    return StepReport((1, 4, SEQ + 1), old_context=4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_full_logits(scheme: str, mask: str, batch_first: bool) -> None:
    hidden, weight, bias, short = make_inputs()
    labels = make_labels(mask)
    expected, count = naive_loss(hidden, weight, bias, labels, short, scheme)
    expected_grads = torch.autograd.grad(expected, (hidden, weight, bias), allow_unused=True, materialize_grads=True) \
        if count else [torch.zeros_like(x) for x in (hidden, weight, bias)]  # fmt: skip
    laid_out = (hidden, labels) if batch_first else (hidden.transpose(0, 1), labels.T)
    loss = weighted_cross_entropy(
        laid_out[0],
        weight,
        laid_out[1],
        short,
        SCHEMES[scheme],
        bias=bias,
        layout=RowLayout(batch_first=batch_first),
        vocab_size=VOCAB,
    )
    assert loss.count == count
    # Weights are fp32.
    torch.testing.assert_close(loss.sum, expected, rtol=1e-6, atol=1e-7)
    grads = torch.autograd.grad(loss.sum, (hidden, weight, bias))
    torch.testing.assert_close(list(grads), list(expected_grads), rtol=1e-6, atol=1e-7)


def compare_layouts(tp_size: int, cp_size: int) -> None:
    """On every rank: this layout's loss, count, statistics, weights and gradients are those of one rank."""
    rank, ranks = dist.get_rank(), range(tp_size * cp_size)
    tp_groups = [dist.new_group(list(ranks[start : start + tp_size])) for start in ranks[::tp_size]]
    cp_groups = [dist.new_group(list(ranks[start::tp_size])) for start in range(tp_size)]
    tp_rank, cp_rank = rank % tp_size, rank // tp_size
    groups: dict[str, Any] = {"tp_group": tp_groups[cp_rank], "cp_group": cp_groups[tp_rank]}
    try:
        for scheme, mask in product(SCHEMES, MASKS):
            whole = loss_of(RowLayout(), scheme, mask)
            for batch_first, sequence_parallel, cp_slices in product((True, False), (True, False), CP_SLICES):
                layout = RowLayout(
                    batch_first=batch_first, sequence_parallel=sequence_parallel, cp_slices=cp_slices, **groups
                )
                compare(layout, loss_of(layout, scheme, mask), whole)
    finally:
        for group in (*tp_groups, *cp_groups):
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


CP_SLICES: tuple[Any, ...] = ("zigzag", "contiguous")


def tensor_slice(layout: RowLayout, x: Tensor, dim: int) -> Tensor:
    assert layout.tp_group is not None
    return x.chunk(layout.tp_group.size(), dim)[layout.tp_group.rank()]


def loss_of(layout: RowLayout, scheme: str, mask: str) -> tuple[WeightedLoss, list[Tensor]]:
    """Of one layout: the loss, and the gradients of this rank's hidden states, head and bias."""
    hidden, weight, bias, short = make_inputs()
    labels = layout.slice(make_labels(mask))
    hidden = layout.slice(hidden)
    if layout.tp_group is not None:
        weight, bias = (tensor_slice(layout, x, 0) for x in (weight, bias))
        if layout.sequence_parallel:
            hidden = tensor_slice(layout, hidden, 1)
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    hidden = leaves[0] if layout.batch_first else leaves[0].transpose(0, 1)
    labels = labels if layout.batch_first else labels.T
    loss = weighted_cross_entropy(
        hidden, leaves[1], labels, short, SCHEMES[scheme], bias=leaves[2], layout=layout, vocab_size=VOCAB,
        chunk_tokens=4, report=report(),
    )  # fmt: skip
    return loss, list(torch.autograd.grad(loss.sum, leaves))


def compare(
    layout: RowLayout, here: tuple[WeightedLoss, list[Tensor]], whole: tuple[WeightedLoss, list[Tensor]]
) -> None:
    (loss, grads), (expected, expected_grads) = here, whole
    total = torch.stack([loss.sum.detach(), loss.count.double()])
    dist.all_reduce(total, group=layout.cp_group)
    for grad in grads[1:]:
        dist.all_reduce(grad, group=layout.cp_group)
    torch.testing.assert_close(total, torch.stack([expected.sum.detach(), expected.count.double()]), rtol=1e-6, atol=0)
    for name in ("weights", "long_nll", "valid", "statistics"):
        torch.testing.assert_close(getattr(loss, name), getattr(expected, name), rtol=1e-6, atol=1e-9, msg=name)
    hidden_grad = layout.slice(expected_grads[0])
    if layout.sequence_parallel:
        hidden_grad = tensor_slice(layout, hidden_grad, 1)
    parameter_grads = [tensor_slice(layout, grad, 0) for grad in expected_grads[1:]]
    torch.testing.assert_close(grads, [hidden_grad, *parameter_grads], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("tp_size", "cp_size"), [(2, 1), (1, 2), (2, 2)])
def test_layouts_are_equal(tp_size: int, cp_size: int, ranks) -> None:
    ranks(tp_size * cp_size).run(compare_layouts, tp_size, cp_size)


def gathered(labelled: bool) -> list[tuple[torch.dtype, int]]:
    """What is gathered over two context-parallel ranks: dtype and numbers that each rank gives."""
    sent, original = [], dist.all_gather

    def counted(shards, local, **kwargs):
        sent.append((local.dtype, local.numel()))
        return original(shards, local, **kwargs)

    layout = RowLayout(cp_group=dist.group.WORLD)
    labels = layout.slice(make_labels("last"))
    dist.all_gather = counted  # type: ignore[assignment]
    try:
        weighted_loss(torch.rand(BATCH, SEQ // 2), None, SCHEMES["uniform"], labels=labels if labelled else None,
                      layout=layout)  # fmt: skip
    finally:
        dist.all_gather = original
    return sent


@pytest.mark.parametrize("labelled", [True, False])
def test_four_bytes_a_target_are_gathered(labelled: bool, ranks) -> None:
    assert ranks(2).run(gathered, labelled) == [[(torch.float32, BATCH * SEQ // 2)]] * 2


def weights_by_rank() -> tuple[Tensor, Tensor]:
    """On two tensor-parallel ranks, with long NLLs that differ (which they should not): those, and weights."""
    nll = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(dist.get_rank()))
    layout = RowLayout(tp_group=dist.group.WORLD)
    return nll, weighted_loss(nll, torch.zeros(BATCH, SEQ), SCHEMES["sparse"], layout=layout).weights


def test_tensor_ranks_choose_the_same_targets(ranks) -> None:
    (first, weights), (second, others) = ranks(2).run(weights_by_rank)
    assert not torch.equal(first, second)
    assert torch.equal(weights, others)


def test_both_ways_of_labels_are_equal() -> None:
    """S targets with the last one masked, or S - 1 of them; labels, or a mask of whole rows; the NLL, or a function."""
    _, _, _, short = make_inputs()
    labels = make_labels("last")
    nll = torch.rand(BATCH, SEQ, dtype=torch.float64)
    dense, valid = SCHEMES["dense"], labels != -100
    nll[0, 3], labels[0, 3], valid[0, 3] = torch.nan, -100, False
    losses = [
        weighted_loss(nll, short, dense, labels=labels),
        weighted_loss(lambda given: nll if given is labels else given.double(), short[:, :-1], dense, labels=labels),
        weighted_loss(nll, short[:, :-1], dense, valid=valid[:, :-1]),
        weighted_loss(nll, short, dense, valid=valid),
        weighted_loss(nll.T, lambda long: short[:, : long.shape[1]], dense, valid=valid,
                      layout=RowLayout(batch_first=False)),
    ]  # fmt: skip
    for loss in losses:
        assert loss.sum.isfinite()
        assert loss.count == valid.sum() == 2 * SEQ - 3
        torch.testing.assert_close(loss.sum, losses[0].sum, rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.weights[:, : SEQ - 1], losses[0].weights[:, : SEQ - 1])
        loss.check_finite()
    with pytest.raises(ValueError, match="long NLL: expected finite values, got nan at row 0, position 4"):
        weighted_loss(nll, short, dense).check_finite()


LONG, SHORT, DENSE = torch.rand(2, 8), torch.rand(2, 7), SCHEMES["dense"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_loss(LONG, SHORT[:, 1:], DENSE), r"`short_nll`: expected .* 2 x 7 targets.* got 2 x 6"),
        (lambda: weighted_loss(LONG, SHORT[:1], DENSE), "`short_nll`: expected whole rows of 2 x 7 .* got 1 x 7"),
        (lambda: weighted_loss(LONG, SHORT[0], DENSE), "`short_nll`: expected whole rows .* got 7"),
        (lambda: weighted_loss(LONG, SHORT, DENSE, valid=LONG > 0), "`short_nll`: expected .* got 2 x 7"),
        (lambda: weighted_loss(LONG, SHORT, DENSE, report=report()), "`report`: expected .* got 2 x 8"),
        (lambda: weighted_loss(LONG, None, DENSE), "`?short_nll`?.* got None"),
        (lambda: weighted_loss(LONG, SHORT, DENSE, labels=LONG.long()), "`labels`: expected none at the last position"),
        (lambda: weighted_loss(LONG, SHORT, DENSE, labels=LONG[:1]), "`labels`: expected the shape of `long_nll`"),
        (lambda: weighted_loss(LONG[0], SHORT, DENSE), r"`long_nll`: expected two dimensions, .* got shape \[8\]"),
        (lambda: weighted_loss(lambda labels: LONG, SHORT, DENSE), "`labels`: expected them with a `long_nll` that is"),
        (lambda: RowLayout(cp_slices="striped"), "`cp_slices`: expected zigzag or contiguous, got 'striped'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def compare_with_step(axes: Axes, scheme: WeightingConfig) -> tuple[list[float], list[Tensor]]:
    """On a rank: the training step's loss of the tiny Llama, and the objective's of the hidden states that its head
    got; equal in every bit. Returns sum, count and statistics over the context-parallel group."""
    with layout_of(axes) as layout:
        _, chunks = load_tiny(axes, layout)
        rows = torch.from_numpy(reference_rows()[:2])
        valid = torch.rand(2, rows.shape[1] - 1, generator=torch.Generator().manual_seed(1)) < 0.7
        valid[:, 60:200] = False  # most of one context-parallel rank's slice
        short = 4 * torch.rand(valid.shape, generator=torch.Generator().manual_seed(2))
        batch = StepBatch(long_sequences(rows, layout), torch.arange(2), valid, short)
        assert plan_windows(rows.shape[1], WINDOW, STRIDE, include_first=False)
        report = StepReport.of_rows(rows.shape[1], WINDOW)
        step = TrainingStep(
            model=chunks, optimizer=None, scheduler=None, layout=layout, device=prepare_device(),
            schedule=WeightingSchedule((Stage(0, None, scheme),)), scorer=OwnScorer(), report=report, seed=5,  # type: ignore[arg-type]
            flops=None,  # type: ignore[arg-type]
        )  # fmt: skip
        seen: dict[str, Any] = {}

        def spy(hidden, weight, labels, **options):
            seen.update(hidden=hidden, weight=weight, labels=labels, options=options)
            return original(hidden, weight, labels, **options)

        original, gpt.linear_cross_entropy = gpt.linear_cross_entropy, spy
        try:
            nll = call_model(chunks[0], batch.sequences)
        finally:
            gpt.linear_cross_entropy = original
        loss, count, statistics = step._loss(scheme, batch, nll)
        leaves = [seen["hidden"], chunks[0].head_weight()]
        grads = torch.autograd.grad(loss, leaves)
        own = [x.detach().clone().requires_grad_() for x in leaves]
        tokens = seen["labels"].clone()
        sequence_parallel = seen["options"]["sequence_parallel"]
        base = row_layout(layout)
        whole_valid = base.slice(torch.nn.functional.pad(valid, (0, 1)))
        given = weighted_cross_entropy(
            own[0],
            own[1],
            tokens.masked_fill(~whole_valid.T, -100),
            partial(unfrozen_short_nll, short_nll=short, window=WINDOW),
            scheme,
            layout=RowLayout(
                batch_first=False,
                sequence_parallel=sequence_parallel,
                tp_group=layout.tp_group,
                cp_group=layout.cp_group,
            ),
            vocab_size=seen["options"]["vocab_size"],
            row_ids=torch.arange(2),
            seed=5,
            report=report,
        )
        torch.testing.assert_close(given.sum, loss, rtol=1e-6, atol=0)
        assert given.count == count
        torch.testing.assert_close(given.statistics, statistics, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(list(torch.autograd.grad(given.sum, own)), list(grads), rtol=1e-5, atol=1e-7)
        total = torch.stack([loss.detach().double(), count.double()])
        dist.all_reduce(total, group=layout.cp_group)
        dist.all_reduce(grads[1], group=layout.cp_group)
        return total.tolist(), [statistics, grads[1].norm()]


class OwnScorer:
    """The unfrozen scorer's completion alone."""

    def complete(self, short_RT: Tensor, long_RT: Tensor, document_starts_RT: Tensor | None) -> Tensor:
        return unfrozen_short_nll(long_RT, short_RT, WINDOW, document_starts_RT)


@pytest.mark.parametrize("axes", [Axes(), Axes(tp=2), Axes(cp=2), Axes(tp=2, cp=2)], ids=lambda axes: axes.name)
def test_the_training_step_has_the_same_numbers(axes: Axes, ranks) -> None:
    for (loss, count), (statistics, _) in ranks(axes.world_size).run(compare_with_step, axes, SCHEMES["sparse"]):
        metrics = StepReport.of_rows(256, WINDOW).metrics(statistics.tolist(), scored=True)
        assert loss / count == pytest.approx(metrics["weighted_loss"], rel=1e-6)
        assert count == sum(bucket["targets"] for bucket in metrics["by_position"])
