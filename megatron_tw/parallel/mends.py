"""Faults of Megatron-Core's distributed optimizer and checkpoints, mended where the installed version has them.

Each is looked for, not told from a version number: forks carry back what is mended upstream, and a fault that is mended
twice is a fault again.
"""

import functools
import queue
import threading
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch


def mend_megatron() -> None:
    """Mend all of them, once."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if hasattr(DistributedOptimizer, "_megatron_tw_mended"):
        return
    DistributedOptimizer._megatron_tw_mended = True
    mend_bucket_padding()
    mend_adamw_fallback()
    mend_steps_of_state_saved_as_held()
    mend_synchronous_saves()


def mend_bucket_padding() -> None:
    """Save every parameter's optimizer state as its own, where a buffer has several buckets.

    A bucket is padded at its end, and the saved state of a buffer leaves that padding out. Megatron-Core cuts the
    parameters out of it at places that count the padding of all buckets before, and so saves them shifted (mended in
    Megatron-LM's pull request 5077).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not saves_padded_buckets_shifted(DistributedOptimizer):
        return
    save = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(save)
    def save_without_padding(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        maps = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            return save(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, maps, strict=True):
                buffer.param_index_map = index_map

    DistributedOptimizer.sharded_param_state_fully_reshardable = save_without_padding


def saves_padded_buckets_shifted(optimizer_class: Any) -> bool:
    """Whether `optimizer_class` has the fault: asked of its own method, with a buffer that holds a parameter of two
    elements behind a bucket of three that is padded to four.

    Raises:
        RuntimeError: it does neither the one thing nor the other.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    padded, last = (SimpleNamespace(grad_data=torch.zeros(4), numel_unpadded=numel) for numel in (3, 2))
    param = torch.zeros(2)
    buffer = SimpleNamespace(buckets=[padded, last], param_index_map={param: (4, 6, 1)}, numel=8, numel_unpadded=5)
    gathered = {0: {"dtype": {"param": torch.arange(6.0)}}}  # of the buffer, without padding; one more is read shifted
    optimizer = SimpleNamespace(
        buffers=[buffer], gbuf_ranges=[{"dtype": []}], get_parameter_state_dp_zero=lambda **how: gathered
    )
    state = optimizer_class.sharded_param_state_fully_reshardable(
        optimizer, {"param": ShardedTensor.from_rank_offsets("param", param)}, metadata={}
    )
    saved = state[0]["param"].data.tolist()
    if saved not in ([3.0, 4.0], [4.0, 5.0]):
        raise RuntimeError(
            f"megatron-core: its distributed optimizer saves elements {saved} of a buffer as those of a parameter that "
            "has [3, 4]; this version is not known here. Install the pinned one: pip install -c constraints.txt "
            "megatron-core"
        )
    return saved == [4.0, 5.0]


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """`param_index_map` of a buffer (start, end, bucket) that leaves out what its buckets are padded with."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *accumulate(padding)]
    return {
        param: (start - before[bucket], end - before[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


def mend_adamw_fallback() -> None:
    """Make the distributed optimizer save and reload torch's AdamW, where Transformer Engine and Apex are both absent.

    Three faults in Megatron-Core: it reads `step` before a first step has made it (loading into a fresh optimizer
    fails); parameter states are copied without `step`, which the torch optimizer has (KeyError); and after a reload all
    parameters share one `step` tensor, which then counts once per parameter.
    """
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    state_dict = DistributedOptimizer.state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(state_dict)
    def state_dict_from_the_start(self):  # type: ignore[no-untyped-def]
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                state = self.optimizer.state[param]
                if not state:  # as torch.optim.AdamW makes it in its first step
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
        return state_dict(self)

    @functools.wraps(set_states)
    def set_states_without_step(self, model_param, tensors):  # type: ignore[no-untyped-def]
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        step = {name: state.pop(name) for name in ("step",) if name in state and name not in tensors}
        try:
            set_states(self, model_param, tensors)
        finally:
            state.update(step)

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self, state_dict):  # type: ignore[no-untyped-def]
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_from_the_start
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_without_step
    DistributedOptimizer.load_state_dict = load_with_own_steps


def mend_steps_of_state_saved_as_held() -> None:
    """Keep the loaded number of steps when optimizer state is loaded as its ranks hold it ("dp_reshardable").

    torch's AdamW has a `step` for each parameter, which a checkpoint keeps once for all; Megatron-Core sets it, and
    then sets it back to what it was before the load. (With --optimizer-cpu-offload beside Transformer Engine too.)
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_parameter_state_from_dp_reshardable

    @functools.wraps(load)
    def load_without_steps(self, state_dict):  # type: ignore[no-untyped-def]
        for number in range(len(self.buffers)):
            for buckets in state_dict[number].values():
                for parameter in (parameter for bucket in buckets for parameter in bucket):
                    parameter.pop("step", None)
        return load(self, state_dict)

    DistributedOptimizer.load_parameter_state_from_dp_reshardable = load_without_steps


def mend_synchronous_saves() -> None:
    """Write a synchronous save's files in threads of this process, and hand their results over within it.

    Megatron-Core 0.16 forks a process a file and waits for it without end: one that is killed (by the kernel, for want
    of memory) hangs the rank, and those whose rank is killed wait for it for ever, with a copy of the rank's memory.
    From 0.17 it writes in threads too, but of a failed one it says no more than that it failed. Both take a manager for
    the results, which only asynchronous saves need: one more Python process a rank, which imports the program again at
    the first save (seconds).
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queues = ("_get_write_results_queue", "get_write_results_queue")
    writers = ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
    for holder, names, mended in (
        (filesystem_async, queues, queue.SimpleQueue),
        (filesystem_async.FileSystemWriterAsync, writers, staticmethod(_write_in_threads)),
    ):
        [name] = [name for name in names if hasattr(holder, name)]
        setattr(holder, name, mended)

    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

    if hasattr(torch_strategy, "_logged_mcore_async_deprecation"):  # said at synchronous saves too, which stay
        torch_strategy._logged_mcore_async_deprecation = True


def _write_in_threads(
    transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], results: queue.SimpleQueue[Any]
) -> None:
    """Stands in for Megatron-Core's writing of all files: a file a bucket; puts {number of the bucket: its results}
    into `results`, or the exception of one that failed."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left: queue.Queue[int] = queue.Queue()  # counted down by the writers, asked by nobody
    threads = []
    for number, bucket in enumerate(write_buckets):
        left.put(number)
        given = (transform_list, number, bucket, written, left, True)
        threads.append(
            threading.Thread(target=FileSystemWriterAsync.write_preloaded_data, args=given, kwargs={"use_msc": use_msc})
        )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by_bucket = dict(written.get() for _ in write_buckets)
    failed = [result for result in by_bucket.values() if isinstance(result, Exception)]
    results.put(failed[0] if failed else by_bucket)
