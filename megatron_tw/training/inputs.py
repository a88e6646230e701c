"""What a training run starts from: its files, opened and checked before anything is allocated."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tw.config import (
    RunConfig,
    check_config,
    check_own_windows,
    check_packed,
    data_parallel_size,
    virtual_pipeline_size,
)
from megatron_tw.data.blend import Blend
from megatron_tw.data.loader import samples_of_state
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.rows_format import TOKENIZER_DIR
from megatron_tw.evaluation.ruler.scoring import Work
from megatron_tw.model.build import check_export_target
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.runtime.opening import check_attention, check_vocabulary, read_rows
from megatron_tw.runtime.optimizer import optimizer_fields
from megatron_tw.runtime.outputs import checkpoint_bytes
from megatron_tw.runtime.run_folder import check_optimizer_shards, check_save_target, find_checkpoint
from megatron_tw.runtime.source import ModelSource, open_source, row_bos_id
from megatron_tw.runtime.wandb_run import check_wandb
from megatron_tw.training.ruler import open_ruler
from megatron_tw.training.scorers import ScorerInputs, ScorerMaker, check_scorer_options, open_scorer
from megatron_tw.training.settings import Settings
from megatron_tw.weighting.options import schedule_from_options
from megatron_tw.weighting.schedule import WeightingSchedule


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, opened and checked before anything is allocated.

    make_scorer: None where the weighting needs no scorer.
    """

    rows: Blend
    source: ModelSource
    schedule: WeightingSchedule
    settings: Settings
    make_scorer: ScorerMaker | None
    valid_rows: TokenRows | None
    tokenizer_dir: Path | None
    ruler: Work | None = None
    """RULER's examples for --eval-ruler."""


def open_inputs(config: RunConfig) -> Inputs:
    """Check the options against the world, and open data, architecture and checkpoint header.

    Raises:
        ValueError: names the option or file that does not fit.
    """
    schedule = check_options(config)
    source = open_model_source(config)
    rows, valid_rows = open_data(config, source)
    check_tokenizer(config, rows, valid_rows, source)
    settings, make_scorer = open_scoring(config, rows, source, schedule)
    tokenizer_dir = tokenizer_of(rows, source)
    return Inputs(
        rows=rows,
        source=source,
        schedule=schedule,
        settings=settings,
        make_scorer=make_scorer,
        valid_rows=valid_rows,
        tokenizer_dir=tokenizer_dir,
        ruler=open_ruler(config, tokenizer_dir) if config.train.eval_ruler else None,
    )


def check_options(config: RunConfig) -> WeightingSchedule:
    """The options with each other and with the world, and the folders that are written, as far as no file is read.
    The weighting's schedule."""
    check_config(config, dist.get_world_size())
    schedule = schedule_from_options(config.weighting, seq_length=config.data.seq_length)
    check_scorer_options(config, needed=schedule.needs_scorer)
    check_save_target(config.checkpoint.save, config.checkpoint.load)
    _check_folder("--tensorboard-dir", config.logging.tensorboard_dir)
    _check_folder("--wandb-save-dir", config.logging.wandb_save_dir)
    check_wandb(config)
    if config.checkpoint.save_hf is not None:
        check_export_target(Path(config.checkpoint.save_hf))
    optimizer_fields(config)  # refuses what is not here
    return schedule


def open_model_source(config: RunConfig) -> ModelSource:
    """The checkpoint or the folder that the run starts from. Collective over the world."""
    source = open_source(
        config.model,
        load=config.checkpoint.load,
        seq_length=config.data.seq_length,
        pretrained=config.checkpoint.pretrained_checkpoint,
        verify=config.checkpoint.verify_checkpoint,
    )
    check_attention(config.compute, source, prepare_device(), config.data.seq_length)
    if source.saved is not None and source.saved.optimizer_shards is not None:
        parallel = config.parallel
        layout = replace(  # buckets are known when they are made
            source.saved.optimizer_shards,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            model_chunks=virtual_pipeline_size(parallel, source.architecture.num_layers) or 1,
        )
        check_optimizer_shards(source.saved, layout)
    return source


