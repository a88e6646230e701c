"""What a simulated step of one rank says of itself. Bytes, FLOPs and counts of one optimizer step; no times.

Plain data: it goes through JSON from the process that simulates to the one that asked.
"""

from dataclasses import asdict, dataclass
from typing import Any

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "other")
"""What memory is for: weights (and their bf16 copies), gradient buffers, main weights and moments, what the forward
pass leaves for the backward pass (and works with), the rest."""
PHASES = ("build", "scoring", "forward", "backward", "optimizer")
"""Build is all before the first step."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Collectives of one kind in one phase of a step.

    group: "TP", "CP", "DP", "DP x CP", "PP", "window" (a sub-group of CP that shares a scoring window), "TP x PP",
    "embedding" (first and last stage, where they share one), "world" or "other".
    operation: all_reduce, all_gather, reduce_scatter, broadcast, send, recv, all_to_all. count: calls.
    payload_bytes: of the whole tensor (the gathered or the not yet scattered one), summed over calls.
    group_size: ranks. overlapped: whether it was started without being waited for at once.
    """

    phase: str
    group: str
    operation: str
    group_size: int
    count: int
    payload_bytes: int
    overlapped: bool = False


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes in use by category, at one moment of the step."""

    phase: str
    bytes_by_category: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes_by_category.values())


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """One rank of a run, in the second step (when the optimizer's state exists).

    rank, place: which rank, and in words, for example "last stage, TP 0, CP 3". layers: whose layers were simulated.
    peak: the moment at which most bytes were in use; peak_by_phase: likewise of each phase; timeline: moments in order,
    thinned out such that no peak of a phase is lost. flops: phase -> kind ("gemm", "attention") -> FLOPs of this rank,
    causal attention counted half. collectives: by phase, group and operation. saved_by_layer: bytes that one layer
    leaves for its backward pass, tensor by tensor: name -> bytes. seconds: that the simulation took. extrapolated: in
    words, of what less was run than the step has, and how much; empty where everything was run.
    """

    rank: int
    place: str
    layers: str
    peak: Moment
    peak_by_phase: dict[str, Moment]
    timeline: list[Moment]
    flops: dict[str, dict[str, float]]
    collectives: list[Collective]
    saved_by_layer: dict[str, int]
    seconds: float
    extrapolated: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Simulation":
        """The other way."""
        return Simulation(
            **{
                **content,
                "peak": Moment(**content["peak"]),
                "peak_by_phase": {phase: Moment(**moment) for phase, moment in content["peak_by_phase"].items()},
                "timeline": [Moment(**moment) for moment in content["timeline"]],
                "collectives": [Collective(**collective) for collective in content["collectives"]],
            }
        )
