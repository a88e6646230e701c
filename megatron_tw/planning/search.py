"""Layouts of a run on a number of GPUs: those that fit by formula, ranked by the roofline time of a step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_tw.config import (
    ActivationConfig,
    DataParallelConfig,
    ParallelConfig,
    RunConfig,
    check_config,
    check_model_shape,
)
from megatron_tw.model.architecture import Architecture
from megatron_tw.planning.formulas import flops_of_a_rank, memory_of, scoring_bytes, training_bytes
from megatron_tw.planning.plan import layout_in_words, takes_transformer_engine
from megatron_tw.planning.roofline import Cluster, phase_times
from megatron_tw.planning.sizes import Sizes
from megatron_tw.planning.traffic import collectives_of, elementwise_bytes

MICRO_BATCHES = (1, 2, 4)
MOST_STAGES = 16
ESTIMATE_ERROR = 0.05
"""By which a layout may be estimated too small or too large: it is still simulated if it fits within that."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, estimated: seconds of a step, and bytes of the rank that needs most."""

    sizes: Sizes
    seconds: float
    bytes: float

    @property
    def axes(self) -> ParallelConfig:
        return self.sizes.config.parallel


def candidates(
    config: RunConfig,
    architecture: Architecture,
    cluster: Cluster,
    *,
    scorer: Architecture | None,
    fixed: float,
    share: float,
) -> list[Candidate]:
    """Layouts whose estimate fits, or may, the fastest first. fixed, share: bytes to add to a peak, and of it.

    Raises:
        ValueError: there is none; says what the smallest needs, or that none divides the GPUs.
    """
    memory, found, smallest = cluster.gpu.memory_bytes, [], None
    given = Sizes.of(config, architecture, cluster.world_size, scorer)
    for variant in _variants(config, architecture, cluster):
        sizes = with_windows_that_fit(replace(given, config=variant))
        needed = memory_of(sizes).total * (1 + share) + fixed
        if smallest is None or needed < smallest[0]:
            smallest = needed, layout_in_words(sizes)
        if needed <= memory * (1 + ESTIMATE_ERROR):
            found.append(Candidate(sizes=sizes, seconds=estimated_seconds(sizes, cluster), bytes=needed))
    if smallest is None:
        raise ValueError(
            f"--find-layout: no layout divides --world-size {cluster.world_size}, the model's shape, --seq-length "
            f"{config.data.seq_length} and --global-batch-size {config.train.global_batch_size}"
        )
    if not found:
        raise ValueError(
            f"--find-layout: no layout fits {memory / 1e9:.1f} GB on --world-size {cluster.world_size}: the smallest, "
            f"{smallest[1]}, needs about {smallest[0] / 1e9:.1f} GB"
        )
    return sorted(found, key=lambda candidate: candidate.seconds)


def best_of_each(found: list[Candidate], cluster: Cluster) -> list[Candidate]:
    """Of the layouts with the same axes the fastest that fits by its estimate, and then those that only may."""
    chosen: dict[ParallelConfig, Candidate] = {}
    fitting = [candidate for candidate in found if candidate.bytes <= cluster.gpu.memory_bytes]
    for candidate in fitting + sorted(found, key=lambda candidate: candidate.bytes):
        chosen.setdefault(candidate.axes, candidate)
    return list(chosen.values())


def with_windows_that_fit(sizes: Sizes) -> Sizes:
    """The same, with windows scored one after the other where all of a rank at once would need more memory than the
    training itself."""
    if sizes.scoring is None or sizes.scoring.micro_batch is not None or scoring_bytes(sizes) <= training_bytes(sizes):
        return sizes
    windows = replace(sizes.config.windows, scoring_micro_batch=1)
    return replace(sizes, config=replace(sizes.config, windows=windows), scoring=replace(sizes.scoring, micro_batch=1))


def estimated_seconds(sizes: Sizes, cluster: Cluster) -> float:
    """Of a step, by formula and roofline."""
    times = phase_times(
        flops_of_a_rank(sizes),
        collectives_of(sizes),
        elementwise_bytes(sizes, transformer_engine=takes_transformer_engine(sizes.config)),
        sizes=sizes,
        cluster=cluster,
    )
    return sum(time.total for time in times.values())


