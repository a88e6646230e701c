"""FLOPs by formula against counted ones: transformers' whole model, and the real training step on ranks."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import SEQ_LENGTH, TINY_LLAMA, Axes, layout_of, make_folder, prepare_ready_rows, reference_rows, release
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from megatron_tw.config import (
    ActivationConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)
from megatron_tw.model.architecture import read_architecture
from megatron_tw.model.flops import layers_work, model_flops
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.parallel.gpus import GPUS, gpu_of
from megatron_tw.training.flops import rates
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

aten = torch.ops.aten


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi"])
def test_model_flops_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    folder = make_folder(family, tmp_path / family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids_RN = torch.randint(3, 300, (2, SEQ_LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids_RN).logits.sum().backward()
    architecture = read_architecture(folder)
    masked_half = 3 * layers_work(architecture, 2, SEQ_LENGTH).attention  # which transformers works out all the same
    assert model_flops(architecture, 2, SEQ_LENGTH) == pytest.approx(counter.get_total_flops() - masked_half, rel=0.01)


def _attention_flops(count: Any, queries: int, *shapes: Any, out_shape: Any = None, **unused: Any) -> int:
    """What PyTorch's flop counter lacks for a CPU's flash attention; a causal mask leaves out half of the last
    square. Every attention of ours is causal."""
    query, key, value = shapes[queries : queries + 3]
    heads = lambda shape: (shape[0], query[1], *shape[2:])  # noqa: E731
    flops = count(*shapes[:queries], query, heads(key), heads(value))
    return int(flops * (1 - query[2] / (2 * key[2])))


COUNTED = {
    aten.addmm_: lambda _, left, right, **unused: flop_registry[aten.mm](left, right),
    aten._scaled_dot_product_flash_attention_for_cpu: partial(_attention_flops, sdpa_flop_count, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: partial(_attention_flops, sdpa_backward_flop_count, 1),
}


def counted_step(config: RunConfig, axes: Axes) -> tuple[float, float, float]:
    """On a rank: the FLOPs counted in its first step, and what the metrics say of all ranks' hardware and model."""
    with layout_of(axes) as layout:
        run = Run.start(config, open_inputs(config), layout, prepare_device())
        batches = next(run.loader)
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            metrics = run.step(batches, 0)
        release(run.step.model)
    total = torch.tensor(float(counter.get_total_flops()), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total), metrics["hardware_flops"], metrics["model_flops"]


LIVE = ScorerConfig(scorer="frozen", scorer_hf=str(TINY_LLAMA))
FULL = ActivationConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
WINDOWS = WindowsConfig(short_window=64, short_stride=40)
CASES: dict[str, tuple[Axes, str, dict[str, Any]]] = {
    "TP2-sparse": (Axes(tp=2), "sparse", {}),
    "CP2-dense-again": (Axes(cp=2), "dense", {"activations": ActivationConfig(loss_keep_logits_mib=0)}),
    "DP2-micro-batches": (Axes(dp=2), "dense", {"windows": replace(WINDOWS, scoring_micro_batch=3)}),
    "PP2-recompute": (Axes(pp=2), "dense", {"activations": FULL}),
    "CP2-selective-frozen": (
        Axes(cp=2),
        "dense",
        {"activations": ActivationConfig(recompute_granularity="selective"), "scorer": LIVE},
    ),
    "TP2-mlp-again": (
        Axes(tp=2),
        "dense",
        {"activations": ActivationConfig(recompute_granularity="selective", recompute_modules=("mlp",))},
    ),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_ready_rows(reference_rows(), tmp_path_factory.mktemp("rows") / "rows")


@pytest.mark.parametrize("name", CASES)
def test_hardware_flops_are_those_of_a_step(name: str, rows: Path, ranks: Any) -> None:
    axes, weighting, groups = CASES[name]
    options: dict[str, Any] = {
        "parallel": axes.parallel(),
        "model": ModelConfig(load_hf=str(TINY_LLAMA)),
        "data": DataConfig(data_path=(str(rows),), seq_length=SEQ_LENGTH),
        "train": TrainConfig(train_iters=1, global_batch_size=4),
        "weighting": WeightingOptions(weighting=weighting),
        "windows": WINDOWS,
    }
    steps = ranks(axes.world_size).run(counted_step, RunConfig(**{**options, **groups}), axes)
    for counted, hardware, model in steps:
        assert hardware == pytest.approx(counted, rel=0.01)
        assert model == model_flops(read_architecture(TINY_LLAMA), 4, SEQ_LENGTH)


def test_rates_are_those_of_one_gpu() -> None:
    metrics = rates(989e12 * 2 * 8, 4.0, 8, GPUS["h100"])
    assert metrics == pytest.approx({"tflops_per_second_per_gpu": 494.5, "model_flops_utilization": 0.5})
    assert rates(1e12, 1.0, 1, gpu_of("Somebody's GPU")) == {}


def test_known_gpus_are_found_by_their_names() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": None,
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA H200 NVL": None,
        "NVIDIA B200": "b200",
        "NVIDIA GB200": None,
    }
    assert {name: gpu and gpu.kind for name in names for gpu in [gpu_of(name)]} == names
