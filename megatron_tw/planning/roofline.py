"""How long a step takes at best: FLOPs at the rates that kernels reach, bytes at those of memory and links.

What does not overlap is added up. A phase lasts as long as its matrix products, its attention, its elementwise passes
through memory, and the collectives that somebody waits for; collectives that run beside the computation last only
where they are longer. A pipeline waits for its first and last micro-batches. Nothing here knows of stragglers, of
power limits, of a host that is late, or of a network that others use too.

Links: tensor-parallel ranks are neighbours, then context-, data- and pipeline-parallel ones, as Megatron-Core orders
them. A group within a node uses NVLink; one over several nodes uses as many network cards as it has members in each,
up to what NVLink carries.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_tw.config import ParallelConfig
from megatron_tw.config.plan import PlanOptions
from megatron_tw.parallel.gpus import GPUS, Gpu
from megatron_tw.planning.record import Collective
from megatron_tw.planning.sizes import Sizes

CALL_SECONDS = 10e-6
"""Until a collective's kernels run: an assumption."""
NVLINK_HOP_SECONDS, NETWORK_HOP_SECONDS = 2e-6, 7e-6
"""Of one step of a ring or a tree: of the order that NCCL takes for them in its own tuning."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs of a plan. scale: measured by estimated seconds, of the scoring pass and of all else; 1 uncalibrated."""

    gpu: Gpu
    world_size: int
    gpus_per_node: int
    scoring_scale: float = 1.0
    step_scale: float = 1.0

    @staticmethod
    def of(plan: PlanOptions, *, transformer_engine: bool) -> "Cluster":
        """As the options say; the rate of attention is that of the layers that will run.

        Raises:
            ValueError: --gpu is none of the table's.
        """
        if plan.gpu not in GPUS:
            raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {plan.gpu}")
        gpu = GPUS[plan.gpu]
        attention = gpu.te_attention_flops if transformer_engine else gpu.attention_flops

        def given(value: float | None, unit: float, default: float) -> float:
            return default if value is None else value * unit

        gpu = replace(
            gpu,
            memory_bytes=given(plan.gpu_memory_gib, 2**30, gpu.memory_bytes),
            peak_flops=given(plan.peak_tflops, 1e12, gpu.peak_flops),
            gemm_flops=given(plan.gemm_tflops, 1e12, gpu.gemm_flops),
            attention_flops=given(plan.attention_tflops, 1e12, attention),
            memory_bytes_per_s=given(plan.memory_gbytes_per_second, 1e9, gpu.memory_bytes_per_s),
            nvlink_bytes_per_s=given(plan.nvlink_gbytes_per_second, 1e9, gpu.nvlink_bytes_per_s),
            network_bytes_per_s=given(plan.network_gbytes_per_second, 1e9, gpu.network_bytes_per_s),
        )
        return Cluster(gpu=gpu, world_size=plan.world_size, gpus_per_node=plan.gpus_per_node)


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Seconds of a phase of a step, by what they go to. bubble: of waiting for a pipeline to fill and to drain."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.memory + self.communication + self.bubble

    def __mul__(self, times: float) -> "PhaseTime":
        return PhaseTime(**{name: value * times for name, value in vars(self).items()})


def stride_and_span(group: str, parallel: ParallelConfig, world_size: int, group_size: int) -> tuple[int, int]:
    """Distance of neighbouring members of a group, and how many ranks lie from its first to behind its last.

    >>> p = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4)
    >>> [stride_and_span(g, p, 64, n) for g, n in (("TP", 2), ("CP", 4), ("DP", 8), ("DP x CP", 32), ("world", 64))]
    [(1, 2), (2, 8), (8, 64), (2, 64), (1, 64)]
    """
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stage = world_size // parallel.pipeline_model_parallel_size
    strides = {"TP": 1, "DP": tensor * context, "PP": stage}
    stride = 1 if group_size == world_size else strides.get(group, tensor)
    return stride, stride * group_size


def members_in_node(group: str, parallel: ParallelConfig, cluster: Cluster, group_size: int) -> int:
    """How many members of a group share a node."""
    stride, span = stride_and_span(group, parallel, cluster.world_size, group_size)
    if span <= cluster.gpus_per_node:
        return group_size
    return max(1, min(group_size, cluster.gpus_per_node // stride))


def collective_seconds(collective: Collective, parallel: ParallelConfig, cluster: Cluster) -> float:
    """All calls of one kind: the faster of ring and tree.

    A ring of n ranks carries (n - 1) / n of the whole tensor past each rank (twice that in an all-reduce) in n - 1
    steps a way; a tree carries it in twice log2 n. (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md)
    """
    n = collective.group_size
    if n < 2 or not collective.count:
        return 0.0
    inside = members_in_node(collective.group, parallel, cluster, n)
    gpu = cluster.gpu
    if inside == n:
        bandwidth, hop = gpu.nvlink_bytes_per_s, NVLINK_HOP_SECONDS
    else:
        bandwidth, hop = min(gpu.nvlink_bytes_per_s, inside * gpu.network_bytes_per_s), NETWORK_HOP_SECONDS
    if collective.operation in ("send", "recv"):
        return collective.payload_bytes / bandwidth + collective.count * (CALL_SECONDS + hop)
    ways = 2 if collective.operation == "all_reduce" else 1
    share = 1.0 if collective.operation == "broadcast" else (n - 1) / n
    latency = CALL_SECONDS + ways * hop * min(n - 1, 2 * math.log2(n))
    return ways * share * collective.payload_bytes / bandwidth + collective.count * latency


def phase_times(
    flops: dict[str, dict[str, float]],
    collectives: Iterable[Collective],
    memory_bytes: dict[str, float],
    *,
    sizes: Sizes,
    cluster: Cluster,
) -> dict[str, PhaseTime]:
    """Seconds by phase of one rank's step.

    flops, collectives: as in Simulation. memory_bytes: that elementwise work reads and writes, by phase.
    """
    collectives, gpu, times = list(collectives), cluster.gpu, {}
    stages, microbatches = sizes.config.parallel.pipeline_model_parallel_size, sizes.microbatches
    pipelines = {  # of stages, the micro-batches that pass them
        "scoring": (sizes.scoring_stages, sizes.scoring_microbatches),
        "forward": (stages, microbatches),
        "backward": (stages, microbatches),
        "optimizer": (1, 1),
    }
    for phase, (phase_stages, passes) in pipelines.items():
        work = flops.get(phase, {})
        computing = PhaseTime(
            gemm=work.get("gemm", 0.0) / gpu.gemm_flops,
            attention=work.get("attention", 0.0) / gpu.attention_flops,
            memory=memory_bytes.get(phase, 0.0) / gpu.memory_bytes_per_s,
        )
        waited, hidden = 0.0, 0.0
        for collective in collectives:
            if collective.phase != phase or collective.operation == "recv":
                continue  # a message is sent once
            seconds = collective_seconds(collective, sizes.config.parallel, cluster)
            if not collective.overlapped:
                waited += seconds
            elif collective.group in ("DP", "DP x CP"):  # beside the last or the first micro-batch
                waited += max(0.0, seconds - computing.total / max(1, microbatches))
            else:
                hidden += seconds
        waited += max(0.0, hidden - computing.gemm)
        time = replace(computing, communication=waited)
        if phase_stages > 1:
            time = replace(time, bubble=time.total * (phase_stages - 1) / (max(1, passes) * sizes.chunks))
        times[phase] = time * (cluster.scoring_scale if phase == "scoring" else cluster.step_scale)
    return times
