"""One rank of a training run, simulated: the real `Run.start` and the real training step, on tensors without data.

`simulate` takes the place of one rank of a job of any size, in one process on a CPU: its process groups are fake (every
collective is over at once), its tensors in floating point are fake, and what it allocates, multiplies and sends is
counted on the way (recorder.py). stand_ins.py lists what it does otherwise than a real rank.
"""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_tw.config import (
    KernelConfig,
    OptimizationConfig,
    ParallelConfig,
    RunConfig,
    data_parallel_size,
    num_microbatches,
)
from megatron_tw.config.options import flag
from megatron_tw.data.loader import Batch, Loader
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.build import build_model
from megatron_tw.objective import StepReport
from megatron_tw.parallel.devices import Device, prepare_device
from megatron_tw.parallel.layout import Layout
from megatron_tw.planning import stand_ins
from megatron_tw.planning.extrapolation import Counted, LayerPlan, MicrobatchPlan, in_words
from megatron_tw.planning.ledger import peaks, thinned
from megatron_tw.planning.made_up import make_up_inputs
from megatron_tw.planning.record import Simulation
from megatron_tw.planning.recorder import Recorder
from megatron_tw.planning.saved import SavedByLayer
from megatron_tw.runtime.opening import open_layout
from megatron_tw.training import loop
from megatron_tw.training.loop import Run
from megatron_tw.weighting.schedule import WeightingSchedule

LAYERS = "this project's own layers"
Group = TypeVar("Group", ParallelConfig, KernelConfig, OptimizationConfig)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank of a training run to simulate.

    config: of the run; paths in it are not opened. architecture: of the model; no weights are read. on_gpu: take the
    branches (chunk sizes, attention, fusions) that a GPU takes, else a CPU's. old_context: tokens of the context that
    the model had before, None: as its architecture says. scorer_architecture: of the model of --scorer-hf.
    all_microbatches, all_layers: simulate every one, where the least number that tells all of them would do.
    """

    config: RunConfig
    architecture: Architecture
    world_size: int
    rank: int
    on_gpu: bool = True
    old_context: int | None = None
    scorer_architecture: Architecture | None = None
    all_microbatches: bool = False
    all_layers: bool = False


def simulate(job: Job) -> Simulation:
    """Simulate the second step of one rank, in this process, which is good for nothing else afterwards.

    Raises:
        ValueError: options that contradict each other, the model or the number of ranks; names the option.
    """
    started = time.perf_counter()
    warnings.filterwarnings("ignore", module="torch|megatron")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config, left_out = with_own_layers(job.config)
    device = _join_fake_world(job)
    inputs = make_up_inputs(
        config,
        job.architecture,
        world_size=job.world_size,
        old_context=job.old_context,
        scorer_architecture=job.scorer_architecture,
    )
    iteration = most_costly_iteration(inputs.schedule, config.train.train_iters)
    microbatches = MicrobatchPlan.of(
        config.parallel,
        num_microbatches(config.train, config.parallel, job.world_size),
        everything=job.all_microbatches,
    )
    layers = LayerPlan.of(job.architecture, config.parallel, config.activations, everything=job.all_layers)
    recorder = Recorder()
    layout = open_layout(config.parallel, inputs.source)
    stand_ins.answer_for_other_ranks()
    stand_ins.do_without_numbers(share_with_weight(inputs.schedule, iteration))
    if job.on_gpu:
        stand_ins.take_branches_of_gpu(recorder)
    _watch_schedules(recorder)
    models = []
    for number in layers.simulated:
        source = inputs.source
        architecture, parallel = layers.smaller(number, source.architecture, config.parallel)
        smaller = replace(inputs, source=replace(source, architecture=architecture))
        recorder.start_over()
        with recorder.fake, recorder:
            loop.build_model = _naming_weights(recorder)
            run = Run.start(replace(config, parallel=parallel), smaller, layout, device)
            if job.on_gpu:
                stand_ins.fuse_optimizer(run.step.optimizer)
            saved = SavedByLayer(run.chunks[-1].decoder.layers[-1], config.activations.recompute_num_layers or 1)
            models.append(microbatches.in_full(_run_steps(recorder, run, microbatches, iteration)))
            del run
    result = layers.in_full(models)
    return Simulation(
        rank=job.rank,
        place=place(layout),
        layers=LAYERS + (f"; not simulated: {', '.join(left_out)}" if left_out else ""),
        peak=max(result.peaks.values(), key=lambda moment: moment.total),
        peak_by_phase=result.peaks,
        timeline=result.timeline,
        flops=result.flops,
        collectives=result.collectives,
        saved_by_layer=saved.bytes,
        seconds=time.perf_counter() - started,
        extrapolated=in_words(microbatches, layers),
    )


def with_own_layers(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The options without what Transformer Engine or Apex computes, or a GPU's host keeps, nor what depends on that,
    and the flags of what was asked for of it."""
    own = replace(
        config,
        parallel=_reset(config.parallel, "cp_comm_type", "hierarchical_context_parallel_sizes"),
        compute=replace(config.compute, transformer_impl="local"),
        kernels=_reset(config.kernels, "gradient_accumulation_fusion", "rope_fusion", "tp_comm_", "fp8_"),
        optimizer=_reset(
            config.optimizer,
            *("use_precision_aware_optimizer", "optimizer_cpu_offload", "optimizer_offload_fraction"),
            *("main_grads_dtype", "main_params_dtype", "exp_avg_"),
        ),
    )
    changed = [
        flag(field.name)
        for group in ("parallel", "kernels", "optimizer")
        for before, after in [(getattr(config, group), getattr(own, group))]
        for field in fields(before)
        if getattr(before, field.name) not in (getattr(after, field.name), False)
    ]
    return own, ["--transformer-impl"] * (config.compute.transformer_impl == "transformer_engine") + changed


