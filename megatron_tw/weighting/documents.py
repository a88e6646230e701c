"""Packed rows: several documents in a row, each with its own targets.

Documents are int64 [documents, 3] on the CPU: the row, the position in it where the document begins, and its tokens
without padding (0: padding alone, which has no targets). Target j of a row predicts the token at position j + 1, so a
document of k tokens that begins at position p has the targets p .. p + k - 2.

Shape suffixes: R rows, T targets of a row, D documents, W targets of the longest document of some.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tw.weighting.schemes import Targets


def document_starts(documents: Tensor, shape: tuple[int, int]) -> Tensor:
    """[R, T] int64 on the CPU: the position in the row where the document of each target's token begins.

    >>> document_starts(torch.tensor([[0, 0, 3], [0, 4, 2]]), (1, 6)).tolist()
    [[0, 0, 0, 4, 4, 4]]
    """
    rows, targets = shape
    starts = torch.zeros(rows, targets + 1, dtype=torch.int64)
    starts[documents[:, 0], documents[:, 1]] = documents[:, 1]
    return starts.cummax(dim=1).values[:, 1:]


def weights_by_document(weights: Callable[[Targets], Tensor], targets: Targets, documents: Tensor) -> Tensor:
    """What `weights` makes of rows, made of documents as if each were a row. [R, T]; 0 at targets of none.

    Documents go together with those of up to twice their length, so that little is filled up. A document's name is
    that of its row, times the tokens of a row, plus where it begins: no layout changes it.
    """
    flat = targets.long_RT.new_zeros(targets.valid_RT.numel() + 1)  # the last takes what fills up
    num_targets = targets.valid_RT.shape[1]
    for documents_D3, place_DW, inside_DW in _of_like_length(documents, num_targets):
        place_DW, inside_DW = (x.to(flat.device) for x in (place_DW, inside_DW))
        rows_D, starts_D = (column_D.to(flat.device) for column_D in (documents_D3[:, 0], documents_D3[:, 1]))
        valid_DW = targets.valid_RT.flatten()[place_DW] & inside_DW
        part = replace(
            targets,
            long_RT=torch.where(valid_DW, targets.long_RT.flatten()[place_DW], 0.0),
            short_RT=None
            if targets.short_RT is None
            else torch.where(valid_DW, targets.short_RT.flatten()[place_DW], 0.0),
            valid_RT=valid_DW,
            row_ids_R=targets.row_ids_R[rows_D] * (num_targets + 1) + starts_D,
            document_starts_RT=None,
        )
        weights_DW = torch.where(valid_DW, weights(part), 0.0).to(flat.dtype)
        flat[torch.where(inside_DW, place_DW, len(flat) - 1)] = weights_DW
    return flat[:-1].view_as(targets.long_RT)


def _of_like_length(documents: Tensor, num_targets: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Documents whose numbers of targets have the same power of two above them: themselves [D, 3], where their targets
    stand among those of all rows [D, W], and which of these are theirs."""
    documents = documents[documents[:, 2] > 1]
    counts_D = documents[:, 2] - 1
    sizes_D = torch.frexp((counts_D - 1).clamp(min=0).double()).exponent  # W is 2^size, or less
    for size in sizes_D.unique().tolist():
        some_D3, count_D = documents[sizes_D == size], counts_D[sizes_D == size]
        offset_W = torch.arange(int(count_D.max()))
        inside_DW = offset_W < count_D[:, None]
        first_D = some_D3[:, 0] * num_targets + some_D3[:, 1]
        yield some_D3, torch.where(inside_DW, first_D[:, None] + offset_W, first_D[:, None]), inside_DW
