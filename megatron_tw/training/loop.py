"""A training run from its options to its last checkpoint."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tw.config import RunConfig
from megatron_tw.data.loader import Batch, Loader
from megatron_tw.model.build import build_model, save_hf
from megatron_tw.objective.report import StepReport
from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.contact import now_at
from megatron_tw.parallel.devices import Device, device_name
from megatron_tw.parallel.gpus import gpu_of
from megatron_tw.parallel.heartbeat import watched
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.checkpoint import UnfinishedCheckpoint, begin_checkpoint, save_checkpoint
from megatron_tw.runtime.checksums import seal
from megatron_tw.runtime.determinism import be_deterministic
from megatron_tw.runtime.exits import CTRL_C, Exits
from megatron_tw.runtime.lock import FolderLock
from megatron_tw.runtime.metrics import MetricsLog
from megatron_tw.runtime.opening import join_world, open_layout
from megatron_tw.runtime.optimizer import (
    gather_weights,
    make_optimizer,
    make_scheduler,
    use_options,
    wrap_for_training,
)
from megatron_tw.runtime.outputs import hold_export, hold_run
from megatron_tw.runtime.profiling import StepProfiler
from megatron_tw.runtime.run_folder import RunState, begin_again
from megatron_tw.runtime.saver import Saver
from megatron_tw.runtime.wandb_run import open_wandb
from megatron_tw.training.bad_steps import BadStepError, BadSteps
from megatron_tw.training.description import consumed_by_folder, describe_origin, describe_run
from megatron_tw.training.flops import StepFlops, rates
from megatron_tw.training.inputs import Inputs, bytes_of_checkpoint, open_inputs, outdated
from megatron_tw.training.ruler import ruler_metrics
from megatron_tw.training.scorers import TrainedModel
from megatron_tw.training.step import TrainingStep
from megatron_tw.training.validation import Validation


def train(config: RunConfig) -> "Run":
    """Run `config` to --train-iters (or --exit-interval), resuming from --load, and return the run. Called on every
    rank of the launcher's world.

    Raises:
        ValueError: bad options or files, named; before anything is allocated.
    """
    begun = time.monotonic()
    if config.kernels.deterministic_mode:
        be_deterministic()
    device = join_world(config.parallel)
    with watched(config.faults.hang_timeout_in_mins):
        return _train(config, device, begun)


def _train(config: RunConfig, device: Device, begun: float) -> "Run":
    inputs = open_inputs(config)
    dtype = torch.bfloat16 if config.compute.bf16 else torch.float32
    architecture = inputs.source.architecture
    with (
        hold_run(config.checkpoint.save, bytes_of_checkpoint(config, inputs.source)) as lock,
        hold_export(config.checkpoint.save_hf, architecture, dtype) as export_lock,
    ):
        if outdated(inputs, config):  # another run ended while this one waited for the folder
            inputs = open_inputs(config)
        wandb_run = _open_wandb(config)
        run = Run.start(config, inputs, open_layout(config.parallel, inputs.source), device)
        run.lock, run.export_lock, run.wandb, run.begun = lock, export_lock, wandb_run, begun
        run.train()
    return run


def _open_wandb(config: RunConfig) -> Any:
    """Rank 0's run in W&B, before anything is allocated. Collective over the world."""
    opened, error = None, None
    if dist.get_rank() == 0:
        try:
            opened = open_wandb(config)
        except ValueError as refused:
            error = refused
    raise_together(error)
    return opened


