"""Every target's NLL by a model under any layout: the forward passes of an evaluation.

Rows are dealt to the data-parallel replicas in turn; each goes through the same long forward and short-window forward
as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.config import check_packed
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.data.loader import read_batch
from megatron_tw.data.rows import TokenRows
from megatron_tw.evaluation.compare import check_same_rows
from megatron_tw.evaluation.kept import Arrays, Kept, in_passes
from megatron_tw.evaluation.key_tokens import choose_key_tokens
from megatron_tw.evaluation.position import mean_nll, nll_by_position, position_edges
from megatron_tw.evaluation.result import EvaluationHeader, EvaluationResult
from megatron_tw.evaluation.results import Record
from megatron_tw.evaluation.targets import RowTargets
from megatron_tw.evaluation.tasks import Found, Model, Run, Setting
from megatron_tw.model.forward import long_nll, long_nll_and_top1
from megatron_tw.model.packed_windows import WindowForward, window_forward
from megatron_tw.parallel.contact import now_at
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.opening import check_attention, open_rows
from megatron_tw.runtime.source import row_bos_id
from megatron_tw.weighting import unfrozen_short_nll


def prepare_loss(setting: Setting, names: Sequence[str]) -> Run:
    """The suite loss: the NLLs of the model on the held-out rows. See `tasks`."""
    config, source = setting.config, setting.source
    options = config.evaluation
    assert options.data_path is not None
    assert options.seq_length is not None
    seq_length = options.seq_length
    rows = open_rows("--data-path", options.data_path, source, seq_length)
    check_attention(config.compute, source, setting.device, seq_length)
    check_marks(rows, config)
    bos_id = row_bos_id(options.bos_id, rows, source.architecture)
    num_rows = len(rows) if options.eval_rows is None else min(options.eval_rows, len(rows))
    targets = RowTargets.of_rows(rows, num_rows)
    windows = config.windows.of_rows(seq_length)
    header = EvaluationHeader(
        model=source.name,
        layout="",
        seq_length=targets.longest,
        short_window=windows.tokens if windows is not None else None,
        short_stride=windows.stride if windows is not None else None,
        rotary_base=source.architecture.rotary_base,
        data_fingerprint=rows.header.fingerprint,
        tokenizer_fingerprint=rows.header.tokenizer.fingerprint if rows.header.tokenizer is not None else None,
        old_context=source.old_context,
        packed=targets.documents is not None,
    )
    check_room(targets, with_short_nll=windows is not None)
    if options.key_tokens is not None:
        key_tokens = choose_key_tokens(EvaluationResult.load(options.key_tokens), options.key_tokens)
        check_same_rows(
            "the rows of --data-path", header, len(targets.names), f"--key-tokens {key_tokens.name}", key_tokens.source
        )

    setting.facts["rows"] = rows.header.fingerprint

    def run(model: Model) -> Found:
        layout, short_forward = model.layout, None
        if windows is not None:
            short_forward = window_forward(
                rows.header,
                windows.tokens,
                windows.stride,
                include_first=False,
                bos_id=bos_id,
                layout=layout,
                sequence_parallel=config.parallel.uses_sequence_parallel,
                scoring_micro_batch=windows.micro_batch,
            )
        nlls = nll_of_rows(
            model.chunks,
            rows,
            num_rows,
            layout,
            model.device,
            micro_batch_size=options.micro_batch_size,
            short_forward=short_forward,
            top1=True,
            what="evaluating",
            kept=model.kept,
            name="loss",
        )
        model.long_nll["loss"] = None if nlls is None else nlls.long
        if nlls is None:
            return Found()
        long_all, short_all, top1_all = nlls.long, nlls.short, nlls.top1
        assert long_all is not None
        assert top1_all is not None
        long, top1, valid = (targets.by_document(x) for x in (long_all.numpy(), top1_all.numpy(), targets.valid))
        short = None
        if short_all is not None and windows is not None:
            of_documents = torch.from_numpy(targets.by_document(short_all.numpy()))
            short = unfrozen_short_nll(torch.from_numpy(long), of_documents, windows.tokens).numpy()
        result = EvaluationResult(
            header=replace(header, layout=layout.describe()),
            row_index=targets.names,
            long_nll=long,
            short_nll=short,
            valid=valid,
            top1=top1,
        )
        return Found(records=loss_records(result), nlls=result)

    return run


def check_marks(rows: TokenRows, config: EvaluationConfig) -> None:
    """What packed rows ask of the layout.

    Raises:
        ValueError: names the option.
    """
    if rows.header.packing is not None:
        multiple, micro_batch_size = rows.header.packing.multiple, config.evaluation.micro_batch_size
        check_packed("--data-path", multiple, config.parallel, micro_batch_size=micro_batch_size)


def check_room(targets: RowTargets, *, with_short_nll: bool) -> None:
    """That the result of packed rows, each document in a row of its own as long as the longest, fits into half of the
    memory. Of other rows it is no larger than they are.

    Raises:
        ValueError: it does not.
    """
    if targets.documents is None:
        return
    documents, longest = len(targets.documents), targets.longest
    needed, there = documents * (longest - 1) * (10 if with_short_nll else 6), psutil.virtual_memory().total
    if needed > there / 2:
        raise ValueError(
            f"--data-path: packed rows of {documents:,} documents, the longest of {longest:,} tokens: their evaluation "
            f"holds each as a row of that length, {needed / 1e9:,.1f} GB of the {there / 1e9:,.1f} GB of this machine; "
            "take fewer rows (--eval-rows), or rows without --pack"
        )


def loss_records(result: EvaluationResult) -> tuple[Record, ...]:
    """The mean NLL of all targets, and of each bucket of positions."""
    header = result.header
    edges = position_edges(header.seq_length, old_context=header.known_context)
    buckets = nll_by_position(result.long_nll, result.valid, edges)
    whole = mean_nll(result.long_nll, result.valid)
    figures = [("all", whole, int(result.valid.sum()))]
    figures += [(f"positions {bucket.first} to {bucket.last}", bucket.nll, bucket.targets) for bucket in buckets]
    return tuple(
        Record(suite="loss", task=task, length=header.seq_length, metric="nll", value=value, samples=targets)
        for task, value, targets in figures
    )


@dataclass(frozen=True)
class RowNlls:
    """Of R rows with T targets each, on the CPU: NLLs [R, T] fp32 with the whole context, and in short windows, and
    [R, T] bool, whether the target is the model's first choice. None: not asked for."""

    long: Tensor | None
    short: Tensor | None
    top1: Tensor | None


