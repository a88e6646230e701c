"""What one transformer layer leaves for its backward pass, read off autograd's graph after its first forward pass."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_tw.planning.communication import tensors_in


class SavedByLayer:
    """Watches one layer of a model. bytes: name of a saved tensor -> size of its storage, once the layer has run; the
    weights are left out, and a storage that several operators saved counts once.

    A name is "module: operator attribute [shape] dtype", for example "mlp.linear_fc1: LinearWithGradAccumulation...
    saved 0 [8192, 1, 4096] bfloat16".
    """

    def __init__(self, layer: torch.nn.Module, recomputed_together: int) -> None:
        """recomputed_together: layers that are run again at once, where they are (their input is all that is kept)."""
        self.bytes: dict[str, int] = {}
        self._layer, self._together = layer, recomputed_together
        self._nodes: dict[Any, str] = {}
        """Operators of the layer -> the innermost module that ran them, the layer's inputs among them with ""."""
        hooks = [layer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        hooks += [
            module.register_forward_hook(self._after(name))
            for name, module in layer.named_modules()
            if module is not layer
        ]
        hooks.append(layer.register_forward_hook(self._end))
        self._hooks = hooks

    def _begin(self, layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = list(tensors_in([*args, *kwargs.values()]))
        self._nodes = {x.grad_fn: "" for x in self._inputs if x.grad_fn is not None}

    def _after(self, name: str) -> Any:
        def label(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._label(output, name)

        return label

    def _label(self, output: Any, name: str) -> None:
        waiting = [x.grad_fn for x in tensors_in(output) if x.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node not in self._nodes:
                self._nodes[node] = name
                waiting += [following for following, _ in node.next_functions if following is not None]

    def _end(self, layer: torch.nn.Module, args: Any, output: Any) -> None:
        if not any(chunk.training for chunk in [layer]):
            self._nodes.clear()  # the scoring pass
            return
        for hook in self._hooks:
            hook.remove()
        if not torch.is_grad_enabled():
            hidden = max(self._inputs, key=lambda x: x.numel() if x.is_floating_point() else 0)
            name = f"input {_shape(hidden)}, kept for {self._together} layers that are run again"
            self.bytes[name] = hidden.untyped_storage().nbytes() // self._together
        else:
            self._label(output, "layer")
            self._collect(layer)
        self._nodes, self._inputs = {}, []

    def _collect(self, layer: torch.nn.Module) -> None:
        known = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
        for node, module in reversed(self._nodes.items()):
            if not module:
                continue
            for attribute, tensor in _saved_by(node):
                storage = tensor.untyped_storage()
                if storage._cdata in known:
                    continue
                known.add(storage._cdata)
                name = f"{module}: {node.name().removesuffix('0')} {attribute} {_shape(tensor)}"
                self.bytes[name] = self.bytes.get(name, 0) + storage.nbytes()


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _saved_by(node: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an operator keeps: attributes of PyTorch's own, `saved_tensors` of those written in Python.

    Looked at without unpacking: hooks on saved tensors (a gather that is made again) would run. What such hooks keep
    instead is told, too.
    """
    for index, saved in enumerate(getattr(node, "_raw_saved_tensors", ())):
        yield from _held(f"saved {index}", saved)
    for attribute in dir(node):
        if attribute.startswith("_raw_saved_") and attribute != "_raw_saved_tensors":
            value = getattr(node, attribute)
            for saved in value if isinstance(value, list | tuple) else [value]:
                yield from _held(attribute.removeprefix("_raw_saved_"), saved)


def _held(name: str, saved: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(saved.data, Tensor):
        yield name, saved.data
    keeper = getattr(saved.unpack_hook, "__self__", None)
    for own, value in vars(keeper).items() if keeper is not None else ():
        if isinstance(value, Tensor):
            yield f"{own}, for {name}", value
