"""What the null options of a run come to, in one type without them."""

from dataclasses import dataclass, replace

from megatron_tw.config import DEFAULT_KEEP_LOGITS_MIB, DataParallelConfig, ModelConfig, RunConfig, ShortWindows
from megatron_tw.data.rows import TokenRows
from megatron_tw.runtime.source import ModelSource, row_bos_id
from megatron_tw.training.scorers import reads_updated_weights
from megatron_tw.weighting.schedule import WeightingSchedule


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What options, rows, model and ranks decide together, once.

    data_parallel: with its overlaps. global_batch_size: rows of a step. loss_keep_logits_mib: 0 keeps none. model: with
    the rotary embedding's base and factor. bos_id: of the token that rows begin with, None where they begin with none.
    windows: None without --short-window. old_context: tokens of the context that the model had before.
    """

    data_parallel: DataParallelConfig
    global_batch_size: int
    loss_keep_logits_mib: int
    model: ModelConfig
    bos_id: int | None
    windows: ShortWindows | None
    old_context: int

    @staticmethod
    def decide(
        config: RunConfig, *, rows: TokenRows, source: ModelSource, schedule: WeightingSchedule, dp_size: int
    ) -> "Settings":
        """The settings of a run whose options have been checked.

        Raises:
            ValueError: --bos-id is no id of the vocabulary.
        """
        keep = config.activations.loss_keep_logits_mib
        if keep is None:
            # Forward cannot know which few targets sparse weights will choose; dense ones want every logit again.
            keep = 0 if schedule.leaves_targets_out else DEFAULT_KEEP_LOGITS_MIB
        windows = config.windows.of_rows(config.data.seq_length)
        return Settings(
            data_parallel=config.data_parallel.decided(
                dp_size * config.parallel.context_parallel_size,
                weights_used_at_once=schedule.needs_scorer and reads_updated_weights(config.scorer.scorer),
            ),
            global_batch_size=config.train.batch_size(dp_size),
            loss_keep_logits_mib=keep,
            model=source.architecture.rope_options(config.model, config.data.seq_length),
            bos_id=row_bos_id(config.data.bos_id, rows, source.architecture),
            windows=windows,
            old_context=source.old_context,
        )

    def fill_in(self, config: RunConfig) -> RunConfig:
        """The options with these in place of what was not given, as they are kept beside checkpoints."""
        windows = config.windows
        if self.windows is not None:
            windows = replace(
                windows,
                short_window=self.windows.tokens,
                short_stride=self.windows.stride,
                min_short_context=self.windows.least_context,
            )
        return replace(
            config,
            data_parallel=self.data_parallel,
            data=replace(config.data, bos_id=self.bos_id),
            model=self.model,
            activations=replace(config.activations, loss_keep_logits_mib=self.loss_keep_logits_mib),
            train=replace(config.train, global_batch_size=self.global_batch_size),
            windows=windows,
        )