def nll_of_rows(
    model: Sequence[torch.nn.Module],
    rows: TokenRows,
    num_rows: int,
    layout: Layout,
    device: Device,
    *,
    micro_batch_size: int,
    short_forward: WindowForward | None = None,
    long: bool = True,
    top1: bool = False,
    what: str,
    keep_bar: bool = True,
    kept: Kept | None = None,
    name: str = "",
) -> RowNlls | None:
    """Of the first `num_rows` rows the long NLL and what else is asked for, by `short_forward` and `top1`; on all ranks
    of the last pipeline stage (with `kept`: on the writing rank), None on the others. Collective over the world. what,
    keep_bar, kept, name: see `in_passes`."""
    rows_per_pass = micro_batch_size * layout.pp_size  # as many as the pipeline wants at a time

    def one_pass(index: int) -> Arrays | None:
        first = index * rows_per_pass
        now_at(f"{what}, row {first * layout.dp_size}")
        # Rows past the end stand in for nothing and are dropped below.
        mine = [min((first + i) * layout.dp_size + layout.dp_rank, num_rows - 1) for i in range(rows_per_pass)]
        batch = read_batch(rows, mine)
        tokens_RN = batch.tokens.to(device.device)
        marks: dict[str, Any] = {
            "micro_batch_size": micro_batch_size,
            "valid_RT": None if batch.valid is None else batch.valid.to(device.device),
            "documents_D3": batch.documents,
        }
        made: dict[str, Tensor | None] = {}
        if not long:
            assert short_forward is not None
        elif top1:
            both = long_nll_and_top1(model, tokens_RN, layout, **marks)
            made["long"], made["top1"] = (None, None) if both is None else both
        else:
            made["long"] = long_nll(model, tokens_RN, layout, **marks)
        if short_forward is not None:
            made["short"] = short_forward.short_nll(model, tokens_RN, batch.documents)
        left = num_rows - first * layout.dp_size
        there = {key: part_RT for key, part_RT in made.items() if part_RT is not None}
        return {key: _in_row_order(part_RT, left, layout) for key, part_RT in there.items()} or None

    passes = -(-num_rows // (layout.dp_size * rows_per_pass))
    whole = in_passes(one_pass, [1] * passes, layout, what=what, keep_bar=keep_bar, kept=kept, name=name)
    if whole is None:
        return None
    tensors = {key: torch.from_numpy(part_RT) for key, part_RT in whole.items()}
    return RowNlls(tensors.get("long"), tensors.get("short"), tensors.get("top1"))


def _in_row_order(part_RT: Tensor, num_rows: int, layout: Layout) -> npt.NDArray[Any]:
    """The first `num_rows` rows of what the data-parallel replicas went through: replica d has rows d, d + dp, ..."""
    own_RT = part_RT.to(torch.uint8) if part_RT.dtype == torch.bool else part_RT.float()
    shards = [torch.empty_like(own_RT) for _ in range(layout.dp_size)]
    dist.all_gather(shards, own_RT.contiguous(), group=layout.dp_group)
    whole_RT = torch.stack(shards, dim=1).flatten(0, 1)[:num_rows].cpu()
    return (whole_RT.bool() if part_RT.dtype == torch.bool else whole_RT).numpy()
