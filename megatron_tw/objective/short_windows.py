"""Short windows of rows as ordinary sequences of a batch, and their NLLs put back where the targets stand in the rows.

Shape suffixes: R rows, S positions of a row, T targets of a row, W windows of a row, L = R * W sequences (and some that
only fill up), n tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tw.weighting import Window

IGNORED = -100
"""Label of a position that has no target, as in torch.nn.functional.cross_entropy."""


@dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Windows as sequences, row by row. Positions restart at 0 in each.

    ids: [L, n] int64. labels: [L, n], the target of each position, -100 where the window does not score it.
    rows, starts: [L] int64, the row that each window is of, and the position where it begins there.
    shape: [rows, targets] of what the windows were made from.
    """

    ids: Tensor
    labels: Tensor
    rows: Tensor
    starts: Tensor
    shape: tuple[int, int]

    def put_back(self, nll: Tensor, positions: Tensor | None = None) -> Tensor:
        """Short NLL [rows, targets] of the dtype of `nll`, detached; 0 where no window scores the target.

        Args:
            nll: [L, n], as `labels`; or [L, m] of m of the positions.
            positions: [m] int64, which those are; None: all.

        Raises:
            ValueError: another shape.
        """
        labels_Lm = self.labels if positions is None else self.labels[:, positions]
        if nll.shape != labels_Lm.shape:
            raise ValueError(f"`nll`: expected {list(labels_Lm.shape)}, as the labels, got {list(nll.shape)}")
        positions = torch.arange(nll.shape[1], device=nll.device) if positions is None else positions
        scored_Lm = labels_Lm != IGNORED
        column_Lm = self.starts[:, None] + positions  # the position that predicts target t is t - 1, as is its column
        short_RT = nll.new_zeros(self.shape)
        row_Lm = self.rows[:, None].expand_as(column_Lm)
        short_RT[row_Lm[scored_Lm], column_Lm[scored_Lm]] = nll.detach()[scored_Lm]
        return short_RT


def lay_out_windows(
    rows: Tensor,
    windows: Sequence[Window],
    *,
    labels: Tensor | None = None,
    bos_id: int | None = None,
    length: int | None = None,
    multiple: int = 1,
) -> WindowBatch:
    """The windows of all rows as one batch; split it as memory demands.

    Args:
        rows: [rows, S] int64 token ids.
        windows: of a row (see `plan_windows`), or those that are this rank's.
        labels: [rows, S], the target of each position, or -100. Then a row has S targets, and `windows` were planned
            for S + 1 tokens. None: the next token of the row, so that it has S - 1.
        bos_id: replaces a window's first token where the row begins with it. None: never.
        length: n; sequences are filled up with token 0, which nothing before it sees. None: the longest window's.
        multiple: as many sequences as a multiple of it, and at least one: filled up with ones that score nothing.

    >>> from megatron_tw.weighting import plan_windows
    >>> batch = lay_out_windows(torch.arange(10, 20)[None], plan_windows(10, 6, 4, include_first=False))
    >>> batch.ids.tolist(), batch.labels.tolist()
    ([[14, 15, 16, 17, 18, 19]], [[-100, 16, 17, 18, 19, -100]])
    >>> batch.put_back(torch.ones(1, 6)).tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]

    Raises:
        ValueError: shapes that do not fit each other, or windows of longer rows.
    """
    if rows.dim() != 2:
        raise ValueError(f"`rows`: expected [rows, positions], got shape {list(rows.shape)}")
    if labels is not None and labels.shape != rows.shape:
        raise ValueError(f"`labels`: expected the shape of `rows` {list(rows.shape)}, got {list(labels.shape)}")
    (num_rows, num_positions), device = rows.shape, rows.device
    num_targets = num_positions - (labels is None)
    last_target = max((window.last_target for window in windows), default=0)
    if last_target > num_targets:
        raise ValueError(f"`windows`: expected those of rows of {num_targets} targets, got one that scores target "
                         f"{last_target}")  # fmt: skip
    longest = max((window.length for window in windows), default=1)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"`length`: expected at least {longest}, the tokens of a window, got {length}")
    labels_RS = rows[:, 1:] if labels is None else labels

    plan_4W = torch.tensor(windows, dtype=torch.int64, device=device).reshape(len(windows), 4).T
    start_W1, length_W1, first_W1, last_W1 = (numbers_W[:, None] for numbers_W in plan_4W)
    offset_n = torch.arange(length, device=device)
    position_Wn = start_W1 + offset_n
    inside_Wn = (offset_n < length_W1) & (position_Wn < num_positions)
    scored_Wn = (position_Wn >= first_W1 - 1) & (position_Wn < last_W1)
    ids_RWn = torch.where(inside_Wn, rows[:, position_Wn.clamp(max=num_positions - 1)], 0)
    labels_RWn = torch.where(scored_Wn, labels_RS[:, position_Wn.clamp(max=num_targets - 1)], IGNORED)
    if bos_id is not None:
        ids_RWn[:, :, 0] = torch.where(rows[:, :1] == bos_id, bos_id, ids_RWn[:, :, 0])
    num_sequences = num_rows * len(windows)
    fill = -num_sequences % multiple or (multiple if num_sequences == 0 else 0)
    pad = torch.nn.functional.pad
    return WindowBatch(
        ids=pad(ids_RWn.flatten(0, 1), (0, 0, 0, fill)),
        labels=pad(labels_RWn.flatten(0, 1), (0, 0, 0, fill), value=IGNORED),
        rows=pad(torch.arange(num_rows, device=device).repeat_interleave(len(windows)), (0, fill)),
        starts=pad(start_W1[:, 0].repeat(num_rows), (0, fill)),
        shape=(num_rows, num_targets),
    )
