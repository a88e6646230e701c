"""Log-likelihoods of many sequences of different lengths by forward passes of a parallel model.

Sequences go through from the longest to the shortest, so those of one pass are of like lengths, and what is said of the
remaining time is rather too much than too little. A pass has as many as the replicas and the pipeline take at a time;
they are filled up behind their last token, where no earlier token looks. Only the tokens that are asked for have
labels, so no logits are made of the others.

Shape suffixes: M sequences of a replica's pass, L tokens of the longest of the pass.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_tw.evaluation.kept import Arrays, in_passes
from megatron_tw.evaluation.tasks import Model
from megatron_tw.model.forward import nll_and_top1, shard_sequences
from megatron_tw.model.sequence import SequenceShard
from megatron_tw.objective.short_windows import IGNORED
from megatron_tw.parallel.contact import now_at


@dataclass(frozen=True)
class Scored:
    """ids: all tokens. targets: how many of them, the last ones, are asked for; at least 1 and not the first."""

    ids: tuple[int, ...]
    targets: int


def score_sequences(
    model: Model, sequences: Sequence[Scored], *, what: str, name: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Of each sequence the log-likelihood of its targets (natural log), and whether each of them is the model's first
    choice. The same on every rank. Collective over the world.

    what: for the progress. name: under which finished passes are kept (see `Kept`); other sequences have another.
    """
    if not sequences:
        return np.zeros(0), np.zeros(0, dtype=bool)
    layout, micro_batch_size = model.layout, model.config.evaluation.micro_batch_size
    per_replica = micro_batch_size * layout.pp_size  # as many as the pipeline wants at a time
    per_pass = per_replica * layout.dp_size
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index].ids), index))

    def one_pass(index: int) -> Arrays | None:
        now_at(f"{what}, pass {index}")
        chosen = [sequences[i] for i in order[index * per_pass : (index + 1) * per_pass]]
        filled = chosen + [chosen[-1]] * (per_pass - len(chosen))  # what only fills up is dropped below
        mine = filled[layout.dp_rank * per_replica : (layout.dp_rank + 1) * per_replica]
        both = _forward(model, mine, len(chosen[0].ids), micro_batch_size)
        if both is None:
            return None
        gathered = [torch.empty_like(both) for _ in range(layout.dp_size)]
        dist.all_gather(gathered, both, group=layout.dp_group)
        nll, greedy = torch.cat(gathered)[: len(chosen)].cpu().numpy().T
        return {"nll": nll, "greedy": greedy > 0}

    passes = range(0, len(sequences), per_pass)
    costs = [sum(len(sequences[i].ids) for i in order[first : first + per_pass]) for first in passes]
    kept_as = f"{name}-{_digest(sequences)}"
    arrays = in_passes(one_pass, costs, layout, what=what, unit="tokens", kept=model.kept, name=kept_as)
    everywhere: list[Arrays | None] = [None] * layout.world_size
    dist.all_gather_object(everywhere, arrays)  # a few bytes a sequence, from the rank that has them
    found = next(part for part in everywhere if part is not None)
    log_likelihood, greedy = np.empty(len(order)), np.empty(len(order), dtype=bool)
    log_likelihood[order], greedy[order] = -found["nll"], found["greedy"]
    return log_likelihood, greedy


def _forward(model: Model, mine: Sequence[Scored], longest: int, micro_batch_size: int) -> torch.Tensor | None:
    """[M, 2] fp64: the sum of the targets' NLL, and 1 where all are first choices. None before the last stage."""
    layout, device = model.layout, model.device.device
    multiple = model.config.parallel.seq_length_multiple
    length = -(-(longest - 1) // multiple) * multiple  # the last token is predicted, and predicts nothing
    ids_ML = torch.zeros(len(mine), length, dtype=torch.int64)
    labels_ML = torch.full_like(ids_ML, IGNORED)
    for row, sequence in enumerate(mine):
        ids = torch.tensor(sequence.ids)
        end = len(ids) - 1
        ids_ML[row, :end] = ids[:-1]
        labels_ML[row, end - sequence.targets : end] = ids[-sequence.targets :]
    ids_ML, labels_ML = ids_ML.to(device), labels_ML.to(device)
    shard = SequenceShard.over(layout.cp_group, length)
    batches = [
        shard_sequences(ids, labels, shard)
        for ids, labels in zip(ids_ML.split(micro_batch_size), labels_ML.split(micro_batch_size), strict=True)
    ]
    both = nll_and_top1(model.chunks, batches, layout)
    if both is None:
        return None
    nll_ML, top1_ML = both
    asked_ML = labels_ML != IGNORED
    nll_M = torch.where(asked_ML, nll_ML.double(), 0.0).sum(dim=1)
    return torch.stack([nll_M, (top1_ML | ~asked_ML).all(dim=1).double()], dim=1)


def _digest(sequences: Sequence[Scored]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.array([len(sequence.ids), sequence.targets, *sequence.ids], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def rolling_targets(windows: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """Windows of context and continuation, as lm_eval cuts a long text, as sequences."""
    return [Scored((*context, *continuation), len(continuation)) for context, continuation in windows]


Request = tuple[Any, list[int], list[int]]
"""As lm_eval hands it over: the texts, ids of the context, ids of the continuation."""


def as_sequence(request: Request, max_length: int) -> Scored:
    """What lm_eval's Hugging Face model scores of a request: at most `max_length` tokens go in, the last ones, and the
    last token of all is predicted only.

    Raises:
        ValueError: the continuation alone is longer.
    """
    _, context, continuation = request
    if len(continuation) > max_length:
        raise ValueError(
            f"--seq-length {max_length}: a continuation of {len(continuation)} tokens is longer than the longest input"
        )
    return Scored(tuple((context + continuation)[-(max_length + 1) :]), len(continuation))
