"""FLOPs of a model and of an optimizer step, by formula. A multiply-add is two; what is not a matrix product is not
counted.

N = tokens of a row, H = hidden size, V = vocabulary, of all heads together Q = heads x head size. Forward:

    layers      2 x tokens x numbers of all weight matrices of the layers
    attention   of a sequence of N tokens and a layer, 2 N^2 Q: scores and values, of which a causal mask leaves half
    head        2 x tokens x H x V

Backward is twice that (Megatron-LM, arXiv 2104.04473, appendix), which makes `model_flops`. What a step really does is
`step_work`: attention's backward makes the scores again (five products for two), the loss makes logits again and
leaves targets out that weigh nothing, layers are run again to save memory, and windows are scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
from torch import Tensor

from megatron_tw.config import ActivationConfig, ComputeConfig, ParallelConfig, TrainConfig, virtual_pipeline_size
from megatron_tw.model.architecture import Architecture, megatron_vocab_size
from megatron_tw.model.families.table import layer_shapes
from megatron_tw.model.forward import deal_windows, num_window_groups, padded_window
from megatron_tw.model.packed_windows import PackedWindowForward, lay_out_bins
from megatron_tw.weighting import Window

ATTENTION_BACKWARD = 2.5
"""Of the forward pass: flash attention makes the scores again and four gradients of two products."""


@dataclass(frozen=True)
class Work:
    """FLOPs by kind: of matrix products with weights, and of attention."""

    gemm: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.gemm + other.gemm, self.attention + other.attention)

    def __mul__(self, times: float) -> "Work":
        return Work(self.gemm * times, self.attention * times)

    @property
    def total(self) -> float:
        return self.gemm + self.attention


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """FLOPs of one optimizer step on all ranks, by phase."""

    scoring: Work
    forward: Work
    backward: Work

    @property
    def total(self) -> float:
        return self.scoring.total + self.forward.total + self.backward.total


def layers_work(architecture: Architecture, sequences: float, length: int, attended: float | None = None) -> Work:
    """All layers forward, over sequences of `length` tokens.

    attended: sum of the squares of the documents' lengths; None: each sequence is one document.
    """
    attended = sequences * float(length) ** 2 if attended is None else attended
    matrices = [shape for shape in layer_shapes(architecture) if len(shape) == 2]
    numbers = architecture.num_layers * sum(rows * columns for rows, columns in matrices)
    queries = architecture.num_attention_heads * architecture.head_dim
    return Work(
        gemm=2 * sequences * length * numbers,
        attention=2 * attended * queries * architecture.num_layers,
    )


def head_work(architecture: Architecture, tokens: float) -> Work:
    """The output projection forward."""
    return Work(gemm=2 * tokens * architecture.hidden_size * architecture.vocab_size)


def model_flops(architecture: Architecture, rows: float, seq_length: int, attended: float | None = None) -> float:
    """Forward and backward of whole rows with all their logits: no scoring, nothing done twice or left out. attended:
    see `layers_work`."""
    forward = layers_work(architecture, rows, seq_length, attended) + head_work(architecture, rows * seq_length)
    return 3 * forward.total


def step_work(
    architecture: Architecture,
    *,
    seq_length: int,
    rows: int,
    train: TrainConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    activations: ActivationConfig,
    keep_logits_mib: int,
    loss_rows: float | None = None,
    labelled_rows: float | None = None,
    attended: float | None = None,
    scoring: Work | None = None,
) -> StepWork:
    """What one step does with `rows` rows, on all ranks.

    loss_rows, labelled_rows: tokens that the loss's backward and forward pass work on (see StepReport.metrics); None
    for every target. attended: see `layers_work`. scoring:
    of this step's rows, see `scoring_work`. keep_logits_mib: resolved; which of the logits kept are of targets with no
    weight is not known, so the share that is kept is taken of all alike.
    """
    layers = layers_work(architecture, rows, seq_length, attended)
    shards = parallel.loss_shards
    labelled = labelled_rows
    if labelled is None:
        row = Window(0, seq_length, 1, seq_length - 1)
        labelled_RG = _labelled(row, seq_length, parallel.context_parallel_size, shards)
        labelled = rows * shards * int(labelled_RG.max(1).sum())
    loss_rows = labelled if loss_rows is None else loss_rows
    backward = Work(2 * layers.gemm, ATTENTION_BACKWARD * layers.attention)
    backward += _run_again(architecture, layers, parallel, activations)
    kept = _share_kept(architecture, seq_length, train.micro_batch_size, parallel, compute, keep_logits_mib)
    return StepWork(
        scoring=scoring or Work(),
        forward=layers + head_work(architecture, labelled),
        backward=backward + head_work(architecture, loss_rows) * (3 - kept),
    )


def scoring_work(
    architecture: Architecture,
    windows: Sequence[Window],
    *,
    rows: int,
    copies: int,
    parallel: ParallelConfig,
    scoring_micro_batch: int | None,
    multiple: int = 1,
) -> Work:
    """The short-window forward of a step's `rows` rows, shared by `copies` replicas; see `ShortWindowForward`.

    multiple: of which the micro-batches of a rank are (the stages of an interleaved pipeline, else 1).
    """
    if not windows:
        return Work()
    groups = num_window_groups(len(windows), parallel.context_parallel_size)
    share = parallel.context_parallel_size // groups
    shards = parallel.loss_shards
    length = padded_window(windows[0].length, share, shards)
    sequences, head_rows = 0, 0
    for index in range(groups):
        mine = deal_windows(windows, index, groups)
        micro_batch = scoring_micro_batch or max(1, len(mine))
        labelled_LRG = np.stack([_labelled(window, length, share, shards) for window in mine])
        labelled_LRG = np.tile(labelled_LRG, (rows // copies, 1, 1))
        sequences += -(-len(labelled_LRG) // (micro_batch * multiple)) * micro_batch * multiple
        for start in range(0, len(labelled_LRG), micro_batch):
            head_rows += shards * int(labelled_LRG[start : start + micro_batch].sum(0).max(1).sum())
    return (layers_work(architecture, sequences, length) + head_work(architecture, head_rows)) * copies


def packed_scoring_work(architecture: Architecture, windows: PackedWindowForward, documents_D3: Tensor) -> Work:
    """The short-window forward of the packed rows of one replica; see `PackedWindowForward`."""
    bins, ranks, work = windows.bins(documents_D3), windows.layout.cp_size, Work()
    for rank in range(ranks):
        mine = bins[rank::ranks]
        num_bins = windows.batches_of(len(mine)) * windows.bins_at_once
        laid_out = lay_out_bins(mine, windows.bin_length, num_bins)
        attended = float(sum(length**2 for length in laid_out.lengths(0, num_bins * windows.bin_length)))
        batches_BGS = laid_out.scored.reshape(num_bins // windows.bins_at_once, windows.loss_shards, -1)
        head_rows = windows.loss_shards * int(batches_BGS.sum(2).max(1).sum())
        work += layers_work(architecture, num_bins, windows.bin_length, attended)
        work += head_work(architecture, head_rows)
    return work


@lru_cache(maxsize=1024)
def _labelled(window: Window, length: int, share: int, shards: int) -> np.ndarray:
    """Targets of a window (padded to `length` tokens) on each of the ranks that share it, in each of their shards:
    [R, G]."""
    position_S = np.arange(length) + window.start + 1  # of the predicted token
    labelled_S = (position_S >= window.first_target) & (position_S <= window.last_target)
    if share == 1:
        return labelled_S.reshape(1, shards, -1).sum(2)
    chunks_QC = labelled_S.reshape(2 * share, -1)  # rank r has chunks r and 2R - 1 - r: objective/zigzag.py
    ranks_RS = np.concatenate((chunks_QC[:share], chunks_QC[::-1][:share]), axis=1)
    return ranks_RS.reshape(share, shards, -1).sum(2)


def _run_again(
    architecture: Architecture, layers: Work, parallel: ParallelConfig, activations: ActivationConfig
) -> Work:
    """Of the layers' forward pass, what the backward pass does once more."""
    if activations.recompute_granularity != "full":
        modules = activations.modules_run_again
        return Work(
            gemm=layers.gemm * _share_of_mlp(architecture) if "mlp" in modules else 0.0,
            attention=layers.attention if "core_attn" in modules else 0.0,
        )
    if activations.recompute_method == "uniform":
        return layers
    assert activations.recompute_num_layers is not None
    chunks = parallel.pipeline_model_parallel_size * (virtual_pipeline_size(parallel, architecture.num_layers) or 1)
    return layers * min(1.0, activations.recompute_num_layers * chunks / architecture.num_layers)


def _share_of_mlp(architecture: Architecture) -> float:
    """Of the products with a layer's weights."""
    mlp, both = (
        sum(prod(shape) for shape in layer_shapes(architecture, part) if len(shape) == 2) for part in (".mlp.", "")
    )
    return mlp / both


def _share_kept(
    architecture: Architecture,
    seq_length: int,
    micro_batch_size: int,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    keep_logits_mib: int,
) -> float:
    """Of a rank's tokens, the share whose logits the loss keeps (`keep_logits_bytes` of linear_cross_entropy)."""
    shards, bytes_of_a_number = parallel.loss_shards, 2 if compute.bf16 else 4
    entries = megatron_vocab_size(architecture, parallel, compute) // parallel.tensor_model_parallel_size
    kept = (keep_logits_mib << 20) // (shards * entries * bytes_of_a_number)
    return min(1.0, kept / (micro_batch_size * seq_length // parallel.context_parallel_size // shards))
