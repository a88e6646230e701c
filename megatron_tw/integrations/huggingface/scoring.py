"""Short NLL of all rows of a step, before its first forward pass. R rows, T targets, L windows, n tokens of one."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megatron_tw.integrations.huggingface.batches import Rows
from megatron_tw.integrations.huggingface.config import TokenWeightingConfig
from megatron_tw.objective.short_windows import IGNORED, WindowBatch, lay_out_windows
from megatron_tw.weighting import Window, plan_windows

NLL = Callable[[Tensor, Tensor], Tensor]
"""(ids [L, n], labels [L, n]) -> NLL [L, n], without gradient."""
_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""With it transformers (some versions 5) loads weights on one process of a machine, from which FSDP gives them to the
others."""


@dataclass(frozen=True, kw_only=True)
class ShortWindowScorer:
    """Runs a model on the short windows of rows.

    nll: of the scorer. include_first: run window 0 too (a frozen scorer); else targets in it take their long NLL.
    most: the largest of some numbers over the ranks that must call the model equally often; None: they need not.
    """

    config: TokenWeightingConfig
    nll: NLL
    bos_id: int | None
    include_first: bool
    most: Callable[[int], int] | None = None

    def short_nll(self, micro_batches: Sequence[Rows]) -> list[Tensor]:
        """[R, T] of each micro-batch; 0 where a target is masked, or in window 0 of a model that scores itself.

        Collective over the ranks of `most`.
        """
        laid_out = [_with_targets(self._lay_out(rows)) for rows in micro_batches]
        ids_Ln = torch.cat([windows.ids for windows in laid_out])
        labels_Ln = torch.cat([windows.labels for windows in laid_out])
        size = self.config.scoring_micro_batch or max(1, micro_batches[0].ids_RS.numel() // ids_Ln.shape[1])
        nll_Ln = torch.cat([*self._chunks(ids_Ln, labels_Ln, size), torch.zeros(0, ids_Ln.shape[1]).to(ids_Ln.device)])
        counts = [len(windows.ids) for windows in laid_out]
        return [windows.put_back(nll)[:, :-1] for windows, nll in zip(laid_out, nll_Ln.split(counts), strict=True)]

    def _chunks(self, ids_Ln: Tensor, labels_Ln: Tensor, size: int) -> Iterator[Tensor]:
        """NLLs of `size` windows at a time. Ranks that have fewer chunks run one window more, for nothing."""
        num_chunks = -(-len(ids_Ln) // size)
        num_calls = num_chunks if self.most is None else self.most(num_chunks)  # asked before any rank calls the model
        for start in range(0, len(ids_Ln), size):
            yield self.nll(ids_Ln[start : start + size], labels_Ln[start : start + size])
        idle = torch.zeros(1, ids_Ln.shape[1], dtype=torch.int64, device=ids_Ln.device)
        for _ in range(num_chunks, num_calls):
            self.nll(idle, torch.full_like(idle, IGNORED))

    def _lay_out(self, rows: Rows) -> WindowBatch:
        """The windows of rows that may differ in length; every sequence has n tokens."""
        window = self.config.short_window
        assert window is not None
        if len(set(rows.lengths)) == 1:
            return self._of_length(rows.ids_RS, rows.labels_RS, rows.lengths[0], window)
        single = [
            self._of_length(rows.ids_RS[row : row + 1], rows.labels_RS[row : row + 1], length, window)
            for row, length in enumerate(rows.lengths)
        ]
        return WindowBatch(
            ids=torch.cat([batch.ids for batch in single]),
            labels=torch.cat([batch.labels for batch in single]),
            rows=torch.cat([batch.rows + row for row, batch in enumerate(single)]),
            starts=torch.cat([batch.starts for batch in single]),
            shape=(len(rows.lengths), rows.labels_RS.shape[1]),
        )

    def _of_length(self, ids_RS: Tensor, labels_RS: Tensor, length: int, window: int) -> WindowBatch:
        """The windows of rows that have `length` tokens and then padding."""
        if length > window:
            decided = self.config.windows_of(length)
            plan = plan_windows(length, window, decided.stride, include_first=self.include_first)
        elif self.include_first and length > 1:
            plan = (Window(0, length, 1, length - 1),)  # the row is one window
        else:
            plan = ()
        return lay_out_windows(ids_RS, plan, labels=labels_RS, bos_id=self.bos_id, length=window)


def _with_targets(batch: WindowBatch) -> WindowBatch:
    """Without the sequences that score nothing: windows whose targets are all masked, and what only fills up."""
    keep_L = (batch.labels != IGNORED).any(1)
    ids, labels, rows, starts = (x[keep_L] for x in (batch.ids, batch.labels, batch.rows, batch.starts))
    return replace(batch, ids=ids, labels=labels, rows=rows, starts=starts)


def load_scorer(config: TokenWeightingConfig, trained: nn.Module) -> nn.Module:
    """The frozen scorer, whole on every process. trained: the model in training.

    Raises:
        ValueError: it is the model in training, has no weights, or windows are longer than what it was trained on.
    """
    scorer: Any = config.scorer_hf
    if scorer is trained:
        raise ValueError("scorer_hf: expected another model than the one in training (or scorer='unfrozen'), got that")
    if isinstance(scorer, str):
        with _all_weights_loaded():
            scorer = transformers.AutoModelForCausalLM.from_pretrained(scorer, dtype="auto")
    if any(parameter.is_meta for parameter in scorer.parameters()):
        raise ValueError("scorer_hf: expected a model with its weights, got one on the device meta")
    known = getattr(scorer.config.get_text_config(), "max_position_embeddings", None)
    if known is not None and config.short_window is not None and config.short_window > known:
        raise ValueError(
            f"short_window: expected at most {known}, the context of the scorer in scorer_hf, got {config.short_window}"
        )
    model: nn.Module = scorer
    return model


@contextmanager
def _all_weights_loaded() -> Iterator[None]:
    """Within the block transformers loads weights on every process, because nobody gives a scorer's to the others."""
    before = os.environ.get(_EFFICIENT)
    os.environ[_EFFICIENT] = "false"
    try:
        yield
    finally:
        del os.environ[_EFFICIENT]
        if before is not None:
            os.environ[_EFFICIENT] = before
