"""The dispatch mode under which a simulated rank runs: floats without data, integers with it.

Token ids, labels, indices and masks decide shapes, so they are real; they cost 8 bytes a token. Everything in floating
point is a FakeTensor: shape, dtype and a storage that has a size and no memory. What comes and goes is logged in the
ledger, operators that multiply matrices are counted, collectives are answered at once and counted.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tw.planning.communication import Communication, tensors_in
from megatron_tw.planning.flops import operation_flops
from megatron_tw.planning.ledger import Ledger

aten = torch.ops.aten
_INTEGER_FACTORIES = (aten.arange,)
_MASKED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_AT_READ = 1.0
"""What the program reads where it reads a number of a tensor without data: the gradients' norm, the report's sums."""


class Recorder(TorchDispatchMode):
    """Enter it inside `fake`, and leave both before asking for results."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.start_over()
        self.workspace: dict[Any, Callable[..., list[Tensor]]] = {}
        """Operator packet -> what its kernel allocates for itself: called with the operator's arguments, it answers
        with tensors that are in use as long as the operator runs."""

    def start_over(self) -> None:
        """Forget everything that was counted."""
        self.ledger = Ledger()
        self.communication = Communication()
        self._flops: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str, after: str | None) -> Iterator[None]:
        """Everything inside is of this phase, unless scoring is under way, whose forward pass is its own.

        after: the phase that follows; None: this one goes on, with what the schedule does between its parts.
        """
        if self.ledger.phase == "scoring":
            yield
            return
        self.ledger.phase = name
        yield
        self.ledger.phase = after or name

    def in_phase(self, name: str, function: Callable[..., Any], *, after: str | None = None) -> Callable[..., Any]:
        """`function`, whose calls are of this phase."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name, after):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """New storages inside are not counted, until an operator outside returns them."""
        before, self.ledger.counting = self.ledger.counting, False
        try:
            yield
        finally:
            self.ledger.counting = before

    def take_flops(self) -> dict[str, dict[str, float]]:
        """FLOPs by phase and kind since the last call, and forget them."""
        flops, self._flops = self._flops, defaultdict(lambda: defaultdict(float))
        return {phase: dict(kinds) for phase, kinds in flops.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _AT_READ if args[0].is_floating_point() else int(_AT_READ)
        out = self._compute(func, args, kwargs)
        working = (
            self.workspace[func._overloadpacket](*args, **kwargs) if func._overloadpacket in self.workspace else []
        )
        for tensor in tensors_in(working):
            self.ledger.see(tensor)
        for tensor in tensors_in(out):
            self.ledger.see(tensor)
        found = operation_flops(func, args, kwargs, out)
        if found is not None:
            kind, flops = found
            self._flops[self.ledger.phase][kind] += flops
        return out

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
        if any(isinstance(tensor, FakeTensor) for tensor in given) or (
            not given and not _makes_integers(func, args, kwargs)
        ):
            if func in _MASKED:
                args = (args[0], _as_indices(args[1]), *args[2:])
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            out = func(*args, **kwargs)
        return self._without_data(out)

    def _without_data(self, out: Any) -> Any:
        """Floats as tensors without data, of the same layout."""
        if isinstance(out, Tensor):
            if not out.is_floating_point():
                return out
            return aten.empty_strided.default(out.size(), out.stride(), dtype=out.dtype, device=out.device)
        return type(out)(self._without_data(part) for part in out) if isinstance(out, list | tuple) else out

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outputs as they are, and work that is finished; it holds on to the tensors, as that of real collectives
        does until it is waited for."""
        assert not kwargs
        self.communication.count(self.ledger.phase, func, args)
        done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        done.set_result(list(tensors_in(args)))
        work = _create_work_from_future(done).boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


def _makes_integers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a factory (an operator without tensors) makes integers or booleans."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point
    if func._overloadpacket in _INTEGER_FACTORIES:
        return all(isinstance(bound, int) for bound in args)
    return func._overloadpacket is aten.full and isinstance(args[1], int)


def _as_indices(indices: Any) -> list[Any]:
    """Indices in place of masks, whose number of true values decides a shape."""
    plain: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            assert not isinstance(index, FakeTensor), "a mask that depends on the numbers of a simulated tensor"
            with unset_fake_temporarily():
                plain += list(index.nonzero(as_tuple=True))
        else:
            plain.append(index)
    return plain
