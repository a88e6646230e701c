"""A real training step watched from outside: its memory, FLOPs and collectives. Shares no code with the simulation.

FLOPs and collectives are told by phase: scoring; else forward from the step's begin and from each forward pass of the
schedule on, backward from each backward pass on, optimizer from the update on.
Memory is that of the storages that operators return, by weak references; what a library allocates within an operator
is not seen, as it is not in the simulation.
"""

import weakref
from collections import Counter
from functools import partial, wraps
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from tiny import Axes, layout_of, release
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from megatron_tw.config import RunConfig
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.parallel.layout import Layout
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

aten, c10d = torch.ops.aten, torch.ops.c10d
PAYLOADS = {  # operator: what it is, and the argument that holds the whole tensor
    c10d.allreduce_: ("all_reduce", 0),
    c10d.allreduce_coalesced_: ("all_reduce", 0),
    c10d.broadcast_: ("broadcast", 0),
    c10d.allgather_: ("all_gather", 0),
    c10d._allgather_base_: ("all_gather", 0),
    c10d.allgather_into_tensor_coalesced_: ("all_gather", 0),
    c10d.reduce_scatter_: ("reduce_scatter", 1),
    c10d._reduce_scatter_base_: ("reduce_scatter", 1),
    c10d.reduce_scatter_tensor_coalesced_: ("reduce_scatter", 1),
    c10d.send: ("send", 0),
    c10d.recv_: ("recv", 0),
}


class Watch(TorchDispatchMode):
    """bytes: in use by kind, "activations" for storages born in a step outside of the optimizer, "other" for the rest
    without a name. peak: the highest sum so far, and bytes at that moment. flops: by phase and kind. payloads: by
    phase, group, operation and ranks of the group. groups: name of a process group -> what it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.place = "other"
        self.bytes: Counter[str] = Counter()
        self.phase = "forward"
        self.flops: Counter[tuple[str, str]] = Counter()
        self.payloads: Counter[tuple[str, ...]] = Counter()
        self.groups: dict[str, str] = {}
        self.peak: tuple[int, dict[str, int]] = (0, {})
        self._kinds: dict[int, list[Any]] = {}

    def begin(self) -> None:
        self.flops.clear()
        self.payloads.clear()
        self.peak = (0, {})

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._kinds:
            entry = [self.place, storage.nbytes(), None]
            entry[2] = weakref.ref(storage, lambda _: self._forget(key))
            self._kinds[key] = entry
            self.bytes[self.place] += storage.nbytes()

    def _forget(self, key: int) -> None:
        kind, size, _ = self._kinds.pop(key)
        self.bytes[kind] -= size

    def name(self, tensors: Any, kind: str) -> None:
        for tensor in tensors:
            self.see(tensor)
            entry = self._kinds[tensor.untyped_storage()._cdata]
            self.bytes[entry[0]] -= entry[1]
            self.bytes[kind] += entry[1]
            entry[0] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in PAYLOADS:
            self._count(packet, args)
        elif func.namespace != "c10d":
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.see(leaf)
            total = sum(self.bytes.values())
            if total > self.peak[0]:
                self.peak = total, dict(self.bytes)
        self._count_flops(packet, args, kwargs or {}, out)
        return out

    def _count(self, packet: Any, args: Any) -> None:
        boxed = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() > 1:
            kind, whole = PAYLOADS[packet]
            key = (self.phase, self.groups.get(group.group_name, "other"), kind, str(group.size()))
            self.payloads[key] += sum(x.nbytes for x in tree_leaves(args[whole]))

    def from_now(self, phase: str, function: Any) -> Any:
        """`function`, with which a phase begins; a pass of the scoring is of the scoring."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.phase != "scoring":
                self.phase = phase
            return function(*args, **kwargs)

        return call

    def scoring(self, function: Any) -> Any:
        """`function`, which scores."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.phase = "scoring"
            result = function(*args, **kwargs)
            self.phase = "forward"
            return result

        return call

    def _count_flops(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        causal = 0.5 if any(x is True for x in args[4:8]) or kwargs.get("is_causal") else 1.0
        if packet in (aten.mm, aten.bmm, aten.addmm):
            self.flops[self.phase, "gemm"] += flop_registry[packet](*args, out_val=out)
        elif packet is aten.addmm_:
            self.flops[self.phase, "gemm"] += flop_registry[aten.addmm](*args, out_val=out)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            q, k, v = _same_heads(*args[:3])
            self.flops[self.phase, "attention"] += int(causal * sdpa_flop_count(q, k, v))
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            q, k, v = _same_heads(*args[1:4])
            self.flops[self.phase, "attention"] += int(causal * sdpa_backward_flop_count(args[0].shape, q, k, v))


def _same_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[torch.Size, ...]:
    heads = query.shape[1]
    return query.shape, *(torch.Size((x.shape[0], heads, *x.shape[2:])) for x in (key, value))


def watched_step(axes: Axes, config: RunConfig) -> dict[str, Any]:
    """On a rank: a second step, watched; results as those of `Watch`."""
    inputs = open_inputs(config)
    watch = Watch()
    with layout_of(axes) as layout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "forward_step", watch.from_now("forward", schedules.forward_step))
        patch.setattr(schedules, "backward_step", watch.from_now("backward", schedules.backward_step))
        with watch:
            run = Run.start(config, inputs, layout, prepare_device())
            step: Any = run.step
            for wrapped in step.model:
                watch.name((buffer.grad_data for buffer in wrapped.buffers), "gradients")
            for chunk in [*run.chunks, *(getattr(step.scorer, "model", None) or [])]:
                watch.name(chunk.parameters(), "parameters")
            step.optimizer.step = partial(_update, watch, step.optimizer.step)
            if step.scorer is not None:
                step.scorer.short_nll = watch.scoring(step.scorer.short_nll)
            watch.groups = _group_names(layout, getattr(getattr(step.scorer, "windows", None), "group", None))
            watch.place = "activations"
            step(next(run.loader), 0)
            _name_optimizer(watch, run)
            watch.begin()
            watch.place, watch.phase = "activations", "forward"
            step(next(run.loader), 1)
            result = {"peak": watch.peak, "flops": dict(watch.flops), "payloads": dict(watch.payloads)}
        release(run.step.model)
        del run, step, wrapped, chunk
    return result


def _group_names(layout: Layout, window_group: dist.ProcessGroup | None) -> dict[str, str]:
    """Name of each process group of the run -> what the plan calls it."""
    called = {
        "TP": layout.tp_group, "CP": layout.cp_group, "DP": layout.dp_group, "DP x CP": layout.dp_cp_group,
        "PP": layout.pp_group, "TP x PP": parallel_state._MODEL_PARALLEL_GROUP,
        "embedding": parallel_state._EMBEDDING_GROUP, "window": window_group,
    }  # fmt: skip
    assert dist.group.WORLD is not None
    names: dict[str, str] = {dist.group.WORLD.group_name: "world"}
    for name, group in called.items():
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, name)
    return names


def _update(watch: Watch, update: Any) -> Any:
    watch.place, watch.phase = "other", "optimizer"
    return update()


def _name_optimizer(watch: Watch, run: Run) -> None:
    weights = {id(parameter.untyped_storage()) for chunk in run.chunks for parameter in chunk.parameters()}
    optimizer: Any = run.step.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            watch.name((x for x in state.values() if isinstance(x, Tensor)), "optimizer")
        for group in part.optimizer.param_groups:
            mains = group["params"]
            watch.name((x for x in mains if id(x.untyped_storage()) not in weights), "optimizer")
