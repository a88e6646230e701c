"""Scoring rows with a frozen model under any layout: short NLLs of a whole dataset, once, onto disk.

    plan -> parts that are missing, dealt to the data-parallel replicas -> short-window forward -> part files -> folder

Rows go through the same short-window forward as in training, window 0 included. What a part holds depends on the plan
and on the model-parallel layout, not on the number of replicas.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.config import check_packed
from megatron_tw.config.scoring import ScoringConfig, check_scoring
from megatron_tw.data.loader import read_batch
from megatron_tw.data.progress import Progress
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.score_parts import ScoreParts, check_output, rows_per_part
from megatron_tw.data.scores import ScoresHeader
from megatron_tw.data.vocabulary import check_scorer_vocabulary
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.packed_windows import WindowForward, window_forward
from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.contact import now_at
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.fingerprint import plain_numbers, weights_fingerprint
from megatron_tw.runtime.lock import hold_folder
from megatron_tw.runtime.opening import check_attention, join_world, named, open_model
from megatron_tw.runtime.source import open_source, row_bos_id


def score_tokens(config: ScoringConfig) -> Path:
    """Score all rows of --data-path with the model of --load-hf, going on where an earlier run stopped, and return the
    folder of their short NLLs, which is there when rank 0 returns. Does nothing if it is finished.

    Called on every rank of the launcher's world; the output is on storage that all ranks share.

    Raises:
        ValueError: an option or file that does not fit, before anything is allocated; or an NLL that is NaN or
            infinite, named.
    """
    device = join_world(config.parallel)
    check_scoring(config, dist.get_world_size())
    options, folder = config.scoring, config.scorer_folder
    check_output(options.output)
    with named("--data-path"):
        rows = TokenRows(options.data_path)
    if rows.header.packing is not None:
        check_packed("--data-path", rows.header.packing.multiple, config.parallel)
    seq_length = rows.header.seq_length
    windows = config.windows_of(seq_length)
    source = open_source(config.model, load=None, seq_length=seq_length)
    architecture = source.architecture
    architecture.check_length(windows.tokens, "--short-window")
    check_attention(config.compute, source, device, windows.tokens, "--short-window")
    check_scorer_vocabulary(rows, folder, architecture.vocab_size)
    bos_id = row_bos_id(options.bos_id, rows, architecture)
    header = ScoresHeader(
        scorer=source.name,
        scorer_weights=weights_fingerprint(folder, architecture),
        scorer_shape=plain_numbers(architecture),
        scorer_rope=architecture.rope,
        short_window=windows.tokens,
        short_stride=windows.stride,
        bos_id=bos_id,
        seq_length=seq_length,
        rows=len(rows),
        data_fingerprint=rows.header.fingerprint,
        tokenizer_fingerprint=rows.header.tokenizer.fingerprint if rows.header.tokenizer is not None else None,
        computation=_computation(config, device.type),
    )
    stages = config.parallel.pipeline_model_parallel_size
    rows_at_once = 4 * stages if stages > 1 else 1  # enough of them to keep a pipeline's stages busy
    parts = ScoreParts(options.output, header, rows_per_part(len(rows), rows_at_once))
    finished = parts.check()
    dist.barrier()  # every rank has looked at what is there, before rank 0 changes it
    if finished:
        if dist.get_rank() == 0:
            parts.discard()
        return parts.output

    with hold_folder(parts.folder, f"--output {options.output}") as lock:
        if parts.check():  # another run ended while this one waited for the folder
            return parts.output
        layout, chunks = open_model(source, config.parallel, config.compute, device)
        forward = window_forward(
            rows.header,
            windows.tokens,
            windows.stride,
            include_first=True,
            bos_id=bos_id,
            layout=layout,
            sequence_parallel=config.parallel.uses_sequence_parallel,
            scoring_micro_batch=windows.micro_batch,
        )
        _score_parts(parts, rows, chunks, forward, layout, rows_at_once, device.device)
        dist.barrier()  # all parts are there
        if lock is not None:  # rank 0; the others do not wait: with many rows this takes longer than a collective may
            lock.check()
            parts.complete(rows)
    if dist.get_rank() == 0:
        parts.discard()  # and the folder of the lock with them
    return parts.output


def _score_parts(
    parts: ScoreParts,
    rows: TokenRows,
    chunks: list[TokenWeightedGPT],
    forward: WindowForward,
    layout: Layout,
    rows_at_once: int,
    device: torch.device,
) -> None:
    """Make this replica's share of the missing parts; the first rank of its last pipeline stage writes them."""
    missing = _missing_parts(parts, layout)
    mine = missing[layout.dp_rank :: layout.dp_size]
    if layout.reports and len(missing) < len(parts):
        print(f"going on: {len(parts) - len(missing)} of {len(parts)} parts are there", flush=True)
    replica = f" (1 of {layout.dp_size} replicas)" if layout.dp_size > 1 else ""
    total = sum(len(parts.rows_of(part)) for part in mine)
    with Progress(f"scoring{replica}", total, "rows", show=layout.reports) as progress:
        for part in mine:
            nlls, first, last = [], parts.rows_of(part).start, parts.rows_of(part).stop
            for start in range(first, last, rows_at_once):
                now_at(f"scoring, row {start}")
                index = range(start, min(start + rows_at_once, last))
                batch = read_batch(rows, index)
                short_RT = forward.short_nll(chunks, batch.tokens.to(device), batch.documents)
                if short_RT is not None:
                    _check_finite(short_RT, index)
                    nlls.append(short_RT.cpu())
                progress.update(len(index))
            if layout.is_last_stage and layout.tp_rank == 0 and layout.cp_rank == 0:
                parts.write(part, torch.cat(nlls).numpy())


def _missing_parts(parts: ScoreParts, layout: Layout) -> list[int]:
    """What is left to do, as rank 0 sees it: on network storage others might see less, and all must agree."""
    answer: list[list[int] | None] = [None]
    error: OSError | ValueError | None = None
    if layout.rank == 0:
        try:
            parts.begin()
            answer = [parts.missing()]
        except (OSError, ValueError) as failed:
            error = failed
    raise_together(error)
    dist.broadcast_object_list(answer, src=0)  # over the world
    assert answer[0] is not None
    return answer[0]


def _check_finite(nll_RT: Tensor, rows: range) -> None:
    """Refuse NaN and infinity, on every rank that holds the NLLs.

    Raises:
        ValueError: names the first such row and position.
    """
    bad_RT = ~nll_RT.isfinite()
    if bool(bad_RT.any()):
        row, column = bad_RT.nonzero()[0].tolist()
        raise ValueError(
            f"--load-hf: the scorer's NLL of row {rows[row]}, position {column + 1} is {nll_RT[row, column].item()}; "
            "the parts made so far are kept"
        )


def _computation(config: ScoringConfig, device: str) -> dict[str, int | str | bool | None]:
    """What decides the order in which floats are added up."""
    parallel, compute = config.parallel, config.compute
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "num_layers_per_virtual_pipeline_stage": parallel.num_layers_per_virtual_pipeline_stage,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.uses_sequence_parallel,
        "cp_comm_type": parallel.cp_comm_type,
        "bf16": compute.bf16,
        "transformer_impl": compute.transformer_impl,
        "loss_chunk_tokens": compute.loss_chunk_tokens,
        "scoring_micro_batch": config.windows.scoring_micro_batch,
        "device": device,
    }
