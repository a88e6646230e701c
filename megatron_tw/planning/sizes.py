"""The sizes of a run in figures, decided from its options."""

from dataclasses import dataclass, replace

from megatron_tw.config import (
    DEFAULT_KEEP_LOGITS_MIB,
    RunConfig,
    data_parallel_size,
    num_microbatches,
    virtual_pipeline_size,
)
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.forward import num_window_groups
from megatron_tw.weighting import Window, plan_windows
from megatron_tw.weighting.options import schedule_from_options


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """The scoring pass of a run. architecture: of the scorer. windows: of a row. pipelined: whether the scorer lies
    over the pipeline's stages, else it is whole on those of the last."""

    architecture: Architecture
    windows: tuple[Window, ...]
    micro_batch: int | None
    pipelined: bool


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A run's sizes, decided.

    scoring: None where no step is scored beside the training. share: of the targets, those that weigh anything, in the
    stage of the schedule where most do. keep_logits_mib: of the loss.
    """

    config: RunConfig
    architecture: Architecture
    world_size: int
    scoring: ScoringPlan | None
    share: float
    keep_logits_mib: int

    @staticmethod
    def of(
        config: RunConfig, architecture: Architecture, world_size: int, scorer: Architecture | None = None
    ) -> "Sizes":
        """Of a run whose options have been checked. scorer: the architecture of --scorer-hf."""
        schedule = schedule_from_options(config.weighting)
        stages = [stage.scheme for stage in schedule.stages]
        dense = any(not scheme.leaves_targets_out for scheme in stages)
        shares = [scheme.numbers.get("sparsification") for scheme in stages]
        share = 1.0 if dense else max((share for share in shares if share is not None), default=1.0)
        scoring = None
        windows = config.windows.of_rows(config.data.seq_length)
        unfrozen = config.scorer.scorer == "unfrozen"
        runs = windows is not None and (windows.tokens < config.data.seq_length or not unfrozen)
        if schedule.needs_scorer and windows is not None and runs and config.scorer.scores is None:
            scoring = ScoringPlan(
                architecture=scorer or architecture,
                windows=plan_windows(
                    config.data.seq_length, windows.tokens, windows.stride, include_first=not unfrozen
                ),
                micro_batch=windows.micro_batch,
                pipelined=config.scorer.scorer_hf is None,
            )
        keep = config.activations.loss_keep_logits_mib
        if keep is None:
            keep = 0 if schedule.leaves_targets_out else DEFAULT_KEEP_LOGITS_MIB
        return Sizes(
            config=config,
            architecture=architecture,
            world_size=world_size,
            scoring=scoring,
            share=share,
            keep_logits_mib=keep,
        )

    @property
    def copies(self) -> int:
        return data_parallel_size(self.config.parallel, self.world_size)

    @property
    def rows(self) -> int:
        return self.config.train.batch_size(self.copies)

    @property
    def microbatches(self) -> int:
        return num_microbatches(self.config.train, self.config.parallel, self.world_size)

    @property
    def chunks(self) -> int:
        return virtual_pipeline_size(self.config.parallel, self.architecture.num_layers) or 1

    @property
    def local_tokens(self) -> int:
        """S."""
        train = self.config.train
        return train.micro_batch_size * self.config.data.seq_length // self.config.parallel.context_parallel_size

    @property
    def bytes_of_a_number(self) -> int:
        return 2 if self.config.compute.bf16 else 4

    @property
    def of_scorer(self) -> "Sizes":
        """The same with the shape of the model that scores, for what a layer of it holds and sends."""
        return self if self.scoring is None else replace(self, architecture=self.scoring.architecture)

    @property
    def scoring_stages(self) -> int:
        """Pipeline stages that the scorer lies over."""
        pipelined = self.scoring is not None and self.scoring.pipelined
        return self.config.parallel.pipeline_model_parallel_size if pipelined else 1

    @property
    def scoring_layers(self) -> float:
        """Of a rank that scores: all of a scorer that lies on the last stage alone, else those of a stage."""
        return 0.0 if self.scoring is None else self.scoring.architecture.num_layers / self.scoring_stages

    @property
    def windows_of_a_rank(self) -> int:
        """Windows of a row that the busiest sub-group runs."""
        if self.scoring is None:
            return 0
        groups = num_window_groups(len(self.scoring.windows), self.config.parallel.context_parallel_size)
        return -(-len(self.scoring.windows) // groups)

    @property
    def scoring_microbatches(self) -> int:
        """Forward passes of the scoring pass on the busiest rank, of a whole step."""
        windows = self.windows_of_a_rank * self.rows // self.copies
        assert self.scoring is not None or not windows
        at_once = self.scoring.micro_batch if self.scoring is not None else None
        return -(-windows // (at_once or max(1, self.windows_of_a_rank)))