def _reset(group: Group, *beginnings: str) -> Group:
    """The options, those whose names begin so at their defaults."""
    defaults: dict[str, Any] = {
        field.name: field.default for field in fields(group) if field.name.startswith(beginnings)
    }
    return replace(group, **defaults)


def _join_fake_world(job: Job) -> Device:
    """This process as one rank of a world in which nobody else is."""
    # Registers the backend "fake".
    import torch.testing._internal.distributed.fake_pg

    prepare_device()
    dist.init_process_group("fake", store=dist.HashStore(), rank=job.rank, world_size=job.world_size)
    return Device("cuda" if job.on_gpu else "cpu", "fake", torch.device("cpu"))


def place(layout: Layout) -> str:
    """A rank's place in words."""
    stage = ""
    if layout.pp_size > 1:
        ends = {0: "first stage", layout.pp_size - 1: "last stage"}
        stage = ends.get(layout.pp_rank, f"stage {layout.pp_rank + 1} of {layout.pp_size}") + ", "
    return f"{stage}TP {layout.tp_rank}, CP {layout.cp_rank}, DP {layout.dp_rank}"


def most_costly_iteration(schedule: WeightingSchedule, train_iters: int) -> int:
    """A step of the stage that takes most: with a scorer rather than without, and with weight on every target rather
    than on some."""
    begins = sorted({min(stage.step, train_iters - 1) for stage in schedule.stages} | {train_iters - 1})
    return max(
        begins, key=lambda step: (schedule.at(step).needs_scorer, not schedule.at(step).leaves_targets_out, step)
    )


def share_with_weight(schedule: WeightingSchedule, iteration: int) -> float:
    """Of a row's targets those that get a weight: the sparsification, else all of them."""
    scheme = schedule.at(iteration)
    share = scheme.numbers.get("sparsification") if scheme.leaves_targets_out else None
    return 1.0 if share is None else share


