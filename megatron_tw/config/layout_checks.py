"""Checks of the parallel layout with ranks, rows, packed rows and the shape of a model; and what follows from it.

Each raises ValueError with the option, what was expected and what was given.
"""

import math

from megatron_tw.config.options import flag
from megatron_tw.config.ranges import at_least, at_most, require
from megatron_tw.config.schema import DataParallelConfig, ParallelConfig, TrainConfig

LARGEST_ROW = 10**8
"""Tokens; beyond it, somebody's slip."""
LARGEST_TIMEOUT = 60 * 24 * 365
"""Minutes: a year. What the system's clocks take ends not far above."""


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model that `world_size` ranks hold. Raises ValueError when ranks are left over."""
    require(
        world_size > 0 and world_size % parallel.model_parallel_size == 0,
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
        f"{parallel.pipeline_model_parallel_size} x --context-parallel-size {parallel.context_parallel_size}: "
        f"expected a number of ranks that is a multiple of {parallel.model_parallel_size}, got {world_size}",
    )
    return world_size // parallel.model_parallel_size


def num_microbatches(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> int:
    """Micro-batches that each copy of the model goes through in one optimizer step."""
    copies = data_parallel_size(parallel, world_size)
    rows, global_batch = train.micro_batch_size * copies, train.batch_size(copies)
    require(
        global_batch % rows == 0,
        f"--global-batch-size: expected a multiple of --micro-batch-size {train.micro_batch_size} x data-parallel size "
        f"{copies} = {rows}, got {global_batch}",
    )
    count, stages = global_batch // rows, parallel.pipeline_model_parallel_size
    require(
        parallel.num_layers_per_virtual_pipeline_stage is None or count % stages == 0,
        f"--global-batch-size {global_batch}: the interleaved schedule (--num-layers-per-virtual-pipeline-stage) "
        f"takes micro-batches in multiples of --pipeline-model-parallel-size {stages}, got {count}",
    )
    return count


def check_parallel(parallel: ParallelConfig, world_size: int | None = None) -> None:
    """The axes by themselves, and that they make up `world_size`."""
    at_least(
        1,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        num_layers_per_virtual_pipeline_stage=parallel.num_layers_per_virtual_pipeline_stage,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    at_most(LARGEST_TIMEOUT, distributed_timeout_minutes=parallel.distributed_timeout_minutes)
    require(
        parallel.num_layers_per_virtual_pipeline_stage is None or parallel.pipeline_model_parallel_size > 1,
        "--num-layers-per-virtual-pipeline-stage: expected a --pipeline-model-parallel-size above 1 with it, got 1",
    )
    sizes = parallel.hierarchical_context_parallel_sizes
    if parallel.cp_comm_type == "a2a+p2p":
        require(
            sizes is not None
            and len(sizes) == 2
            and min(sizes) > 0
            and math.prod(sizes) == parallel.context_parallel_size,
            f"--hierarchical-context-parallel-sizes: expected two sizes whose product is --context-parallel-size "
            f"{parallel.context_parallel_size} for --cp-comm-type a2a+p2p, got {sizes}",
        )
    else:
        require(
            sizes is None,
            f"--hierarchical-context-parallel-sizes: expected --cp-comm-type a2a+p2p, got {parallel.cp_comm_type}",
        )
    if world_size is not None:
        data_parallel_size(parallel, world_size)


def check_data_parallel(data_parallel: DataParallelConfig) -> None:
    """What needs --overlap-grad-reduce, and its range."""
    at_least(1, ddp_bucket_size=data_parallel.ddp_bucket_size)
    for name, given in (
        ("ddp_bucket_size", data_parallel.ddp_bucket_size is not None),
        ("overlap_param_gather", data_parallel.overlap_param_gather),
    ):
        require(
            data_parallel.overlap_grad_reduce is not False or not given,
            f"{flag(name)}: expected --overlap-grad-reduce with it, got --no-overlap-grad-reduce",
        )


def check_seq_length(parallel: ParallelConfig, seq_length: int) -> None:
    """That a row can be cut into the slices of the CP ranks, and those into the parts of sequence parallelism."""
    at_least(2, seq_length=seq_length)
    at_most(LARGEST_ROW, seq_length=seq_length)
    require(
        seq_length % parallel.seq_length_multiple == 0,
        f"--seq-length: expected a multiple of {parallel.seq_length_multiple} for --context-parallel-size "
        f"{parallel.context_parallel_size} (two slices a rank) and --tensor-model-parallel-size "
        f"{parallel.tensor_model_parallel_size} ({'with' if parallel.uses_sequence_parallel else 'without'} sequence "
        f"parallelism), got {seq_length}",
    )


def check_packed(
    option: str, multiple: int, parallel: ParallelConfig, *, micro_batch_size: int = 1, fp8_format: str | None = None
) -> None:
    """What packed rows, whose documents begin at multiples of `multiple` tokens, ask of a run. option: names them."""
    require(
        multiple % parallel.document_multiple == 0,
        f"{option}: packed with --pack-multiple {multiple}, expected a multiple of {parallel.document_multiple} for "
        f"--context-parallel-size {parallel.context_parallel_size} (two slices of each document a rank) and "
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}; prepare the rows again",
    )
    require(
        micro_batch_size == 1,
        f"--micro-batch-size: expected 1 with packed rows ({option}), which are a batch of documents already, got "
        f"{micro_batch_size}",
    )
    require(
        parallel.cp_comm_type == "p2p",
        f"--cp-comm-type: expected p2p with packed rows ({option}), got {parallel.cp_comm_type}",
    )
    require(fp8_format is None, f"--fp8-format: expected none with packed rows ({option}), got {fp8_format}")


def check_model_shape(
    parallel: ParallelConfig,
    *,
    num_layers: int,
    num_attention_heads: int,
    num_query_groups: int,
    ffn_hidden_size: int | None = None,
) -> None:
    """That a model of this shape can be cut as `parallel` says.

    Args:
        num_query_groups: number of key-value heads.
        ffn_hidden_size: inner width of the MLP, checked when given.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for what, count in (
        ("attention heads", num_attention_heads),
        ("MLP columns", ffn_hidden_size),
    ):
        require(
            count is None or count % tensor == 0,
            f"--tensor-model-parallel-size: expected a divisor of the model's {count} {what}, got {tensor}",
        )
    require(
        num_query_groups % tensor == 0 or tensor % num_query_groups == 0,
        f"--tensor-model-parallel-size: expected a divisor or a multiple of the model's {num_query_groups} key-value "
        f"heads, got {tensor}",
    )
    require(
        num_layers % pipeline == 0,
        f"--pipeline-model-parallel-size: expected a divisor of the model's {num_layers} layers, got {pipeline}",
    )
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    require(
        chunk is None or (num_layers // pipeline) % chunk == 0,
        f"--num-layers-per-virtual-pipeline-stage: expected a divisor of the {num_layers // pipeline} layers of a "
        f"pipeline stage, got {chunk}",
    )
    if parallel.cp_comm_type in ("a2a", "a2a+p2p"):
        sizes = parallel.hierarchical_context_parallel_sizes
        ranks = sizes[0] if sizes is not None else parallel.context_parallel_size
        for what, count in (("attention heads", num_attention_heads), ("key-value heads", num_query_groups)):
            per_rank = max(1, count // tensor)  # a key-value head is had by several ranks where there are more of these
            require(
                per_rank % ranks == 0,
                f"--cp-comm-type {parallel.cp_comm_type}: shares the {per_rank} {what} of a TP rank among {ranks} "
                f"ranks, expected a divisor of {per_rank}",
            )


def virtual_pipeline_size(parallel: ParallelConfig, num_layers: int) -> int | None:
    """Chunks of layers that each pipeline stage holds under the interleaved schedule; None without it, or with one."""
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    if chunk is None:
        return None
    size = num_layers // parallel.pipeline_model_parallel_size // chunk
    return size if size > 1 else None


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding as Megatron pads it: the next multiple of `divisible_by` x TP.

    >>> padded_vocab_size(320, 128, 2)
    512
    """
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
