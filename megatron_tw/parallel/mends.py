"""Faults of Megatron-Core 0.16.1's distributed optimizer and checkpoints, mended where they are."""

import functools
import queue
import threading
from itertools import accumulate
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
    mend_synchronous_saves()


def mend_bucket_padding() -> None:
    """Save every parameter's optimizer state as its own, where a buffer has several buckets.

    A bucket is padded at its end, and the saved state of a buffer leaves that padding out. Megatron-Core cuts the
    parameters out of it at places that count the padding of all buckets before, and so saves them shifted.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

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
        step = state.pop("step")
        try:
            set_states(self, model_param, tensors)
        finally:
            state["step"] = step

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self, state_dict):  # type: ignore[no-untyped-def]
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_from_the_start
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_without_step
    DistributedOptimizer.load_state_dict = load_with_own_steps


def mend_synchronous_saves() -> None:
    """Write a synchronous save's files in threads of this process, and hand their results over within it.

    Megatron-Core forks a process a file and waits for it without end: one that is killed (by the kernel, for want of
    memory) hangs the rank, and those whose rank is killed wait for it for ever, with a copy of the rank's memory. And
    it takes a manager for the results, which only asynchronous saves need: one more Python process a rank, which
    imports the program again at the first save (seconds).
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = queue.SimpleQueue
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)


def _write_in_threads(
    transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], results: queue.SimpleQueue[Any]
) -> None:
    """Stands in for `write_preloaded_data_multiproc`: a file a bucket; puts {number of the bucket: its results} into
    `results`, or the exception of one that failed."""
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
