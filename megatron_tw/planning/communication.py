"""Collectives as torch.distributed hands them to the dispatcher (c10d operators): what each moves, and between whom."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tw.parallel.layout import Layout
from megatron_tw.planning.record import Collective

_KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
}
_WHOLE = {"reduce_scatter_": 1, "_reduce_scatter_base_": 1, "reduce_scatter_tensor_coalesced_": 1}
"""Which argument holds the whole tensor: the not yet scattered one; for the others it is the first."""


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors in an argument of an operator, nested in lists or not."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


class Communication:
    """Counts collectives. `labels`: name of a process group -> what it is called in a `Collective`."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        self._counted: dict[tuple[str, str, str, int, bool], list[int]] = defaultdict(lambda: [0, 0])

    def know(self, layout: Layout, window_group: dist.ProcessGroup | None = None) -> None:
        """Name the groups by what they are for: two groups of the same ranks have two names."""
        groups = {
            "TP": layout.tp_group,
            "CP": layout.cp_group,
            "DP": layout.dp_group,
            "DP x CP": layout.dp_cp_group,
            "PP": layout.pp_group,
            **_other_groups(),
        }
        for label, group in groups.items():
            self.labels.setdefault(group.group_name, label)
        if window_group is not None:
            self.labels.setdefault(window_group.group_name, "window")
        assert dist.group.WORLD is not None
        self.labels[dist.group.WORLD.group_name] = "world"

    def count(self, phase: str, func: Any, args: tuple[Any, ...]) -> None:
        """One call of a c10d operator; a group of one rank moves nothing and is not counted."""
        name = func._schema.name.split("::")[1]
        if name not in _KINDS:
            return
        group = dist.ProcessGroup.unbox(boxed_group(args))
        if group.size() == 1:
            return
        payload = sum(t.numel() * t.element_size() for t in tensors_in(args[_WHOLE.get(name, 0)]))
        waits = [index for index, argument in enumerate(func._schema.arguments) if argument.name == "async_op"]
        overlapped = bool(waits) and (waits[0] >= len(args) or bool(args[waits[0]]))
        label = self.labels.get(group.group_name, "other")
        counted = self._counted[phase, label, _KINDS[name], group.size(), overlapped]
        counted[0] += 1
        counted[1] += payload

    def take(self) -> list[Collective]:
        """What was counted since the last call, and forget it."""
        counted, self._counted = self._counted, defaultdict(lambda: [0, 0])
        return [
            Collective(
                phase=phase,
                group=group,
                operation=operation,
                group_size=size,
                overlapped=overlapped,
                count=count,
                payload_bytes=payload,
            )
            for (phase, group, operation, size, overlapped), (count, payload) in counted.items()
        ]


def boxed_group(args: tuple[Any, ...]) -> Any:
    """The group among the arguments of a c10d operator, as the dispatcher passes it."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return argument
    raise AssertionError("a collective without a group")


def _other_groups() -> dict[str, dist.ProcessGroup]:
    """Groups of Megatron-Core that a Layout does not name, where they exist."""
    from megatron.core import parallel_state as mpu

    makers: dict[str, Callable[[], dist.ProcessGroup | None]] = {
        "TP x PP": lambda: mpu._MODEL_PARALLEL_GROUP,
        "embedding": lambda: mpu._EMBEDDING_GROUP,
    }
    found = {label: maker() for label, maker in makers.items()}
    return {label: group for label, group in found.items() if isinstance(group, dist.ProcessGroup)}
