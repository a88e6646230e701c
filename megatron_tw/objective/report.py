"""What a step reports of its losses and weights: sums over targets and rows, added up over micro-batches and
data-parallel ranks before any division. M = rows of a micro-batch, T = targets of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tw.objective.packed import PackedSequence
from megatron_tw.objective.positions import position_edges
from megatron_tw.objective.zigzag import zigzag_positions

_SUMS = (
    "weighted_nll",
    "nll",
    "targets",
    "weights",
    "weights_beyond",
    "zero_weights",
    "weight_std",
    "weight_entropy",
    "effective_targets",
    "rows",
    "nonfinite",
    "loss_rows",
    "labelled_rows",
    "attended",
)
_POSITION_SUMS = ("targets", "nll", "weights", "short_nll")
"""Of each bucket of positions."""


@dataclass(frozen=True)
class StepReport:
    """The report of the steps of one run.

    edges: bucket i holds the targets at positions edges[i] .. edges[i + 1] - 1 (see `position_edges`).
    old_context: n, tokens; targets at position n and later lie beyond it. cp_size, loss_shards: ranks that share a row
    in zigzag slices, and parts into which sequence parallelism cuts each slice before the loss.
    """

    edges: tuple[int, ...]
    old_context: int
    cp_size: int = 1
    loss_shards: int = 1

    @staticmethod
    def of_rows(seq_length: int, old_context: int, *, cp_size: int = 1, loss_shards: int = 1) -> "StepReport":
        """For rows of `seq_length` tokens by a model that knew rows of `old_context` tokens."""
        return StepReport(position_edges(seq_length, old_context=old_context), old_context, cp_size, loss_shards)

    @property
    def num_targets(self) -> int:
        """Of a row."""
        return self.edges[-1] - 1

    @property
    def size(self) -> int:
        """Numbers that a micro-batch reports."""
        return len(_SUMS) + len(_POSITION_SUMS) * (len(self.edges) - 1)

    def sums(
        self,
        valid_MT: Tensor,
        long_MT: Tensor,
        short_MT: Tensor | None,
        weights_MT: Tensor,
        starts_MT: Tensor | None = None,
        packed: PackedSequence | None = None,
    ) -> Tensor:
        """The numbers [size] fp64 of a micro-batch's whole rows, without waiting for the device.

        starts_MT: see `token_weights`; positions count from there. packed: how ranks share a row of several documents.
        """
        finite_MT = long_MT.isfinite() if short_MT is None else long_MT.isfinite() & short_MT.isfinite()
        long_MT, weights_MT = torch.where(valid_MT, long_MT, 0.0).double(), weights_MT.double()
        short_MT = torch.zeros_like(long_MT) if short_MT is None else torch.where(valid_MT, short_MT, 0.0).double()
        count_M, total_M = valid_MT.sum(1), weights_MT.sum(1)
        mean_M1 = (total_M / count_M.clamp(min=1))[:, None]
        variance_M = torch.where(valid_MT, (weights_MT - mean_M1) ** 2, 0.0).sum(1) / (count_M - 1).clamp(min=1)
        shares_MT = weights_MT / torch.where(total_M == 0, 1.0, total_M)[:, None]
        squares_M = (shares_MT**2).sum(1)
        lengths = [valid_MT.shape[1] + 1] * len(valid_MT) if packed is None else packed.lengths
        if starts_MT is None:
            beyond = weights_MT[:, self.old_context - 1 :].sum()  # column j is position j + 1
        else:
            position_MT = torch.arange(1, valid_MT.shape[1] + 1, device=valid_MT.device) - starts_MT
            beyond = torch.where(position_MT >= self.old_context, weights_MT, 0.0).sum()
        sums = {
            "weighted_nll": (weights_MT * long_MT).sum(),
            "nll": long_MT.sum(),
            "targets": count_M.sum(),
            "weights": total_M.sum(),
            "weights_beyond": beyond,
            "zero_weights": (valid_MT & (weights_MT == 0)).sum(),
            "weight_std": variance_M.sqrt().sum(),
            "weight_entropy": -torch.xlogy(shares_MT, shares_MT).sum(),
            "effective_targets": torch.where(squares_M > 0, 1.0 / squares_M.clamp(min=1e-300), 0.0).sum(),
            "rows": torch.tensor(len(weights_MT), device=weights_MT.device),
            "nonfinite": (valid_MT & ~finite_MT).sum(),
            "loss_rows": self._loss_rows(valid_MT & (weights_MT != 0), packed),
            "labelled_rows": self._loss_rows(valid_MT, packed),
            "attended": torch.tensor(float(sum(length**2 for length in lengths)), device=weights_MT.device),
        }
        buckets = list(zip(self.edges, self.edges[1:], strict=False))
        if starts_MT is None:
            by_target_4T = torch.stack([x.double().sum(0) for x in (valid_MT, long_MT, weights_MT, short_MT)])
            widths = [high - low for low, high in buckets]
            by_position_4B = torch.stack([part.sum(1) for part in by_target_4T.split(widths, dim=1)], dim=1)
        else:
            by_target_4MT = torch.stack([x.double() for x in (valid_MT, long_MT, weights_MT, short_MT)])
            inside = ((position_MT >= low) & (position_MT < high) for low, high in buckets)
            by_position_4B = torch.stack([(by_target_4MT * in_MT).sum((1, 2)) for in_MT in inside], dim=1)
        return torch.cat((torch.stack([sums[name].double() for name in _SUMS]), by_position_4B.flatten()))

    def _loss_rows(self, chosen_MT: Tensor, packed: PackedSequence | None) -> Tensor:
        """Tokens that the loss's backward pass works on where these targets of a micro-batch have a weight: each rank
        fills its shards up to the fullest of them (`choose_rows`)."""
        chosen_N = torch.nn.functional.pad(chosen_MT.sum(0), (0, 1))
        ranks_RS = [
            chosen_N[
                zigzag_positions(len(chosen_N), rank=rank, size=self.cp_size, device=chosen_N.device)
                if packed is None
                else packed.positions(rank)
            ]
            for rank in range(self.cp_size)
        ]
        counts_RG = torch.stack(ranks_RS).view(self.cp_size, self.loss_shards, -1).sum(2)
        return counts_RG.amax(1).sum() * self.loss_shards

    def metrics(self, sums: Sequence[float], *, scored: bool) -> dict[str, Any]:
        """The step's metrics from its sums over the run, and what else the step needs: `rows`, `nonfinite`, `targets`,
        `loss_rows` and `labelled_rows` (tokens that the loss's backward and forward pass work on, of all ranks that
        share a row), and `attended` (squares of the documents' lengths).

        weighted_loss, lm_loss (unweighted), short_lm_loss (the scorer's, when `scored`); of the weights mean, std,
        entropy (nats, of a row's weights as shares), effective sample size ((sum w)^2 / sum w^2, as a share of the
        targets), shares of zeros and beyond the old context; and by_position, a dict for each bucket. Means over
        targets are NaN where there is none.
        """
        total = dict(zip(_SUMS, sums, strict=False))
        targets = total["targets"] or math.nan
        buckets = len(self.edges) - 1
        columns = [sums[len(_SUMS) + i * buckets :][:buckets] for i in range(len(_POSITION_SUMS))]
        short_nll = sum(columns[_POSITION_SUMS.index("short_nll")])
        return {
            "weighted_loss": total["weighted_nll"] / targets,
            "lm_loss": total["nll"] / targets,
            **({"short_lm_loss": short_nll / targets} if scored else {}),
            "weight_mean": total["weights"] / targets,
            "weight_std": total["weight_std"] / total["rows"],
            "weight_entropy": total["weight_entropy"] / total["rows"],
            "effective_sample_size": total["effective_targets"] / targets,
            "zero_weight_share": total["zero_weights"] / targets,
            "weight_share_beyond_context": total["weights_beyond"] / total["weights"] if total["weights"] else 0.0,
            "by_position": [
                self._bucket(i, dict(zip(_POSITION_SUMS, bucket, strict=True)), scored)
                for i, bucket in enumerate(zip(*columns, strict=True))
            ],
            "rows": total["rows"],
            "nonfinite": total["nonfinite"],
            **{name: total[name] for name in ("targets", "loss_rows", "labelled_rows", "attended")},
        }

    def fractions(self, sums: Tensor, *, scored: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """The single numbers of `metrics` as sums that may still be added up, and what to divide them by then; and
        lm_loss_beyond (when `scored` also short_lm_loss_beyond), of targets at `old_context` and later alone.

        sums: [size] fp64.
        """
        total = dict(zip(_SUMS, sums, strict=False))
        by_position = dict(zip(_POSITION_SUMS, sums[len(_SUMS) :].reshape(len(_POSITION_SUMS), -1), strict=True))
        first_beyond = sum(edge < self.old_context for edge in self.edges)
        beyond = {name: of_buckets[first_beyond:].sum() for name, of_buckets in by_position.items()}
        targets = total["targets"]
        fractions = {
            "weighted_loss": (total["weighted_nll"], targets),
            "lm_loss": (total["nll"], targets),
            "lm_loss_beyond": (beyond["nll"], beyond["targets"]),
            "weight_mean": (total["weights"], targets),
            "weight_std": (total["weight_std"], total["rows"]),
            "weight_entropy": (total["weight_entropy"], total["rows"]),
            "effective_sample_size": (total["effective_targets"], targets),
            "zero_weight_share": (total["zero_weights"], targets),
            "weight_share_beyond_context": (total["weights_beyond"], total["weights"]),
        }
        if scored:
            fractions["short_lm_loss"] = (by_position["short_nll"].sum(), targets)
            fractions["short_lm_loss_beyond"] = (beyond["short_nll"], beyond["targets"])
        return fractions

    def _bucket(self, index: int, total: dict[str, float], scored: bool) -> dict[str, Any]:
        """Means over the bucket's targets; None where there are none."""
        targets = total["targets"]
        means = {"lm_loss": "nll", "short_lm_loss": "short_nll", "weight_mean": "weights"}
        if not scored:
            del means["short_lm_loss"]
        return {
            "first": self.edges[index],
            "last": self.edges[index + 1] - 1,
            "targets": int(targets),
            **{name: total[key] / targets if targets else None for name, key in means.items()},
        }
