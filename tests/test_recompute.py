"""What is computed or gathered again in the backward pass: the same numbers, from less memory."""

import gc
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from test_training import DENSE, METRICS, options, reference_data, run_steps
from tiny import SEQ_LENGTH, TINY_LLAMA, Axes, layout_of, make_folder, reference_rows
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tw.config import ActivationConfig, ComputeConfig, ModelConfig, TrainConfig
from megatron_tw.model import context_gather
from megatron_tw.model.architecture import read_architecture
from megatron_tw.model.build import build_model, load_hf
from megatron_tw.model.forward import call_model, long_sequences
from megatron_tw.parallel.devices import prepare_device

__all__ = ["reference_data"]  # a fixture of test_training
TRAIN = TrainConfig(train_iters=2, global_batch_size=2)
AGAIN = ActivationConfig(recompute_cp_gather=True)
SELECTIVE = ActivationConfig(recompute_granularity="selective")
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(
    ("axes", "bf16", "recompute"),
    [
        pytest.param(Axes(cp=2), False, {}, marks=pytest.mark.full),
        (Axes(cp=2), True, FULL),
        (Axes(tp=2, cp=2), True, {}),
        (Axes(pp=2, cp=2, vpp_layers=1), False, {}),
        pytest.param(Axes(cp=4), True, {}, marks=pytest.mark.full),
        pytest.param(Axes(tp=2, pp=2, cp=2), True, {}, marks=pytest.mark.full),
    ],
    ids=lambda value: value.name if isinstance(value, Axes) else None,
)
def test_gathering_again_changes_no_bit(axes, bf16, recompute, ranks, reference_data):
    compute = ComputeConfig(bf16=bf16)
    plain, again = ranks(axes.world_size).run(
        run_steps,
        axes,
        [
            options(axes, reference_data, weighting=DENSE, train=TRAIN, compute=compute, activations=one)
            for one in (ActivationConfig(**recompute), ActivationConfig(**recompute, recompute_cp_gather=True))
        ],
    )[0]
    for key in METRICS:
        assert again[key] == plain[key], key


@pytest.mark.parametrize("modules", [("mlp",), ("core_attn", "mlp")])
def test_recomputed_modules_change_nothing(modules, ranks, reference_data):
    axes = Axes(tp=2)
    activations = [ActivationConfig(), ActivationConfig(recompute_granularity="selective", recompute_modules=modules)]
    plain, again = ranks(axes.world_size).run(
        run_steps,
        axes,
        [options(axes, reference_data, weighting=DENSE, train=TRAIN, activations=one) for one in activations],
    )[0]
    for key in METRICS:
        np.testing.assert_allclose(again[key], plain[key], rtol=1e-6, err_msg=key)


def test_layers_side_by_side_recompute_their_mlp(ranks, reference_data, tmp_path):
    model = ModelConfig(load_hf=str(make_folder("phi", tmp_path / "phi")))
    mlp = ActivationConfig(recompute_granularity="selective", recompute_modules=("mlp",))
    config = partial(options, Axes(), reference_data, weighting=DENSE, train=TRAIN, model=model)
    configs = [config(activations=one) for one in (ActivationConfig(), mlp)]
    plain, again = ranks(1).run(run_steps, Axes(), configs)[0]
    assert again == plain


class Live(TorchDispatchMode):
    """Bytes of the storages made within it that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Any] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = weakref.ref(storage)
        return out

    @property
    def bytes(self) -> int:
        gc.collect()
        alive = {id(storage): storage for storage in (made() for made in self.made.values()) if storage is not None}
        return sum(storage.nbytes() for storage in alive.values())


def kept_for_backward(axes: Axes, every: list[ActivationConfig]) -> list[tuple[int, int, int, list[torch.Tensor]]]:
    """On a rank, for each: bytes alive after a forward pass, gathers of forward and of backward, gradients."""
    results = []
    gather, calls = context_gather._gather, list[bool]()

    def counted(kv_2BGSD: torch.Tensor, group: Any) -> torch.Tensor:
        calls.append(True)
        return gather(kv_2BGSD, group)

    architecture = read_architecture(TINY_LLAMA)
    with layout_of(axes) as layout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_gather, "_gather", counted)
        for activations in every:
            chunks = build_model(
                architecture, axes.parallel(), ComputeConfig(), layout, prepare_device(), activations=activations
            )
            load_hf(chunks, TINY_LLAMA, architecture, layout)
            sequences = long_sequences(torch.from_numpy(reference_rows())[:1], layout)
            calls.clear()
            with Live() as live:
                loss = call_model(chunks[0], sequences).sum()
                kept = live.bytes
            forward = len(calls)
            loss.backward()
            gradients = [parameter.grad for parameter in chunks[0].parameters()]
            results.append((kept, forward, len(calls) - forward, gradients))
    return results


def test_gathered_keys_and_values_are_not_kept(ranks):
    axes, layers = Axes(cp=4), 4
    plain, again, selective = ranks(4).run(kept_for_backward, axes, [ActivationConfig(), AGAIN, SELECTIVE])[0]
    shape = read_architecture(TINY_LLAMA)
    gathered = 2 * SEQ_LENGTH * shape.num_query_groups * shape.head_dim * 4  # keys and values of all tokens, fp32
    assert plain[0] - again[0] == layers * (gathered - gathered // axes.cp)
    assert plain[0] - selective[0] >= layers * gathered
    assert [one[1:3] for one in (plain, again, selective)] == [(layers, 0), (layers, layers), (layers, layers)]
    for one, other in zip(plain[3], again[3], strict=True):
        assert torch.equal(one, other)
