"""Every target's NLL by a model under any layout: the forward passes of an evaluation.

Rows are dealt to the data-parallel replicas in turn; each goes through the same long forward and short-window forward
as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.config.evaluation import EvaluationConfig, check_evaluation
from megatron_tw.data.files import check_new_folder
from megatron_tw.data.progress import Progress
from megatron_tw.data.rows import TokenRows
from megatron_tw.evaluation.compare import check_same_rows
from megatron_tw.evaluation.key_tokens import choose_key_tokens
from megatron_tw.evaluation.result import EvaluationHeader, EvaluationResult
from megatron_tw.model.forward import ShortWindowForward, long_nll, long_nll_and_top1
from megatron_tw.parallel.contact import now_at
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.opening import check_attention, join_world, open_model, open_rows
from megatron_tw.runtime.source import open_source, row_bos_id
from megatron_tw.weighting import unfrozen_short_nll


def evaluate(config: EvaluationConfig) -> EvaluationResult | None:
    """The NLLs of the model on the held-out rows; on the writing rank (the last pipeline stage's first), None on the
    others.

    Called on every rank of the launcher's world.

    Raises:
        ValueError: an option or file that does not fit, before anything is allocated.
    """
    device = join_world(config.parallel)
    check_evaluation(config, dist.get_world_size())
    options = config.evaluation
    check_new_folder(Path(options.output))
    source = open_source(
        config.model, load=options.load, seq_length=options.seq_length, verify=options.verify_checkpoint
    )
    if options.load is not None and source.saved is None:
        raise ValueError(f"--load {options.load}: holds no checkpoint")
    rows = open_rows("--data-path", options.data_path, source, options.seq_length)
    check_attention(config.compute, source, device, options.seq_length)
    bos_id = row_bos_id(options.bos_id, rows, source.architecture)
    num_rows = len(rows) if options.eval_rows is None else min(options.eval_rows, len(rows))
    windows = config.windows.of_rows(options.seq_length)
    header = EvaluationHeader(
        model=source.name,
        layout="",
        seq_length=options.seq_length,
        short_window=windows.tokens if windows is not None else None,
        short_stride=windows.stride if windows is not None else None,
        rotary_base=source.architecture.rotary_base,
        data_fingerprint=rows.header.fingerprint,
        tokenizer_fingerprint=rows.header.tokenizer.fingerprint if rows.header.tokenizer is not None else None,
        old_context=source.old_context,
    )
    if options.key_tokens is not None:
        key_tokens = choose_key_tokens(EvaluationResult.load(options.key_tokens), options.key_tokens)
        check_same_rows(
            "the rows of --data-path", header, num_rows, f"--key-tokens {key_tokens.name}", key_tokens.source
        )
    layout, chunks = open_model(source, config.parallel, config.compute, device)

    short_forward = None
    if windows is not None:
        short_forward = ShortWindowForward.create(
            options.seq_length,
            windows.tokens,
            windows.stride,
            include_first=False,
            bos_id=bos_id,
            layout=layout,
            sequence_parallel=config.parallel.uses_sequence_parallel,
            scoring_micro_batch=windows.micro_batch,
        )
    nlls = nll_of_rows(
        chunks,
        rows,
        num_rows,
        layout,
        device,
        micro_batch_size=options.micro_batch_size,
        short_forward=short_forward,
        top1=True,
        what="evaluating",
    )
    if nlls is None or layout.tp_rank or layout.cp_rank or layout.dp_rank:
        return None
    long_all, short_all, top1_all = nlls.long, nlls.short, nlls.top1
    assert top1_all is not None
    if short_all is not None and windows is not None:
        short_all = unfrozen_short_nll(long_all, short_all, windows.tokens)
    return EvaluationResult(
        header=replace(header, layout=layout.describe()),
        row_index=np.arange(num_rows),
        long_nll=long_all.numpy(),
        short_nll=None if short_all is None else short_all.numpy(),
        valid=np.ones((num_rows, options.seq_length - 1), dtype=bool),
        top1=top1_all.numpy(),
    )


@dataclass(frozen=True)
class RowNlls:
    """Of R rows with T targets each, on the CPU: NLLs [R, T] fp32 with the whole context, and in short windows, and
    [R, T] bool, whether the target is the model's first choice. None: not asked for."""

    long: Tensor
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
    short_forward: ShortWindowForward | None = None,
    top1: bool = False,
    what: str,
    keep_bar: bool = True,
) -> RowNlls | None:
    """Of the first `num_rows` rows the long NLL and what else is asked for, by `short_forward` and `top1`; on all ranks
    of the last pipeline stage, None on the others. Collective over the world. what, keep_bar: see `Progress`, which
    counts the passes."""
    rows_per_pass = micro_batch_size * layout.pp_size  # as many as the pipeline wants at a time
    passes = range(0, -(-num_rows // layout.dp_size), rows_per_pass)
    parts: dict[str, list[Tensor]] = {"long": [], "short": [], "top1": []}
    with Progress(what, len(passes), "passes", show=layout.reports, keep=keep_bar) as progress:
        for first in passes:
            now_at(f"{what}, row {first * layout.dp_size}")
            # Rows past the end stand in for nothing and are dropped below.
            mine = [min((first + i) * layout.dp_size + layout.dp_rank, num_rows - 1) for i in range(rows_per_pass)]
            tokens_RN = torch.from_numpy(np.stack([rows[row] for row in mine])).to(device.device)
            made: dict[str, Tensor | None] = {}
            if top1:
                both = long_nll_and_top1(model, tokens_RN, layout, micro_batch_size=micro_batch_size)
                made["long"], made["top1"] = (None, None) if both is None else both
            else:
                made["long"] = long_nll(model, tokens_RN, layout, micro_batch_size=micro_batch_size)
            if short_forward is not None:
                made["short"] = short_forward.short_nll(model, tokens_RN)
            for name, part_RT in made.items():
                if part_RT is not None:
                    parts[name].append(part_RT)
            progress.update()
    if not layout.is_last_stage:
        return None
    whole = {name: _in_row_order(torch.cat(part), num_rows, layout) for name, part in parts.items() if part}
    return RowNlls(whole["long"], whole.get("short"), whole.get("top1"))


def _in_row_order(part_RT: Tensor, num_rows: int, layout: Layout) -> Tensor:
    """Rows 0 .. num_rows - 1 from what every data-parallel replica went through: replica d has rows d, d + dp, ..."""
    own_RT = part_RT.to(torch.uint8) if part_RT.dtype == torch.bool else part_RT.float()
    shards = [torch.empty_like(own_RT) for _ in range(layout.dp_size)]
    dist.all_gather(shards, own_RT.contiguous(), group=layout.dp_group)
    return (
        torch.stack(shards, dim=1)
        .flatten(0, 1)[:num_rows]
        .to("cpu", torch.bool if part_RT.dtype == torch.bool else torch.float32)
    )
