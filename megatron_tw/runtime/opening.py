"""How every program begins.

join_world                  this rank's device, and the launcher's world
(the program's own checks)  of its options with each other, and with the number of ranks
open_source, open_rows      files: headers only, checked
open_layout                 process groups, the first thing that is allocated
open_model                  the groups, and the model with its weights: for programs that do not train it
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tw.config import (
    ComputeConfig,
    ParallelConfig,
    ShardingConfig,
    check_fp32_attention,
    virtual_pipeline_size,
)
from megatron_tw.data.rows import TokenRows, check_rows
from megatron_tw.data.vocabulary import check_model_vocabulary
from megatron_tw.model.build import build_model
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.parallel.devices import Device, prepare_device
from megatron_tw.parallel.layout import Layout, make_layout, start_process_group
from megatron_tw.runtime.source import ModelSource


def join_world(parallel: ShardingConfig) -> Device:
    """This rank's device, after it has joined the launcher's world (see `start_process_group`)."""
    device = prepare_device()
    start_process_group(device, parallel.distributed_timeout_minutes)
    return device


def open_rows(option: str, path: str | Path, source: ModelSource, seq_length: int) -> TokenRows:
    """The rows in the folder that `option` names, checked: of `seq_length` tokens, and of the model's vocabulary.

    Raises:
        ValueError: no such rows; begins with the option.
    """
    rows = read_rows(option, path, source, seq_length)
    check_vocabulary(rows, source)
    return rows


def read_rows(option: str, path: str | Path, source: ModelSource | None, seq_length: int) -> TokenRows:
    """As `open_rows`, without the tokenizers. source: None where the model is not known."""
    with named(option):
        rows = TokenRows(path)
        check_rows(
            rows, seq_length=seq_length, model_vocab_size=None if source is None else source.architecture.vocab_size
        )
    if source is not None:
        source.architecture.check_length(seq_length, "--seq-length")
    return rows


def check_vocabulary(rows: TokenRows, source: ModelSource) -> None:
    """That the model's tokenizer, where it has one, is that of the rows (see `check_model_vocabulary`)."""
    if source.tokenizer_dir is not None:
        check_model_vocabulary(rows, source.tokenizer_dir)


def check_attention(
    compute: ComputeConfig, source: ModelSource, device: Device, tokens: int, option: str = "--seq-length"
) -> None:
    """That the attention over `tokens`, as `option` says, has a kernel here (see `check_fp32_attention`)."""
    check_fp32_attention(
        option,
        on_gpu=device.type == "cuda",
        bf16=compute.bf16,
        num_attention_heads=source.architecture.num_attention_heads,
        num_query_groups=source.architecture.num_query_groups,
        seq_length=tokens,
    )


@contextmanager
def named(option: str) -> Iterator[None]:
    """Around opening what `option` names: an error begins with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def open_layout(parallel: ParallelConfig, source: ModelSource) -> Layout:
    """The process groups for this model. Collective over the world."""
    chunks = virtual_pipeline_size(parallel, source.architecture.num_layers)
    return make_layout(parallel, num_model_chunks=chunks)


def open_model(
    source: ModelSource, parallel: ParallelConfig, compute: ComputeConfig, device: Device
) -> tuple[Layout, list[TokenWeightedGPT]]:
    """The process groups and this rank's chunks of the model, filled. Collective over the world.

    Raises:
        ValueError: a layout or layers that the model or this machine does not admit, or weights that are not there.
    """
    layout = open_layout(parallel, source)
    chunks = build_model(source.architecture, parallel, compute, layout, device)
    source.fill(chunks, layout)
    return layout, chunks
