"""How many micro-batches of a step are simulated, and what follows for all of them.

Once a pipeline is full, each further micro-batch adds the same: FLOPs and collectives, and a little memory, its rows
and their NLLs. So two steps whose numbers of micro-batches are both beyond that point tell every other one exactly, by
the straight line through both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_tw.parallel.layout import Layout
from megatron_tw.planning.record import Collective, Moment


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlan:
    """number: micro-batches of a step. first: of the step that makes the optimizer's state. simulated: of the steps
    that are counted, in increasing order; `number` alone, or two less than it."""

    number: int
    first: int
    simulated: tuple[int, ...]

    @property
    def in_words(self) -> str:
        """What was not run, for `Simulation.extrapolated`."""
        if len(self.simulated) == 1:
            return ""
        return f"{self.number} micro-batches from {' and '.join(map(str, self.simulated))}"

    @staticmethod
    def of(layout: Layout, number: int, *, everything: bool = False) -> "MicrobatchPlan":
        """The least that tells all.

        A first stage holds the activations of PP micro-batches, and has begun to free them one later. With V chunks a
        rank it holds at most (V + 1) PP - 1 of the PP V chunks that PP micro-batches make, and wants multiples of PP.
        """
        unit = layout.pp_size if layout.vpp_size else 1
        least = 2 * layout.pp_size if layout.vpp_size else layout.pp_size + 1
        simulated = (number,) if everything or number <= least + unit else (least, least + unit)
        return MicrobatchPlan(number=number, first=min(unit, number), simulated=simulated)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a step of so many micro-batches came to; fields as those of `Simulation`."""

    microbatches: int
    peaks: dict[str, Moment]
    timeline: list[Moment]
    flops: dict[str, dict[str, float]]
    collectives: list[Collective]


def at_number(steps: Sequence[Counted], number: int) -> Counted:
    """The step of `number` micro-batches, from one of that number or two others."""
    if len(steps) == 1:
        assert steps[0].microbatches == number
        return steps[0]
    low, high = steps
    further = number - high.microbatches
    unit = high.microbatches - low.microbatches
    assert further % unit == 0
    times = further // unit
    peaks = {phase: _moment(low.peaks[phase], high.peaks[phase], times) for phase in high.peaks}
    return Counted(
        microbatches=number,
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
    """The line through two moments; what the second has more of, `times` times more."""
    return Moment(
        phase=high.phase,
        bytes_by_category={
            category: size + times * (size - low.bytes_by_category[category])
            for category, size in high.bytes_by_category.items()
        },
    )


def _shifted(moment: Moment, before: Moment, after: Moment) -> Moment:
    """A moment with what its phase's peak has become more."""
    return Moment(
        phase=moment.phase,
        bytes_by_category={
            category: size + after.bytes_by_category[category] - before.bytes_by_category[category]
            for category, size in moment.bytes_by_category.items()
        },
    )


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
