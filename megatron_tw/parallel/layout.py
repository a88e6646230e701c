"""The process groups of a run and this rank's place in them: tensor, pipeline, context and data parallelism."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_tw.config import ParallelConfig
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.launcher import end_with_launcher


@dataclass(frozen=True)
class Layout:
    """Sizes, ranks and groups of this process. Groups are Megatron-Core's; a group of one rank is a real group too.

    tp, pp, cp, dp: tensor, pipeline, context, data parallel. dp_cp: data and context together (gradients are summed
    there).
    vpp_size: model chunks a pipeline rank holds, None without interleaving.
    """

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    vpp_size: int | None
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage, where losses and NLLs come out."""
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank is the one that prints and writes logs: rank 0."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this rank's pipeline."""
        return dist.get_process_group_ranks(self.pp_group)[-1]

    def describe(self) -> str:
        """For example "TP 2 x PP 1 x CP 2 x DP 1"."""
        vpp = f" x VPP {self.vpp_size}" if self.vpp_size else ""
        return f"TP {self.tp_size} x PP {self.pp_size}{vpp} x CP {self.cp_size} x DP {self.dp_size}"


_started = False


def start_process_group(device: Device, timeout_minutes: int) -> None:
    """Join the launcher's world (torchrun's environment), or make a world of one. Does nothing in a world that
    exists."""
    global _started
    end_with_launcher()
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0":  # the launcher's store is that of the ranks before, with all that they left there
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt_{attempt}", store)
        dist.init_process_group(device.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    elif "RANK" in os.environ:
        dist.init_process_group(device.backend, timeout=timeout)
    else:
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    _started = True


def stop_process_group() -> None:
    """Leave the world that `start_process_group` joined, at the end of a program; NCCL warns where nobody does. Does
    nothing in a world that was there before."""
    global _started
    if _started and dist.is_initialized():
        dist.destroy_process_group()
    _started = False


def make_layout(config: ParallelConfig, *, num_model_chunks: int | None = None, seed: int = 1234) -> Layout:
    """Create the groups of `config` in the existing world, and seed Megatron's random states for them. Collective
    over the world.

    num_model_chunks: chunks per pipeline rank under interleaving (`--num-layers-per-virtual-pipeline-stage` resolved
    with the model's number of layers), else None.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    hierarchical = config.hierarchical_context_parallel_sizes
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_model_chunks,
        context_parallel_size=config.context_parallel_size,
        hierarchical_context_parallel_sizes=list(hierarchical) if hierarchical else None,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        create_gloo_process_groups=dist.get_backend() == "nccl",  # for what is gathered on the host: checkpoints
    )
    # Tensor-parallel regions fork a random state of their own; nothing is dropped out in the models here, but they
    # ask for it.
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return current_layout(num_model_chunks)


def current_layout(num_model_chunks: int | None = None) -> Layout:
    """The groups that Megatron-Core has, whoever made them, and this rank's place in them."""
    from megatron.core import parallel_state as mpu

    return Layout(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        vpp_size=num_model_chunks,
        cp_size=mpu.get_context_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
    )


def destroy_layout() -> None:
    """Destroy the groups of the current layout, so that another one can be made in the same processes. Collective
    over the world.

    Megatron-Core only forgets its groups; under gloo each of them would keep its threads running.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    groups = [group for group in mpu._global_process_group_list or [] if group is not None] + _window_groups
    mpu.destroy_model_parallel()
    unset_num_microbatches_calculator()
    _window_groups.clear()
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:  # Megatron-Core destroys some that it made beside NCCL's
            dist.destroy_process_group(group)


_window_groups: list[dist.ProcessGroup] = []
"""Sub-groups made by split_context_group, which Megatron-Core does not know of."""


def split_context_group(layout: Layout, num_groups: int) -> tuple[dist.ProcessGroup | None, int]:
    """Split every context-parallel group into `num_groups` sub-groups of neighbouring ranks. Collective over the world.

    Returns:
        this rank's sub-group (None when sub-groups are single ranks: nothing to communicate) and its index,
        0..num_groups-1.
    """
    if layout.cp_size % num_groups:
        raise ValueError(
            f"a context-parallel group of {layout.cp_size} does not split into {num_groups} equal sub-groups"
        )
    share = layout.cp_size // num_groups
    index = layout.cp_rank // share
    if share == 1:
        return None, index
    if num_groups == 1:
        return layout.cp_group, 0
    all_groups: list[list[int] | None] = [None] * layout.world_size
    dist.all_gather_object(all_groups, dist.get_process_group_ranks(layout.cp_group))
    mine = None
    for ranks in sorted({tuple(group) for group in all_groups if group is not None}):
        for start in range(0, layout.cp_size, share):
            members = list(ranks[start : start + share])
            group = dist.new_group(members)  # every rank of the world takes part in every creation
            if layout.rank in members:
                mine = group
            _window_groups.append(group)
    return mine, index
