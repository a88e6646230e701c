"""Token rows to the micro-batches of one data-parallel rank.

    sample 0, 1, 2, ...           the run's own count: `consumed_samples` so far
    RowOrder                      sample -> row: epoch after epoch, each shuffled by (seed, epoch)
    step                          the next `global_batch_size` samples
    micro_batch_samples           a step's samples -> those of one rank's micro-batch

Both maps are pure functions of plain integers: the state of the data is one number, and which rank takes which row
never changes the rows of a step.

Shapes: B rows of a micro-batch, N tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_tw.data.blend import Blend, BlendOrder
from megatron_tw.data.order import RowOrder
from megatron_tw.data.rows import TokenRows


def micro_batch_samples(first: int, micro_batch: int, *, dp_rank: int, dp_size: int, micro_batch_size: int) -> range:
    """The samples of a rank's micro-batch in the step that begins with sample `first`.

    Two ranks, micro-batches of 3, a global batch of 12 that begins with sample 100:

    >>> [list(micro_batch_samples(100, m, dp_rank=1, dp_size=2, micro_batch_size=3)) for m in range(2)]
    [[103, 104, 105], [109, 110, 111]]
    """
    start = first + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return range(start, start + micro_batch_size)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: whole rows, the same on every rank of a model replica."""

    tokens: torch.Tensor
    """int64 [B, N]."""
    row_index: torch.Tensor
    """int64 [B]: which rows of the dataset they are."""
    valid: torch.Tensor | None = None
    """bool [B, N-1], which targets count; None: all of them."""
    documents: torch.Tensor | None = None
    """int64 [D, 3], always on the CPU: of each document of packed rows its row in the micro-batch, where it begins
    there, and its tokens without padding (0: padding alone); None: each row is one document."""


def read_batch(rows: TokenRows | Blend, index: Sequence[int]) -> Batch:
    """These rows of a dataset, in this order."""
    read = [rows.read(row) for row in index]
    valid = [row.valid for row in read if row.valid is not None]
    documents = [np.insert(row.documents, 0, place, axis=1)
                 for place, row in enumerate(read) if row.documents is not None]  # fmt: skip
    return Batch(
        torch.from_numpy(np.stack([row.tokens for row in read])),
        torch.tensor(index, dtype=torch.int64),
        torch.from_numpy(np.stack(valid)) if valid else None,
        torch.from_numpy(np.concatenate(documents)) if documents else None,
    )


def documents_of(batches: Sequence[Batch]) -> torch.Tensor | None:
    """`Batch.documents` of batches together, with rows counted on from one to the next."""
    found, first = [], 0
    for batch in batches:
        if batch.documents is not None:
            found.append(batch.documents + torch.tensor([first, 0, 0]))
        first += len(batch.tokens)
    return torch.cat(found) if found else None


class Loader:
    """Endless iterator over steps: `next` gives the list of this rank's micro-batches and advances `consumed_samples`.

    Args:
        rows: the dataset.
        order: made for as many rows.
        global_batch_size: rows of a step, over all ranks.
        micro_batch_size: rows of a micro-batch.
        dp_rank, dp_size: this rank in the data-parallel group.
        consumed_samples: where to begin.

    Raises:
        ValueError: the global batch is not made of whole micro-batches on every rank.
    """

    def __init__(
        self,
        rows: TokenRows | Blend,
        order: RowOrder | BlendOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
    ) -> None:
        assert order.num_rows == len(rows)
        assert 0 <= dp_rank < dp_size
        assert consumed_samples >= 0
        if min(global_batch_size, micro_batch_size) < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"--global-batch-size {global_batch_size} must be a positive multiple of "
                f"--micro-batch-size {micro_batch_size} x data-parallel size {dp_size}"
            )
        self.rows = rows
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.consumed_samples = consumed_samples

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        batches = [self._micro_batch(index) for index in range(self.num_microbatches)]
        self.consumed_samples += self.global_batch_size
        return batches

    def _micro_batch(self, index: int) -> Batch:
        samples = micro_batch_samples(
            self.consumed_samples,
            index,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            micro_batch_size=self.micro_batch_size,
        )
        return read_batch(self.rows, [self.order[sample] for sample in samples])

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands (`consumed_samples`), and what it must be for that number to mean the same."""
        return {"consumed_samples": self.consumed_samples, **_identity(self.rows, self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the saved samples, under any layout and global batch size.

        Raises:
            ValueError: another dataset or another order (see `samples_of_state`).
        """
        self.consumed_samples = samples_of_state(state, self.rows, self.order)


def samples_of_state(state: Mapping[str, Any], rows: TokenRows | Blend, order: RowOrder | BlendOrder) -> int:
    """How many samples were consumed when a `Loader.state_dict` was saved, if they are still the same rows.

    Raises:
        ValueError: another dataset or another order; tells every difference.
    """
    options = {
        "seed": "--seed",
        "shuffle": "--no-shuffle",
        "num_rows": "--data-path",
        "shares": "--data-path",
        "data_fingerprint": "--data-path",
    }
    differences = [
        f"{name} was {state.get(name)} and is now {value} ({options[name]})"
        for name, value in _identity(rows, order).items()
        if state.get(name) != value
    ]
    if differences:
        raise ValueError("--load: the run's data cannot be continued: " + "; ".join(differences))
    consumed = state.get("consumed_samples")
    if not isinstance(consumed, int) or consumed < 0:
        raise ValueError(f"--load: the run's data cannot be continued: consumed_samples: {consumed!r}")
    return consumed


def _identity(rows: TokenRows | Blend, order: RowOrder | BlendOrder) -> dict[str, Any]:
    """What must be the same for a number of samples to mean the same rows, as plain values."""
    return {**order.identity(), "data_fingerprint": rows.fingerprint}
