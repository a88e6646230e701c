"""What a micro-batch of a Trainer holds: whole rows, right-padded or all of one length.

Shape suffixes: R rows, S positions of the padded batch, T = S - 1 targets. Target j is the token at position j + 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tw.integrations.huggingface.config import COLUMN
from megatron_tw.objective.short_windows import IGNORED
from megatron_tw.weighting.ties import GOLDEN_GAMMA, splitmix64

_PACKED = ("shift_labels", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""What collators without padding add: one row of the batch then holds several sequences."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a micro-batch.

    ids_RS: int64 token ids. labels_RS: int64, the target of each position (so shifted), -100 where there is none.
    lengths: the tokens of each row that are no padding. document_starts_RT: see `token_weights`; None where every row
    is one document. short_nll_RT: the dataset's own, None without such a column.
    """

    ids_RS: Tensor
    labels_RS: Tensor
    lengths: list[int]
    document_starts_RT: Tensor | None
    short_nll_RT: Tensor | None

    @property
    def num_valid(self) -> Tensor:
        """Targets that count: an int64 scalar."""
        return (self.labels_RS != IGNORED).sum()

    @property
    def row_ids(self) -> Tensor:
        """[rows] int64, names that no layout, batch size or order changes: a hash of a row's tokens."""
        positions_S = torch.arange(1, self.ids_RS.shape[1] + 1, device=self.ids_RS.device)
        signed_gamma = GOLDEN_GAMMA - 2**64
        hashes_RS = splitmix64(splitmix64(positions_S * signed_gamma) ^ self.ids_RS)
        lengths_R = torch.tensor(self.lengths, device=self.ids_RS.device)
        return torch.where(positions_S <= lengths_R[:, None], hashes_RS, 0).sum(1)

    def check_padding(self) -> None:
        """Raises a ValueError where padding is a target: it is in no short window."""
        lengths_R = torch.tensor(self.lengths, device=self.ids_RS.device)
        padding_RS = torch.arange(1, self.ids_RS.shape[1] + 1, device=self.ids_RS.device) >= lengths_R[:, None]
        if ((self.labels_RS != IGNORED) & padding_RS).any():
            raise ValueError(
                f"labels: expected {IGNORED} at padding (where attention_mask is 0), got a target there, which short "
                "windows do not reach"
            )

    @staticmethod
    def of_batch(batch: Mapping[str, Any], device: torch.device) -> "Rows":
        """Read a micro-batch, and take the column `short_nll` out of it, which no model knows.

        Raises:
            ValueError: a batch that is not rows of token ids with labels; names what is wrong with it.
        """
        short_nll = batch.pop(COLUMN, None)  # type: ignore[attr-defined]
        for name in ("input_ids", "labels"):
            if not isinstance(batch.get(name), Tensor) or batch[name].dim() != 2:
                raise ValueError(
                    f"{name}: expected [rows, tokens] in every batch, got {_describe(batch.get(name))}; transformers' "
                    "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes them"
                )
        ids_RS = batch["input_ids"].to(device)
        labels_RS = batch["labels"].to(device)
        if labels_RS.shape != ids_RS.shape:
            raise ValueError(
                f"labels: expected the shape of input_ids {list(ids_RS.shape)}, got {list(labels_RS.shape)}"
            )
        if packed := [name for name in _PACKED if name in batch]:
            raise ValueError(f"{packed[0]}: expected rows that hold one sequence each, got a batch without padding")
        lengths_R = _lengths(batch.get("attention_mask"), ids_RS)
        return Rows(
            ids_RS=ids_RS,
            labels_RS=torch.nn.functional.pad(labels_RS[:, 1:], (0, 1), value=IGNORED),
            lengths=lengths_R.tolist(),
            document_starts_RT=_document_starts(batch.get("position_ids"), ids_RS, lengths_R),
            short_nll_RT=None if short_nll is None else _short_nll(short_nll, ids_RS),
        )


def _lengths(mask: Any, ids_RS: Tensor) -> Tensor:
    """Tokens of each row [R] without its padding, which must be on the right."""
    num_rows, num_positions = ids_RS.shape
    if mask is None:
        return torch.full((num_rows,), num_positions, device=ids_RS.device)
    if not isinstance(mask, Tensor) or mask.shape != ids_RS.shape:
        raise ValueError(f"attention_mask: expected {list(ids_RS.shape)}, as input_ids, got {_describe(mask)}")
    mask_RS = mask.to(ids_RS.device).bool()
    lengths_R = mask_RS.sum(1)
    if not (mask_RS == (torch.arange(num_positions, device=ids_RS.device) < lengths_R[:, None])).all():
        raise ValueError(
            "attention_mask: expected ones and then zeros in every row (padding on the right: padding_side='right' of "
            "the tokenizer), got zeros in front of a token"
        )
    return lengths_R


def _document_starts(position_ids: Any, ids_RS: Tensor, lengths_R: Tensor) -> Tensor | None:
    """Where the document of each target begins [R, T], from positions that restart there; None where none does."""
    if position_ids is None:
        return None
    positions_S = torch.arange(ids_RS.shape[1], device=ids_RS.device)
    starts_RS = positions_S - position_ids.to(ids_RS.device).expand_as(ids_RS)
    starts_RS = torch.where(positions_S < lengths_R[:, None], starts_RS, 0)
    return starts_RS[:, 1:] if starts_RS.any() else None


def _short_nll(short_nll: Any, ids_RS: Tensor) -> Tensor:
    if not isinstance(short_nll, Tensor) or short_nll.shape != ids_RS.shape:
        raise ValueError(
            f"{COLUMN}: expected {list(ids_RS.shape)}, one number for each token (that of the first is not read), got "
            f"{_describe(short_nll)}"
        )
    return short_nll.to(ids_RS.device, torch.float32)[:, 1:]


def _describe(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