@dataclass(kw_only=True)
class Run:
    """A training run that is set up: model, optimizer, data and how far it has come.

    lock, export_lock: rank 0's, of --save and --save-hf; None on the others, and where nobody else can write there.
    wandb: rank 0's run in W&B, with --wandb-project. interrupted: whether Ctrl-C ended it. kept: the checkpoint that
    holds the weights as they are now, if there is one. begun: when the program did, by time.monotonic.
    """

    config: RunConfig
    inputs: Inputs
    layout: Layout
    chunks: list[Any]
    step: TrainingStep
    loader: Loader
    validation: Validation | None
    iteration: int = 0
    lock: FolderLock | None = None
    export_lock: FolderLock | None = None
    wandb: Any = None
    interrupted: bool = False
    kept: Path | None = None
    begun: float = field(default_factory=time.monotonic)

    @staticmethod
    def start(config: RunConfig, inputs: Inputs, layout: Layout, device: Device) -> "Run":
        """Build the model, fill it from the checkpoint or the Hugging Face folder, make optimizer, scorer and
        loader."""
        source, settings = inputs.source, inputs.settings
        config = settings.fill_in(config)
        chunks = build_model(
            source.architecture,
            config.parallel,
            config.compute,
            layout,
            device,
            activations=config.activations,
            kernels=config.kernels,
            tokens=config.train.micro_batch_size * config.data.seq_length // layout.cp_size,
            keep_logits_mib=settings.loss_keep_logits_mib,
        )
        parallel_load = config.checkpoint.ckpt_fully_parallel_load
        if source.saved is None:
            source.fill(chunks, layout, parallel_load=parallel_load)
        model = wrap_for_training(chunks, config)
        optimizer = make_optimizer(model, config)
        scheduler = make_scheduler(optimizer, config)
        scorer = None
        if inputs.make_scorer is not None:
            scorer = inputs.make_scorer(TrainedModel(model=model, chunks=chunks, layout=layout, device=device))
        loader = Loader(
            inputs.rows,
            inputs.rows.order(seed=config.train.seed, shuffle=config.data.shuffle),
            global_batch_size=settings.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
        iteration, bad_steps = 0, BadSteps(config.faults)
        if source.saved is not None:
            source.fill(chunks, layout, optimizer, scheduler, scorer, parallel_load=parallel_load)
            if scorer is not None and not source.saved.scorer_state:
                scorer.start_over()
            if source.saved.weights_only:
                optimizer.reload_model_params()
            else:
                use_options(optimizer, config.optimizer)
                scheduler.step(increment=0)
                loader.load_state_dict(source.saved.state.loader)
                bad_steps.load_state_dict(source.saved.state.bad_steps)
                iteration = source.saved.state.iteration
        step = TrainingStep(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            layout=layout,
            device=device,
            schedule=inputs.schedule,
            scorer=scorer,
            report=StepReport.of_rows(
                config.data.seq_length,
                settings.old_context,
                cp_size=layout.cp_size,
                loss_shards=config.parallel.loss_shards,
            ),
            flops=StepFlops(source.architecture, settings.fill_in(config)),
            seed=config.train.seed,
            bad_steps=bad_steps,
        )
        return Run(
            config=config,
            inputs=inputs,
            layout=layout,
            chunks=chunks,
            step=step,
            loader=loader,
            validation=Validation.create(config, settings, inputs.valid_rows, layout=layout, device=device),
            iteration=iteration,
            kept=source.saved.directory if source.saved is not None else None,
        )

    def train(self) -> None:
        """Step until the run ends, saving as it goes."""
        config, last, clock = self.config, self.config.train.train_iters, self.step.clock
        profiler = StepProfiler(config.logging, config.checkpoint.save, self.layout.rank)
        log = self._open_log()
        try:
            with Exits(config.train, self.step.device, self.begun) as exits, self._saver(log) as saver:
                while self.iteration < last:
                    now_at(f"step {self.iteration + 1}")
                    with clock.part("checkpoint"):
                        saver.look()
                    with clock.part("data"):
                        batches = next(self.loader)
                    profiler.before(self.iteration)
                    try:
                        metrics = self.step(batches, self.iteration)
                    except BadStepError:  # on every rank
                        saver.finish()
                        raise
                    self.iteration += 1
                    profiler.after(self.iteration)
                    self.kept = None
                    if self.validation is not None and (
                        self.iteration % self.validation.interval == 0 or self.iteration == last
                    ):
                        now_at(f"the held-out rows after step {self.iteration}")
                        with clock.part("evaluation"):
                            metrics |= self._evaluate()
                    metrics |= clock.metrics()
                    if config.logging.log_row_ids:
                        metrics["row_ids"] = self._row_ids(batches)
                    skipped = metrics.pop("skipped")
                    if log is not None:
                        log.write(self._with_run_metrics(metrics))
                        if skipped is not None:
                            in_a_row, most = self.step.bad_steps.in_a_row, config.faults.max_bad_steps
                            log.say(f"step {self.iteration}: skipped, {in_a_row} in a row of at most {most}: {skipped}")
                    reason = exits.reason(self.iteration)
                    interval = config.checkpoint.save_interval
                    due = interval is not None and self.iteration % interval == 0
                    if config.checkpoint.save is not None and (due or reason or self.iteration == last):
                        now_at(f"the checkpoint of step {self.iteration}")
                        if log is not None:
                            log.flush()
                        with clock.part("checkpoint"):
                            saver.save(self.begin_checkpoint)
                        reason = reason or exits.reason(self.iteration)  # a signal that came while it was written
                    if reason or self.iteration == last:
                        saver.finish()
                        self.kept = saver.newest
                    if reason:
                        self.interrupted = reason == CTRL_C
                        if log is not None:
                            log.say(f"stopped after step {self.iteration} of {last}: {reason}")
                        break
        finally:
            profiler.close(self.iteration)
            if log is not None:
                log.close()
        if config.checkpoint.save_hf is not None and self.iteration >= last:
            now_at("the export")
            self._export(config.checkpoint.save_hf)

    def _evaluate(self) -> dict[str, Any]:
        """Metrics of the held-out rows and of RULER."""
        assert self.validation is not None
        metrics = self.validation.metrics(self.step.model)
        if self.inputs.ruler is not None:
            metrics |= ruler_metrics(self.inputs.ruler, self.step.model, self.config, self.layout, self.step.device)
        return metrics

    def _open_log(self) -> MetricsLog | None:
        if not self.layout.reports:
            return None
        config = self.config
        save = Path(config.checkpoint.save) if config.checkpoint.save is not None else None
        begun_again = begin_again(save) if save is not None and self.iteration == 0 else []
        log = MetricsLog(
            save,
            config.tensorboard_dir,
            start_iteration=self.iteration,
            train_iters=config.train.train_iters,
            log_interval=config.logging.log_interval,
            wandb=self.wandb,
        )
        origin = describe_origin(config, self.inputs, self.layout, self.iteration)
        run = describe_run(config, self.inputs, self.layout, self.loader.consumed_samples)
        for line in origin + begun_again + run:
            log.say(line)
        return log

    def _with_run_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        tokens, by_position = metrics.pop("tokens"), metrics.pop("by_position")
        if self.iteration % self.config.logging.log_interval == 0 or self.iteration == self.config.train.train_iters:
            metrics["by_position"] = by_position
        rows, consumed = self.inputs.rows, self.loader.consumed_samples
        by_folder = {"consumed_samples_by_folder": consumed_by_folder(rows, consumed)} if len(rows.parts) > 1 else {}
        return {
            "iteration": self.iteration,
            **metrics,
            "consumed_samples": consumed,
            **by_folder,
            "world_size": self.layout.world_size,
            "tokens_per_second": tokens / metrics["step_seconds"],
            **rates(metrics["model_flops"], metrics["step_seconds"], self.layout.world_size, gpu_of(device_name())),
        }

    def _row_ids(self, batches: list[Batch]) -> list[int]:
        """The rows of a step, as samples follow each other. Collective over data-parallel ranks."""
        everywhere: list[list[list[int]]] = [[]] * self.layout.dp_size
        mine = [batch.row_index.tolist() for batch in batches]
        dist.all_gather_object(everywhere, mine, group=self.layout.dp_group)
        return [row for of_ranks in zip(*everywhere, strict=True) for rows in of_ranks for row in rows]

    def _state(self) -> RunState:
        return RunState(
            iteration=self.iteration,
            consumed_samples=self.loader.consumed_samples,
            seq_length=self.config.data.seq_length,
            old_context=self.inputs.source.old_context,
            loader=self.loader.state_dict(),
            bad_steps=self.step.bad_steps.state_dict(),
            scores=self.step.scorer.fingerprint if self.step.scorer is not None else None,
        )

    def _saver(self, log: MetricsLog | None) -> Saver:
        saved = self.inputs.source.saved
        return Saver(
            options=self.config.checkpoint,
            needed=frozenset({saved.directory.resolve()} if saved is not None else ()),
            say=log.say if log is not None else lambda text: None,
        )

    def begin_checkpoint(self) -> UnfinishedCheckpoint:
        """Write the files of a checkpoint of the run as it is now (see `begin_checkpoint`)."""
        gather_weights(self.step.model)
        options = self.config.checkpoint
        assert options.save is not None
        return begin_checkpoint(
            options.save,
            self.chunks,
            self._state(),
            self.layout,
            lock=self.lock,
            optimizer=self.step.optimizer,
            scheduler=self.step.scheduler,
            scorer=self.step.scorer,
            config=self.config,
            tokenizer_dir=self.inputs.tokenizer_dir,
            for_any_layout=options.dist_ckpt_optim_fully_reshardable,
            expected_bytes=bytes_of_checkpoint(self.config, self.inputs.source),
            beside=options.async_save,
        )

    def _export(self, save_hf_dir: str) -> None:
        """Write --save-hf. Where that fails, the weights are in a checkpoint, and the error says how to export them."""
        gather_weights(self.step.model)
        try:
            save_hf(
                self.chunks,
                save_hf_dir,
                self.inputs.source.architecture,
                self.layout,
                max_position_embeddings=self.config.data.seq_length,
                tokenizer_dir=self.inputs.tokenizer_dir,
                still_ours=self.export_lock.check if self.export_lock is not None else None,
                seal=seal,
            )
        except (OSError, ValueError) as error:  # the same on every rank
            kept = self.kept or self._keep(Path(f"{save_hf_dir}.checkpoint"))
            raise OSError(
                f"--save-hf {save_hf_dir}: could not be written: {error}; the weights are kept, export them with: "
                f"python tools/convert_checkpoint.py --load {kept} --save-hf {save_hf_dir}"
            ) from error
        if self.layout.reports:
            print(f"exported: {save_hf_dir}", flush=True)

    def _keep(self, folder: Path) -> Path:
        """A checkpoint of the weights in `folder`; where that cannot be written either (a disk that is full), in the
        current directory, or in the one for temporary files.

        Raises:
            OSError: in none of them.
        """
        places = [[folder.absolute(), Path.cwd() / folder.name, Path(tempfile.gettempdir()) / folder.name]]
        dist.broadcast_object_list(places, src=0)
        failed: OSError | None = None
        for place in places[0]:
            try:
                save_checkpoint(place, self.chunks, self._state(), self.layout, tokenizer_dir=self.inputs.tokenizer_dir)
                return place
            except OSError as error:  # the same on every rank
                failed = error
        assert failed is not None
        raise failed
