"""A plan: what a run will need and how long a step takes at best, from its simulated ranks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_tw.config import RunConfig, flat_options
from megatron_tw.model.flops import model_flops
from megatron_tw.planning.formulas import in_flight, layer_bytes
from megatron_tw.planning.limits import NOT_SIMULATED
from megatron_tw.planning.record import Simulation
from megatron_tw.planning.roofline import Cluster, PhaseTime, phase_times
from megatron_tw.planning.sizes import Sizes
from megatron_tw.planning.traffic import elementwise_bytes
from megatron_tw.planning.transformer_engine import STATUS, Difference, differences, saved_by_te_layer

TRANSFORMER_ENGINE = "transformer_engine"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout. allowances: bytes of a rank that no simulation sees, by name. times: of the simulated rank that takes
    longest, by phase. te_saves_bytes: activations that Transformer Engine's layers would not keep, by formula."""

    sizes: Sizes
    cluster: Cluster
    simulations: tuple[Simulation, ...]
    allowances: dict[str, int]
    times: dict[str, PhaseTime]
    te_saves_bytes: float

    @staticmethod
    def of(sizes: Sizes, cluster: Cluster, simulations: Sequence[Simulation], allowances: dict[str, int]) -> "Plan":
        """simulations: of the ranks whose figures bound those of all others."""
        times = [rank_times(sizes, cluster, simulation) for simulation in simulations]
        tokens, config = sizes.local_tokens, sizes.config
        layer = layer_bytes(sizes, tokens, config.data.seq_length * config.train.micro_batch_size)
        layers = sizes.architecture.num_layers / config.parallel.pipeline_model_parallel_size
        kept = 1.0 if config.activations.recompute_granularity == "full" else layers * in_flight(sizes)
        return Plan(
            sizes=sizes,
            cluster=cluster,
            simulations=tuple(simulations),
            allowances=allowances,
            times=max(times, key=lambda phases: sum(time.total for time in phases.values())),
            te_saves_bytes=max(0.0, layer.kept(config.activations) - layer.te) * kept,
        )

    @property
    def config(self) -> RunConfig:
        return self.sizes.config

    @property
    def fullest(self) -> Simulation:
        """The simulated rank with the highest peak."""
        return max(self.simulations, key=lambda simulation: simulation.peak.total)

    @property
    def allowance(self) -> int:
        return sum(self.allowances.values())

    @property
    def te_differences(self) -> list[Difference]:
        """What a layer keeps, as simulated and with Transformer Engine's modules as read (`STATUS`). Empty where
        nothing is known (fp32, other families' layers), and of layers that are run again: they keep their input."""
        saved = self.simulations[-1].saved_by_layer
        read = saved_by_te_layer(self.config, self.sizes.architecture) if self.config.compute.bf16 else None
        return [] if read is None or len(saved) < 2 else differences(saved, read)

    @property
    def needed_bytes(self) -> float:
        """Of the fullest rank, allowances included."""
        return self.fullest.peak.total + self.allowance

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.cluster.gpu.memory_bytes

    @property
    def too_large(self) -> str:
        """What of a layout that does not fit is the largest part, and what would make it smaller."""
        parts = self.fullest.peak.bytes_by_category
        largest = max(parts, key=lambda category: parts[category])
        helps = {
            "parameters": "more tensor or pipeline parallelism",
            "gradients": "more tensor or pipeline parallelism",
            "optimizer": "more data or context parallelism, over which it is shared",
            "activations": "--recompute-granularity full, or more context or tensor parallelism; under context "
            "parallelism, with layers that are not Transformer Engine's, --recompute-cp-gather",
        }
        return f"{largest}, {parts[largest] / 1e9:.1f} GB (smaller with {helps.get(largest, 'fewer rows at once')})"

    @property
    def step_seconds(self) -> float:
        return sum(time.total for time in self.times.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.sizes.rows * self.config.data.seq_length / self.step_seconds / self.sizes.world_size

    @property
    def model_flops(self) -> float:
        """Of a step, on all ranks; with hidden states of all tokens, without scoring."""
        return model_flops(self.sizes.architecture, self.sizes.rows, self.config.data.seq_length)

    @property
    def utilization(self) -> float:
        """Model FLOPs by second as a share of the peak."""
        return self.model_flops / self.step_seconds / self.sizes.world_size / self.cluster.gpu.peak_flops

    @property
    def scoring_percent(self) -> float:
        """What scoring adds to the rest of the step, in percent."""
        scoring = self.times["scoring"].total
        return 100 * scoring / (self.step_seconds - scoring)

    def to_json(self) -> dict[str, Any]:
        """Every figure, and the options."""
        return {
            "layout": layout_in_words(self.sizes),
            "world_size": self.sizes.world_size,
            "gpu": asdict(self.cluster.gpu),
            "model": self.sizes.architecture.source,
            "options": flat_options(self.config),
            "fits": self.fits,
            "too_large": None if self.fits else self.too_large,
            "needed_bytes": self.needed_bytes,
            "gpu_memory_bytes": self.cluster.gpu.memory_bytes,
            "allowances": self.allowances,
            "allowances_why": {allowance.name: allowance.why for allowance in NOT_SIMULATED},
            "step_seconds": self.step_seconds,
            "seconds_by_phase": {phase: asdict(time) | {"total": time.total} for phase, time in self.times.items()},
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "model_flops": self.model_flops,
            "model_flops_utilization": self.utilization,
            "scoring_percent": self.scoring_percent,
            "transformer_engine_saves_bytes_by_formula": self.te_saves_bytes,
            "transformer_engine_layer": {
                "status": STATUS,
                "modules": [asdict(row) | {"more_bytes": row.bytes} for row in self.te_differences],
            },
            "scales": {"scoring": self.cluster.scoring_scale, "step": self.cluster.step_scale},
            "simulations": [simulation.to_json() for simulation in self.simulations],
        }


def rank_times(sizes: Sizes, cluster: Cluster, simulation: Simulation) -> dict[str, PhaseTime]:
    """Seconds by phase of a simulated rank."""
    return phase_times(
        simulation.flops,
        simulation.collectives,
        elementwise_bytes(sizes, transformer_engine=takes_transformer_engine(sizes.config)),
        sizes=sizes,
        cluster=cluster,
    )


def takes_transformer_engine(config: RunConfig) -> bool:
    """Whose layers' rates a plan takes: Transformer Engine's only where --transformer-impl names it."""
    return config.compute.transformer_impl == TRANSFORMER_ENGINE


def layout_in_words(sizes: Sizes) -> str:
    """For example "TP 2 x PP 1 x CP 4 x DP 1, micro-batch 1, recompute full"."""
    parallel, options = sizes.config.parallel, sizes.config.activations
    interleaved = f" x VPP {sizes.chunks}" if sizes.chunks > 1 else ""
    words = (
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}{interleaved} x "
        f"CP {parallel.context_parallel_size} x DP {sizes.copies}, micro-batch {sizes.config.train.micro_batch_size}"
    )
    if options.recompute_cp_gather:
        words += ", keys and values gathered again"
    if options.recompute_granularity is None:
        return f"{words}, no recompute"
    if options.recompute_method == "block":
        return f"{words}, recompute {options.recompute_num_layers} layers a {'chunk' if interleaved else 'stage'}"
    return f"{words}, recompute {options.recompute_granularity}"