def open_data(config: RunConfig, source: ModelSource | None) -> tuple[Blend, TokenRows | None]:
    """The rows of --data-path and --valid-data-path; with --load they are those that its run has gone through so far.
    source: None where the model is not known, with whose vocabulary and length they are compared."""
    length = config.data.seq_length
    folders = [read_rows("--data-path", folder, source, length) for folder in config.data.folders]
    rows = Blend(folders, config.data.weights)
    if source is not None and source.saved is not None and not source.saved.weights_only:
        order = rows.order(seed=config.train.seed, shuffle=config.data.shuffle)
        samples_of_state(source.saved.state.loader, rows, order)
    valid_rows = None
    if config.data.valid_data_path is not None:
        valid_rows = read_rows("--valid-data-path", config.data.valid_data_path, source, length)
    for option, opened in (*(("--data-path", folder) for folder in folders), ("--valid-data-path", valid_rows)):
        if opened is not None and opened.header.packing is not None:
            check_packed(
                option,
                opened.header.packing.multiple,
                config.parallel,
                micro_batch_size=config.train.micro_batch_size,
                fp8_format=config.kernels.fp8_format,
            )
    return rows, valid_rows


def check_tokenizer(config: RunConfig, rows: Blend, valid_rows: TokenRows | None, source: ModelSource) -> None:
    """That all rows and the model have one vocabulary, and that --bos-id is an id of it."""
    for part in (*rows.parts, *(() if valid_rows is None else (valid_rows,))):
        check_vocabulary(part, source)
    if valid_rows is not None:
        _check_same_tokenizer(valid_rows, rows.parts[0])
    row_bos_id(config.data.bos_id, rows.parts[0], source.architecture)


def open_scoring(
    config: RunConfig, rows: Blend, source: ModelSource, schedule: WeightingSchedule
) -> tuple[Settings, ScorerMaker | None]:
    """What options, rows and model decide together, and the scorer of --scorer, checked; None where the weighting needs
    none. Collective over the world."""
    if schedule.needs_scorer:
        config = with_window(config, source)
    settings = Settings.decide(
        config,
        rows=rows.parts[0],
        source=source,
        schedule=schedule,
        dp_size=data_parallel_size(config.parallel, dist.get_world_size()),
    )
    if not schedule.needs_scorer or settings.windows is None:
        return settings, None
    return settings, open_scorer(
        ScorerInputs(config=config, windows=settings.windows, rows=rows, bos_id=settings.bos_id, source=source)
    )


def tokenizer_of(rows: Blend, source: ModelSource) -> Path | None:
    """The folder with the tokenizer of the rows, else with the model's."""
    of_rows = rows.path / TOKENIZER_DIR
    return of_rows if of_rows.is_dir() else source.tokenizer_dir


def with_window(config: RunConfig, source: ModelSource) -> RunConfig:
    """The options with a short window: without --short-window, which --pretrained-checkpoint allows, that is the
    context that the model had before.

    Raises:
        ValueError: the rows are not longer than that.
    """
    if config.windows.short_window is not None:
        return config
    windows = replace(config.windows, short_window=source.old_context)
    try:
        check_own_windows(windows, config.data.seq_length)
    except ValueError as error:
        raise ValueError(f"{error} (the old context, without --short-window)") from error
    return replace(config, windows=windows)


def _check_folder(option: str, folder: str | None) -> None:
    """That a folder is there or can be made."""
    if folder is None:
        return
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{option} {folder}: cannot be written to: {there} is a file, or may not be written to")


def bytes_of_checkpoint(config: RunConfig, source: ModelSource) -> int:
    """What a checkpoint of the run takes on disk, about."""
    dtype = torch.bfloat16 if config.compute.bf16 else torch.float32
    average = config.scorer.scorer == "ema"
    return checkpoint_bytes(source.architecture, dtype, optimizer=True, average=average)


def outdated(inputs: Inputs, config: RunConfig) -> bool:
    """Whether --load and the folders to be written are no longer what `open_inputs` found, as rank 0 sees it.
    Collective over the world."""
    answer = [False]
    if dist.get_rank() == 0:
        checkpoint, saved = config.checkpoint, inputs.source.saved
        try:
            check_save_target(checkpoint.save, checkpoint.load)
            if checkpoint.save_hf is not None:
                check_export_target(Path(checkpoint.save_hf))
            now = find_checkpoint(checkpoint.load) if checkpoint.load is not None else None
            answer = [(now and now.directory) != (saved and saved.directory)]
        except (OSError, ValueError):  # what is wrong is said by `open_inputs`, on every rank
            answer = [True]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _check_same_tokenizer(valid_rows: TokenRows, rows: TokenRows) -> None:
    ours, theirs = (dataset.header.tokenizer for dataset in (valid_rows, rows))
    if ours is not None and theirs is not None and ours.fingerprint != theirs.fingerprint:
        raise ValueError(
            f"--valid-data-path {valid_rows.path}: rows of another tokenizer, {ours.name}, than those of --data-path, "
            f"{theirs.name}"
        )
