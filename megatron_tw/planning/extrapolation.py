"""How much of a step is simulated, and what follows for all of it.

Once a pipeline is full, each further micro-batch adds the same: FLOPs and collectives, and a little memory, its rows
and their NLLs. Layers are all alike, and so add the same from the second of a stage on. So two steps, both beyond that
point, tell every other one exactly, by the straight line through both.

What is not on a line: the padding at the end of a gradient buffer (some hundred bytes a data-parallel rank), and in how
many buckets --overlap-grad-reduce cuts it (their bytes are).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_tw.config import ActivationConfig, ParallelConfig
from megatron_tw.model.architecture import Architecture
from megatron_tw.planning.record import CATEGORIES, Collective, Moment

SHAPES_A_TIMELINE = ("activations", "other")
"""Categories that come and go within a step."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlan:
    """number: micro-batches of a step. first: of the step that makes the optimizer's state. simulated: of the steps
    that are counted, in increasing order; `number` alone, or two less than it."""

    number: int
    first: int
    simulated: tuple[int, ...]

    @staticmethod
    def of(parallel: ParallelConfig, number: int, *, everything: bool = False) -> "MicrobatchPlan":
        """The least that tells all.

        A first stage holds the activations of PP micro-batches, and has begun to free them one later. With V chunks a
        rank it holds at most (V + 1) PP - 1 of the PP V chunks that PP micro-batches make, and wants multiples of PP.
        """
        stages, interleaved = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
        unit = stages if interleaved else 1
        least = 2 * stages if interleaved else stages + 1
        simulated = (number,) if everything or number <= least + unit else (least, least + unit)
        return MicrobatchPlan(number=number, first=min(unit, number), simulated=simulated)

    def in_full(self, steps: "Sequence[Counted]") -> "Counted":
        """The step of `number` micro-batches, from those that were counted."""
        if len(steps) == 1:
            return steps[0]
        low, high = self.simulated
        assert (self.number - high) % (high - low) == 0
        return extended(steps[0], steps[1], (self.number - high) // (high - low))


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """number: layers of one of the `chunks` that the ranks of a pipeline hold together. simulated: of the models that
    are run, likewise; `number` alone, or two less than it."""

    number: int
    chunks: int
    simulated: tuple[int, ...]

    @staticmethod
    def of(
        architecture: Architecture, parallel: ParallelConfig, activations: ActivationConfig, *, everything: bool = False
    ) -> "LayerPlan":
        """The least that tells all: a stage of two layers, or two of the groups that are recomputed together, has an
        inner one. Under recompute_method block the layers are not alike; all are run."""
        of_chunk = parallel.num_layers_per_virtual_pipeline_stage
        chunks = architecture.num_layers // of_chunk if of_chunk else parallel.pipeline_model_parallel_size
        number = architecture.num_layers // chunks
        unit = (activations.recompute_num_layers or 1) if activations.recompute_method == "uniform" else 1
        all_alike = activations.recompute_method != "block" and number % unit == 0
        simulated = (number,) if everything or not all_alike or number <= 4 * unit else (2 * unit, 3 * unit)
        return LayerPlan(number=number, chunks=chunks, simulated=simulated)

    def smaller(
        self, layers: int, architecture: Architecture, parallel: ParallelConfig
    ) -> tuple[Architecture, ParallelConfig]:
        """The model and the layout with so many layers of a chunk."""
        of_chunk = None if parallel.num_layers_per_virtual_pipeline_stage is None else layers
        return (
            replace(architecture, num_layers=layers * self.chunks),
            replace(parallel, num_layers_per_virtual_pipeline_stage=of_chunk),
        )

    def in_full(self, models: "Sequence[Counted]") -> "Counted":
        """The step with `number` layers, from those that were counted."""
        if len(models) == 1:
            return models[0]
        low, high = self.simulated
        assert (self.number - high) % (high - low) == 0
        return extended(models[0], models[1], (self.number - high) // (high - low))


def in_words(microbatches: MicrobatchPlan, layers: LayerPlan) -> str:
    """What was not run, for `Simulation.extrapolated`; empty where everything was."""
    words = []
    if len(layers.simulated) > 1:
        words.append(f"{layers.number} layers of a stage from {' and '.join(map(str, layers.simulated))}")
    if len(microbatches.simulated) > 1:
        words.append(f"{microbatches.number} micro-batches from {' and '.join(map(str, microbatches.simulated))}")
    return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a step came to; fields as those of `Simulation`."""

    peaks: dict[str, Moment]
    timeline: list[Moment]
    flops: dict[str, dict[str, float]]
    collectives: list[Collective]


def extended(low: Counted, high: Counted, times: int) -> Counted:
    """`high`, with `times` times more of what it has more than `low`."""
    peaks = {phase: _moment(low.peaks.get(phase, moment), moment, times) for phase, moment in high.peaks.items()}
    return Counted(
        peaks=peaks,
        timeline=[_shifted(moment, high.peaks[moment.phase], peaks[moment.phase]) for moment in high.timeline],
        flops={
            phase: {
                kind: flops + times * (flops - low.flops.get(phase, {}).get(kind, 0.0)) for kind, flops in kinds.items()
            }
            for phase, kinds in high.flops.items()
        },
        collectives=_collectives(low.collectives, high.collectives, times),
    )


def _moment(low: Moment, high: Moment, times: int) -> Moment:
    return Moment(
        phase=high.phase,
        bytes_by_category={
            category: size + times * (size - low.bytes_by_category[category])
            for category, size in high.bytes_by_category.items()
        },
    )


def _shifted(moment: Moment, before: Moment, after: Moment) -> Moment:
    """A moment of a phase whose peak has become another: what stays is shifted, what comes and goes is scaled."""
    in_use = {}
    for category in CATEGORIES:
        size, old, new = (m.bytes_by_category[category] for m in (moment, before, after))
        scaled = category in SHAPES_A_TIMELINE and 0 < size <= old
        in_use[category] = round(size * new / old) if scaled else size + new - old
    return Moment(phase=moment.phase, bytes_by_category={name: max(0, size) for name, size in in_use.items()})


def _collectives(low: Sequence[Collective], high: Sequence[Collective], times: int) -> list[Collective]:
    def kind(collective: Collective) -> Collective:
        return replace(collective, count=0, payload_bytes=0)

    before = {kind(collective): collective for collective in low}
    scaled = []
    for collective in high:
        less = before.get(kind(collective), kind(collective))
        scaled.append(
            replace(
                collective,
                count=collective.count + times * (collective.count - less.count),
                payload_bytes=collective.payload_bytes + times * (collective.payload_bytes - less.payload_bytes),
            )
        )
    return scaled
