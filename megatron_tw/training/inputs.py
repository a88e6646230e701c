"""What a training run starts from: its files, opened and checked before anything is allocated."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_tw.config import DEFAULT_KEEP_LOGITS_MIB, RunConfig, check_config, check_scorer
from megatron_tw.data.rows import TOKENIZER_DIR, TokenRows, check_rows
from megatron_tw.data.scores import ScoreRows
from megatron_tw.data.vocabulary import check_model_vocabulary
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.build import check_export_target
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.run_folder import check_save_target, find_checkpoint
from megatron_tw.runtime.source import ModelSource, open_source, row_bos_id
from megatron_tw.training.scorers import open_live_scorer, open_scores
from megatron_tw.weighting.options import check_tail, schedule_from_options
from megatron_tw.weighting.schedule import WeightingSchedule


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, opened and checked before anything is allocated."""

    rows: TokenRows
    source: ModelSource
    schedule: WeightingSchedule
    scores: ScoreRows | None
    valid_rows: TokenRows | None
    tokenizer_dir: Path | None


def open_inputs(config: RunConfig) -> Inputs:
    """Check the options against the world, and open data, architecture and checkpoint header.

    Raises:
        ValueError: names the option or file that does not fit.
    """
    check_config(config, dist.get_world_size())
    schedule = schedule_from_options(config.weighting)
    check_scorer(config.scorer, needed=schedule.needs_scorer)
    check_tail(schedule, config.data.seq_length)
    check_save_target(config.checkpoint.save, config.checkpoint.load)
    if config.checkpoint.save_hf is not None:
        check_export_target(Path(config.checkpoint.save_hf))
    source = open_source(
        load=config.checkpoint.load,
        load_hf=config.model.load_hf,
        rotary_base=config.model.rotary_base,
        verify=config.checkpoint.verify_checkpoint,
    )
    rows = _open_rows("--data-path", config.data.data_path, config, source.architecture)
    row_bos_id(config.data.bos_id, rows, source.architecture)
    if source.tokenizer_dir is not None:
        check_model_vocabulary(rows, source.tokenizer_dir)
    valid_rows = None
    if config.data.valid_data_path is not None:
        valid_rows = _open_rows("--valid-data-path", config.data.valid_data_path, config, source.architecture)
        _check_same_tokenizer(valid_rows, rows)
    if schedule.needs_scorer and config.scorer.scorer_hf is not None:
        open_live_scorer(config.scorer.scorer_hf, config.parallel, rows, source.architecture)
    scores = open_scores(config, rows, source.architecture) if schedule.needs_scorer else None
    if (
        source.saved is not None
        and scores is not None
        and source.saved.state.scores not in (None, scores.header.fingerprint)
    ):
        raise ValueError(f"--scores {scores.path}: other scores than those that the run of --load was trained with")
    tokenizer_dir = rows.path / TOKENIZER_DIR
    return Inputs(
        rows=rows,
        source=source,
        schedule=schedule,
        scores=scores,
        valid_rows=valid_rows,
        tokenizer_dir=tokenizer_dir if tokenizer_dir.is_dir() else source.tokenizer_dir,
    )


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
        except ValueError:
            answer = [True]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def resolve(config: RunConfig, inputs: Inputs, layout: Layout) -> RunConfig:
    """The options with those filled in that model, rows and layout decide where they are not given."""
    data, model, train, scorer = config.data, config.model, config.train, config.scorer
    keep = model.loss_keep_logits_mib
    if keep is None:
        # Forward cannot know which few targets sparse weights will choose; dense ones want every logit again.
        keep = 0 if inputs.schedule.leaves_targets_out else DEFAULT_KEEP_LOGITS_MIB
    if scorer.short_window is not None:
        scorer = replace(scorer, short_stride=scorer.stride(data.seq_length), min_short_context=scorer.least_context)
    return replace(
        config,
        data=replace(data, bos_id=row_bos_id(data.bos_id, inputs.rows, inputs.source.architecture)),
        model=replace(model, rotary_base=inputs.source.architecture.rotary_base, loss_keep_logits_mib=keep),
        train=replace(train, global_batch_size=train.global_batch_size or train.micro_batch_size * layout.dp_size),
        scorer=scorer,
    )


def _open_rows(option: str, path: str, config: RunConfig, architecture: Architecture) -> TokenRows:
    try:
        rows = TokenRows(path)
        check_rows(rows, seq_length=config.data.seq_length, model_vocab_size=architecture.vocab_size)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    return rows


def _check_same_tokenizer(valid_rows: TokenRows, rows: TokenRows) -> None:
    ours, theirs = (dataset.header.tokenizer for dataset in (valid_rows, rows))
    if ours is not None and theirs is not None and ours.fingerprint != theirs.fingerprint:
        raise ValueError(
            f"--valid-data-path {valid_rows.path}: rows of another tokenizer, {ours.name}, than those of --data-path, "
            f"{theirs.name}"
        )
