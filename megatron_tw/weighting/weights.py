"""From NLLs to weights: pure functions on whole rows. Target j of a row predicts the token at position j + 1.

Shape suffixes: R rows, T targets of a row (a row of N tokens has N - 1).
"""

import torch
from torch import Tensor

from megatron_tw.weighting.documents import document_starts as starts_of
from megatron_tw.weighting.documents import weights_by_document
from megatron_tw.weighting.schemes import Scheme, Targets


@torch.no_grad()
def token_weights(
    long_nll: Tensor,
    short_nll: Tensor | None,
    scheme: Scheme,
    *,
    valid: Tensor | None = None,
    row_ids: Tensor | None = None,
    seed: int = 0,
    document_starts: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Weights of all targets of whole rows, as `scheme` says. A row's weights depend on that row alone; of packed rows,
    a document's on that document alone (EXACT: on the lengths in its row, as published).

    Masked targets get 0 and do not count in a row's length, normalization, top kappa or buckets; a row without a valid
    target gets zeros. Under `l1` a row of zero scores gets uniform weights. Scores are worked on in fp64.

    Args:
        long_nll: [rows, targets] NLL (natural log) of the model in training; no gradient is followed.
        short_nll: the scorer's, same shape; None for schemes that need no scorer.
        valid: [rows, targets] bool or 0/1; None: all are.
        row_ids: [rows] int64, a name of each row that does not depend on the layout, to break ties; None: 0, 1, ...
        seed: of the tie-break.
        document_starts: [rows, targets] int64, the position in the row where the document of each target's token begins
            (exact only); None: every row is one document.
        documents: of packed rows; see documents.py. It says what `document_starts` says, and more.

    Returns:
        [rows, targets] fp32, detached.

    Raises:
        ValueError: shapes differ, `short_nll` is missing, or `scheme` is none.
    """
    if not isinstance(scheme, Scheme):
        raise ValueError(f"`scheme`: expected a scheme, such as WeightingConfig.preset('dense'), got {scheme!r}")
    _check_shapes(long_nll, short_nll=short_nll, valid=valid, document_starts=document_starts)
    if row_ids is not None and row_ids.shape != long_nll.shape[:1]:
        raise ValueError(f"`row_ids`: expected one for each of {len(long_nll)} rows, got shape {list(row_ids.shape)}")
    valid_RT = torch.ones_like(long_nll, dtype=torch.bool) if valid is None else valid.bool()
    if scheme.needs_scorer and short_nll is None:
        raise ValueError(
            "`short_nll`: expected the scorer's NLLs, which this scheme compares with `long_nll`, got None"
        )
    row_ids = torch.arange(len(long_nll)) if row_ids is None else row_ids
    if documents is not None and document_starts is None:
        document_starts = starts_of(documents, (len(long_nll), long_nll.shape[1])).to(long_nll.device)
    targets = Targets(
        # Whatever stands at masked targets, NaN included, must not reach a sum.
        long_RT=torch.where(valid_RT, long_nll.double(), 0.0),
        short_RT=None if short_nll is None else torch.where(valid_RT, short_nll.double(), 0.0),
        valid_RT=valid_RT,
        row_ids_R=row_ids.to(device=long_nll.device, dtype=torch.int64),
        seed=seed,
        document_starts_RT=document_starts,
    )
    if documents is not None and scheme.by_document:
        weights_RT = weights_by_document(scheme.weights, targets, documents)
    else:
        weights_RT = scheme.weights(targets)
    if weights_RT.shape != valid_RT.shape:
        raise ValueError(
            f"{type(scheme).__name__}.weights: expected one weight for each target, {list(valid_RT.shape)}, got "
            f"{list(weights_RT.shape)}"
        )
    return torch.where(valid_RT, weights_RT, 0.0).float()


def unfrozen_short_nll(
    long_nll: Tensor, short_nll: Tensor, window: int, document_starts: Tensor | None = None
) -> Tensor:
    """Short NLL of an unfrozen scorer, detached: targets 1 .. n take the long NLL (score 0), later ones `short_nll`.

    All are [rows, targets]. Up to target n - 1 the short window is the whole context; the method counts n in, though
    window 1 reaches it. document_starts: see `token_weights`; targets are counted from there.
    """
    position_T = torch.arange(1, long_nll.shape[1] + 1, device=long_nll.device)
    in_window = (position_T if document_starts is None else position_T - document_starts) <= window
    return torch.where(in_window, long_nll.detach(), short_nll.detach())


def check_finite(
    nll: Tensor,
    *,
    valid: Tensor | None = None,
    row_ids: Tensor | None = None,
    name: str = "NLL",
    rank: int | None = None,
) -> None:
    """Raises a ValueError that names the first row, position and `rank` where `nll` [rows, targets] is NaN or infinite.

    Masked targets are not looked at. Waits for the device once.
    """
    bad_RT = ~torch.isfinite(nll.detach())
    if valid is not None:
        bad_RT &= valid.bool()
    num_bad = int(bad_RT.sum())
    if num_bad == 0:
        return
    row, target = (int(index) for index in bad_RT.nonzero()[0])
    row_id = row if row_ids is None else int(row_ids[row])
    where = f"row {row_id}, position {target + 1}" + ("" if rank is None else f", rank {rank}")
    raise ValueError(
        f"{name}: expected finite values, got {nll[row, target].item()} at {where} ({num_bad} such targets here)"
    )


def _check_shapes(long_nll: Tensor, **others: Tensor | None) -> None:
    if long_nll.dim() != 2:
        raise ValueError(f"`long_nll`: expected [rows, targets], got shape {list(long_nll.shape)}")
    for name, other in others.items():
        if other is not None and other.shape != long_nll.shape:
            shapes = f"{list(long_nll.shape)}, got {list(other.shape)}"
            raise ValueError(f"`{name}`: expected the shape of `long_nll` {shapes}")