def ranks_to_simulate(config: RunConfig, architecture: Architecture, world_size: int) -> list[int]:
    """The ranks whose figures bound those of all others: of the first and of the last pipeline stage the one that is
    first in every other respect, for context-parallel rank 0 scores most windows."""
    data_parallel_size(config.parallel, world_size)
    pp = config.parallel.pipeline_model_parallel_size
    # Megatron-Core's order: tp, cp, dp, pp; neighbouring ranks differ in the first.
    return [0] if pp == 1 else [0, world_size // pp * (pp - 1)]


def _naming_weights(recorder: Recorder) -> Callable[..., Any]:
    """`build_model`, which says what the weights are for before they move into buffers."""

    def build(*args: Any, **kwargs: Any) -> Any:
        chunks = build_model(*args, **kwargs)
        for chunk in chunks:
            recorder.ledger.name(chunk.parameters(), "parameters")
        return chunks

    return build


def _name_storages(recorder: Recorder, run: Run) -> None:
    """What the storages are for that live as long as the run."""
    ledger = recorder.ledger
    for wrapped in run.step.model:
        buffers: Any = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
        ledger.name((buffer.grad_data for buffer in buffers), "gradients")
    for chunk in [*run.chunks, *(getattr(run.step.scorer, "model", None) or [])]:
        ledger.name(chunk.parameters(), "parameters")
    _name_optimizer(recorder, run)


def _name_optimizer(recorder: Recorder, run: Run) -> None:
    weights = {parameter.untyped_storage()._cdata for chunk in run.chunks for parameter in chunk.parameters()}
    optimizer: Any = run.step.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        mains = [parameter for group in inner.param_groups for parameter in group["params"]]
        state = [value for entry in inner.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
        # In fp32 the main weights are views of the weights themselves.
        recorder.ledger.name((x for x in mains + state if x.untyped_storage()._cdata not in weights), "optimizer")


def _window_group(run: Run) -> dist.ProcessGroup | None:
    return getattr(getattr(run.step.scorer, "windows", None), "group", None)


def _watch_schedules(recorder: Recorder) -> None:
    """Have the passes of all pipeline schedules tell the recorder where it is."""
    from megatron.core.pipeline_parallel import schedules

    schedules.forward_step = recorder.in_phase("forward", schedules.forward_step)
    schedules.backward_step = recorder.in_phase("backward", schedules.backward_step)


def _watch_step(recorder: Recorder, run: Run) -> None:
    """The same for the other parts of a step."""
    step: Any = run.step
    step.optimizer.step = recorder.in_phase("optimizer", step.optimizer.step)
    if step.scorer is not None:
        step.scorer.short_nll = recorder.in_phase("scoring", step.scorer.short_nll, after="forward")
        step.scorer.after_update = recorder.in_phase("optimizer", step.scorer.after_update)


class _Report(StepReport):
    """The report of a step whose numbers are none."""

    def metrics(self, sums: Sequence[float], *, scored: bool) -> dict[str, Any]:
        return super().metrics(sums, scored=scored) | {"nonfinite": 0.0}


def _run_steps(recorder: Recorder, run: Run, plan: MicrobatchPlan, iteration: int) -> list[Counted]:
    """A first step, after which the optimizer has its state, then one for each number of micro-batches of the plan."""
    ledger, steps = recorder.ledger, []
    _name_storages(recorder, run)
    recorder.communication.know(run.layout, _window_group(run))
    _watch_step(recorder, run)
    run.step.report = _Report(run.step.report.edges, run.step.report.old_context)
    build_end = ledger.mark()
    ledger.phase = "forward"
    run.step(_batches(run, plan.first), iteration)
    _name_optimizer(recorder, run)
    recorder.take_flops()
    recorder.communication.take()
    built = peaks(ledger.moments(0, build_end))
    for number in plan.simulated:
        start = ledger.mark()
        ledger.phase = "forward"
        run.step(_batches(run, number), iteration)
        moments = ledger.moments(start, ledger.mark())
        steps.append(
            Counted(
                peaks=built | peaks(moments),
                timeline=thinned(moments),
                flops=recorder.take_flops(),
                collectives=recorder.communication.take(),
            )
        )
    return steps


def _batches(run: Run, number: int) -> list[Batch]:
    """This rank's micro-batches of a step of `number`."""
    layout, size = run.layout, run.config.train.micro_batch_size
    rows = run.inputs.rows
    make = partial(Loader, rows, rows.order(seed=0, shuffle=False))
    return next(
        make(
            global_batch_size=number * size * layout.dp_size,
            micro_batch_size=size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
    )