def gather_choices(sizes: Sizes) -> dict[str, Sizes]:
    """The same run by what becomes of the keys and values that its context-parallel ranks gather, where no layer is run
    again and they are kept at all. `_recomputations` leaves the last one out: it frees what the second does, and takes
    longer."""
    config = sizes.config
    activations = config.activations
    if config.parallel.context_parallel_size == 1 or takes_transformer_engine(config):
        return {}
    if activations.recompute_granularity == "full" or activations.recompute_modules not in (None, ("core_attn",)):
        return {}
    none = replace(activations, recompute_granularity=None, recompute_modules=None, recompute_cp_gather=False)
    choices = {
        "kept": none,
        "gathered again (--recompute-cp-gather)": replace(none, recompute_cp_gather=True),
        "gathered again, and the attention with them (--recompute-granularity selective)": replace(
            none, recompute_granularity="selective"
        ),
    }
    return {name: replace(sizes, config=replace(config, activations=one)) for name, one in choices.items()}


def _variants(config: RunConfig, architecture: Architecture, cluster: Cluster) -> Iterator[RunConfig]:
    """Every layout that the checks let through, with its choices of micro-batch and recomputation."""
    for parallel in _layouts(config, architecture, cluster):
        copies = cluster.world_size // parallel.model_parallel_size
        shared = copies * parallel.context_parallel_size > 1
        data_parallel = DataParallelConfig(
            overlap_grad_reduce=shared,
            overlap_param_gather=shared and config.scorer.scorer != "ema",  # which refuses it
            ddp_bucket_size=config.data_parallel.ddp_bucket_size if shared else None,
        )
        # With auto the run may have Transformer Engine's layers, which keep none and refuse to gather again.
        gathers = parallel.context_parallel_size > 1 and config.compute.transformer_impl == "local"
        for micro_batch in MICRO_BATCHES:
            for activations in _recomputations(config.activations, parallel, architecture, gathers=gathers):
                variant = replace(
                    config,
                    parallel=parallel,
                    data_parallel=data_parallel,
                    train=replace(config.train, micro_batch_size=micro_batch),
                    activations=activations,
                )
                try:
                    check_config(variant, cluster.world_size)
                except ValueError:
                    continue
                yield variant


def _layouts(config: RunConfig, architecture: Architecture, cluster: Cluster) -> Iterator[ParallelConfig]:
    world = cluster.world_size
    for tensor in _divisors(min(world, cluster.gpus_per_node)):
        for pipeline in _divisors(architecture.num_layers):
            if world % (tensor * pipeline) or pipeline > MOST_STAGES:
                continue
            for context in _divisors(world // tensor // pipeline):
                layers = architecture.num_layers // pipeline
                interleaved = [size for size in _divisors(layers) if size < layers] if pipeline > 1 else []
                for chunk in [None, *interleaved[-2:]]:
                    parallel = replace(
                        config.parallel,
                        tensor_model_parallel_size=tensor,
                        pipeline_model_parallel_size=pipeline,
                        context_parallel_size=context,
                        num_layers_per_virtual_pipeline_stage=chunk,
                    )
                    try:
                        check_model_shape(
                            parallel,
                            num_layers=architecture.num_layers,
                            num_attention_heads=architecture.num_attention_heads,
                            num_query_groups=architecture.num_query_groups,
                            ffn_hidden_size=architecture.ffn_hidden_size,
                        )
                    except ValueError:
                        continue
                    yield parallel


def _recomputations(
    given: ActivationConfig, parallel: ParallelConfig, architecture: Architecture, *, gathers: bool
) -> Iterator[ActivationConfig]:
    """None, of gathered keys and values alone (gathers: where layers keep them), of some layers of a stage, of all."""
    none = replace(
        given,
        recompute_granularity=None,
        recompute_modules=None,
        recompute_method=None,
        recompute_num_layers=None,
        recompute_cp_gather=False,
    )
    yield none
    if gathers:
        yield replace(none, recompute_cp_gather=True)
    yield replace(none, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    layers = chunk or architecture.num_layers // parallel.pipeline_model_parallel_size
    for part in sorted({layers * eighth // 8 for eighth in range(1, 8)} - {0, layers}):
        block = replace(none, recompute_granularity="full", recompute_method="block", recompute_num_layers=part)
        yield block
        if gathers:
            yield replace(block, recompute_cp_gather=True)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
