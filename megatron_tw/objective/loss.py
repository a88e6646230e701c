"""The objective: from NLLs of rows, however a trainer lays them out, to the weighted loss sum and the count of targets.

    local NLL (on the graph) -> gathered over the context-parallel group, 4 bytes a target -> weights of whole rows, the
    same on all tensor-parallel ranks -> this rank's slice -> sum(weight * NLL), count of valid targets

Sum first, divide once: whoever trains adds up sums and counts of all micro-batches and ranks, and divides at the end.

Shape suffixes: R rows, S positions of a whole row, L those that this rank holds, T targets of a whole row, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_tw.losses import linear_cross_entropy
from megatron_tw.objective.report import StepReport
from megatron_tw.objective.rows import WHOLE_ROWS, RowLayout
from megatron_tw.objective.short_windows import IGNORED
from megatron_tw.weighting import Scheme, check_finite, token_weights
from megatron_tw.weighting import document_starts as starts_of

ShortNLL = Tensor | Callable[[Tensor], Tensor] | None
"""[rows, targets] of whole rows; or a function that makes it from the long NLL [rows, targets]; or None, for schemes
that need no scorer."""


@dataclass(frozen=True, kw_only=True)
class WeightedLoss:
    """What the objective gives back: of this rank's targets the loss, of whole rows everything else.

    sum: fp32 (fp64 for fp64 NLLs) scalar on the graph, weight * NLL over the targets that this rank holds.
    count: int32 scalar, the valid ones among them. Weights do not touch it.
    weights: [rows, targets] fp32; 0 at masked targets. long_nll, short_nll: [rows, targets], detached; what stands at
    masked targets has no meaning. valid: [rows, targets] bool. All four are the same on every tensor- and
    context-parallel rank.
    statistics: [StepReport.size] fp64, sums over the whole rows; None without a report. To be added up over
    micro-batches and data-parallel ranks, not over tensor- or context-parallel ones.
    """

    sum: Tensor
    count: Tensor
    weights: Tensor
    long_nll: Tensor
    short_nll: Tensor | None
    valid: Tensor
    statistics: Tensor | None

    def check_finite(self, *, row_ids: Tensor | None = None, rank: int | None = None) -> None:
        """Raises a ValueError that names the first row and position whose NLL is NaN or infinite. Waits for the
        device."""
        for name, nll_RT in (("long NLL", self.long_nll), ("short NLL", self.short_nll)):
            if nll_RT is not None:
                check_finite(nll_RT, valid=self.valid, row_ids=row_ids, name=name, rank=rank)


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    short_nll: ShortNLL,
    scheme: Scheme,
    *,
    bias: Tensor | None = None,
    layout: RowLayout = WHOLE_ROWS,
    ignore_index: int = IGNORED,
    vocab_size: int | None = None,
    keep_logits_bytes: int = 0,
    chunk_tokens: int | None = None,
    row_ids: Tensor | None = None,
    seed: int = 0,
    document_starts: Tensor | None = None,
    documents: Tensor | None = None,
    report: StepReport | None = None,
) -> WeightedLoss:
    """The weighted cross-entropy of softmax(hidden @ weight.T + bias); the logits never exist as a whole.

    The backward pass works only on tokens whose weight is not 0. On the first dimensions see `RowLayout`.

    Args:
        hidden: [batch, seq, hidden] of the positions that this rank holds; with `sequence_parallel` its part of them.
        weight: [vocab / tp, hidden], this rank's rows of the output embedding.
        labels: [batch, seq] int64, the target of each position that this rank holds: the next token, or `ignore_index`.
        bias: [vocab / tp] of the head; None: it has none.
        vocab_size, keep_logits_bytes, chunk_tokens: see `linear_cross_entropy`.

    The other arguments, the result and errors are those of `weighted_loss`.
    """
    long_nll = partial(
        linear_cross_entropy,
        hidden,
        weight,
        bias=bias,
        tp_group=layout.tp_group,
        sequence_parallel=layout.sequence_parallel,
        batch_first=layout.batch_first,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        keep_logits_bytes=keep_logits_bytes,
        chunk_tokens=chunk_tokens,
    )
    return weighted_loss(
        long_nll,
        short_nll,
        scheme,
        labels=labels,
        layout=layout,
        ignore_index=ignore_index,
        row_ids=row_ids,
        seed=seed,
        document_starts=document_starts,
        documents=documents,
        report=report,
    )


def weighted_loss(
    long_nll: Tensor | Callable[[Tensor], Tensor],
    short_nll: ShortNLL,
    scheme: Scheme,
    *,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    layout: RowLayout = WHOLE_ROWS,
    ignore_index: int = IGNORED,
    row_ids: Tensor | None = None,
    seed: int = 0,
    document_starts: Tensor | None = None,
    documents: Tensor | None = None,
    report: StepReport | None = None,
) -> WeightedLoss:
    """The weighted loss of per-token NLLs, with weights that are made from them.

    A row of S positions has S targets (Megatron's labels), or S - 1 when its last position has none (a row of S tokens
    and no more): what `valid`, `short_nll` and `report` were made for says which; without any of them it has S, of
    which labels may mask the last. Collective over the groups of `layout`; every rank gives the same rows.

    Args:
        long_nll: [batch, seq] ([seq, batch] as `layout` says) fp32 or better, natural log, with full context, on the
            graph, of the positions that this rank holds; or a function that makes it from `labels`.
        short_nll: the scorer's; see `ShortNLL`. Of the model in training as its own scorer, with windows of n tokens:
            `partial(unfrozen_short_nll, short_nll=short_nll, window=n)`.
        scheme: see `WeightingConfig.preset`.
        labels: as `long_nll`; targets that are `ignore_index` are masked.
        valid: [rows, targets] bool of whole rows, the same on all ranks; others are masked. With neither, none is.
        row_ids, seed, document_starts, documents: see `token_weights`; of whole rows.
        report: which statistics to make; None: none.

    Raises:
        ValueError: shapes that do not fit, or a short NLL that is missing.
    """
    if not isinstance(long_nll, Tensor):
        if labels is None:
            raise ValueError("`labels`: expected them with a `long_nll` that is a function, got None")
        long_nll = long_nll(labels)
    if long_nll.dim() != 2:
        raise ValueError(f"`long_nll`: expected two dimensions, batch and seq, got shape {list(long_nll.shape)}")
    if labels is not None and labels.shape != long_nll.shape:
        raise ValueError(f"`labels`: expected the shape of `long_nll` {list(long_nll.shape)}, got {list(labels.shape)}")
    nll_RL = layout.rows_first(long_nll)
    labelled_RL = None if labels is None else layout.rows_first(labels) != ignore_index
    num_rows, num_positions = len(nll_RL), nll_RL.shape[1] * layout.cp_size
    num_targets = _count_targets(num_rows, num_positions, valid, short_nll, report)
    long_RT, valid_RT = _whole_rows(nll_RL.detach(), labelled_RL, num_targets, layout)
    if valid is not None:
        valid_RT = valid.bool() if labelled_RL is None else valid_RT & valid.bool()
    short_RT = short_nll(long_RT) if callable(short_nll) else short_nll
    if documents is not None and document_starts is None:
        document_starts = starts_of(documents, (num_rows, num_targets)).to(long_RT.device)
    weights_RT = token_weights(
        long_RT,
        short_RT,
        scheme,
        valid=valid_RT,
        row_ids=row_ids,
        seed=seed,
        document_starts=document_starts,
        documents=documents,
    )
    weights_RT = layout.same_on_tensor_ranks_(weights_RT)
    weights_RL, valid_RL = (
        layout.slice(torch.nn.functional.pad(x, (0, num_positions - num_targets))) for x in (weights_RT, valid_RT)
    )
    return WeightedLoss(
        # A masked target may hold anything: 0 * NaN must not reach the sum.
        sum=(weights_RL * torch.where(valid_RL, nll_RL, 0.0)).sum(),
        count=valid_RL.sum().int(),
        weights=weights_RT,
        long_nll=long_RT,
        short_nll=short_RT,
        valid=valid_RT,
        statistics=None
        if report is None
        else report.sums(valid_RT, long_RT, short_RT, weights_RT, document_starts, layout.packed),
    )


def _whole_rows(
    nll_RL: Tensor, labelled_RL: Tensor | None, num_targets: int, layout: RowLayout
) -> tuple[Tensor, Tensor]:
    """Long NLL and validity [R, T] of whole rows: one gather of 4 bytes a target.

    Masked targets travel as -inf, which no NLL is: it may be NaN or +inf.
    """
    if labelled_RL is not None:
        nll_RL = torch.where(labelled_RL, nll_RL, -torch.inf)
    nll_RS = layout.gather(nll_RL)
    if labelled_RL is None:
        nll_RT = nll_RS[:, :num_targets]
        return nll_RT, torch.ones_like(nll_RT, dtype=torch.bool)
    valid_RS = nll_RS != -torch.inf
    beyond = valid_RS[:, num_targets:].any()
    message = f"`labels`: expected none at the last position of rows of {num_targets} targets"
    if beyond.is_cuda:
        torch._assert_async(~beyond, message)
    elif beyond:
        raise ValueError(f"{message}, got one")
    return nll_RS.masked_fill(~valid_RS, 0.0)[:, :num_targets], valid_RS[:, :num_targets]


def _count_targets(
    num_rows: int, num_positions: int, valid: Tensor | None, short_nll: ShortNLL, report: StepReport | None
) -> int:
    """T, as whatever was made for whole rows has it.

    Raises:
        ValueError: it fits neither S nor S - 1, or they differ.
    """
    shapes = {name: tuple(x.shape) for name, x in (("valid", valid), ("short_nll", short_nll)) if isinstance(x, Tensor)}
    if report is not None:
        shapes["report"] = num_rows, report.num_targets
    num_targets = next((shape[-1] for shape in shapes.values()), num_positions)
    for name, shape in shapes.items():
        if shape != (num_rows, num_targets) or num_targets not in (num_positions - 1, num_positions):
            raise ValueError(
                f"`{name}`: expected whole rows of {num_rows} x {num_positions - 1} targets, or {num_positions} (the "
                f"same everywhere), got {' x '.join(map(str, shape))}"
            )
    return num_targets
