"""What of Transformer Engine, Apex, NCCL and compilers a run uses: decided on a CPU as a GPU would, handed to
Megatron-Core under the names that it has, switched off while the model scores, refused where it is not there."""

import inspect
import os
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, optimizer_config
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig
from test_training import DENSE, METRICS, options, reference_data, run_steps
from tiny import TINY_LLAMA, Axes, layout_of, make_folder, release

from megatron_tw.config import (
    ActivationConfig,
    ComputeConfig,
    KernelConfig,
    OptimizationConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_tw.losses import logit_tiles, triton_tiles
from megatron_tw.model import build
from megatron_tw.model.architecture import read_architecture, transformer_config
from megatron_tw.model.kernels import BUFFER_TOKENS, Parts, as_in_scoring, kernel_fields
from megatron_tw.model.user_buffers import buffer_arguments
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.runtime import determinism, optimizer
from megatron_tw.runtime.determinism import be_deterministic
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

__all__ = ["reference_data"]  # a fixture of test_training
H100 = Parts(gpu=True, capability=(9, 0), transformer_engine=True, apex=True, compiler=True)
LLAMA: dict[str, Any] = {"swiglu": True, "fused_activation": True, "rotary_factor": 1.0}
FUSIONS = ("gradient_accumulation_fusion", "apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion")


def fusions(kernels: KernelConfig, parts: Parts, **model: Any) -> list[bool]:
    decided = kernel_fields(kernels, parts, **LLAMA | model)
    return [decided[name] for name in FUSIONS]


def test_fusions_are_on_where_what_they_need_is() -> None:
    assert fusions(KernelConfig(), H100) == [True, True, True, True]
    assert fusions(KernelConfig(), Parts()) == [False] * 4
    assert fusions(KernelConfig(), replace(H100, apex=False)) == [False, True, True, True]
    assert fusions(KernelConfig(), replace(H100, transformer_engine=False)) == [True, False, True, True]
    assert fusions(KernelConfig(), replace(H100, compiler=False)) == [True, True, False, False]
    assert fusions(KernelConfig(), H100, rotary_factor=1.2) == [True, False, True, True]
    assert fusions(KernelConfig(), H100, swiglu=False, fused_activation=False) == [True, True, False, True]
    off = KernelConfig(
        gradient_accumulation_fusion=False, rope_fusion=False, bias_swiglu_fusion=False, bias_dropout_fusion=False
    )
    assert fusions(off, H100) == [False] * 4


@pytest.mark.parametrize(
    ("asked", "parts", "model", "said"),
    [
        ({"gradient_accumulation_fusion": True}, {"apex": False}, {}, "--gradient-accumulation-fusion: expected a GPU"),
        ({"rope_fusion": True}, {"transformer_engine": False}, {}, "--rope-fusion: expected Transformer Engine's"),
        ({"rope_fusion": True}, {}, {"rotary_factor": 1.2}, "--rope-fusion: expected a rotary embedding without"),
        ({"bias_swiglu_fusion": True}, {"compiler": False}, {}, "--bias-swiglu-fusion: expected a GPU, a working"),
        (
            {"bias_swiglu_fusion": True},
            {},
            {"swiglu": False, "fused_activation": False},
            "--bias-swiglu-fusion: expected a model with SwiGLU",
        ),
        ({"bias_dropout_fusion": True}, {"compiler": False}, {}, "--bias-dropout-fusion: expected a GPU"),
        ({"tp_comm_overlap": True}, {"transformer_engine": False}, {}, "--tp-comm-overlap: expected Transformer"),
        ({"fp8_format": "hybrid"}, {"transformer_engine": False}, {}, "--fp8-format hybrid: expected Transformer"),
        (
            {"fp8_format": "hybrid", "fp8_recipe": "mxfp8"},
            {},
            {},
            "--fp8-recipe mxfp8: expected a GPU of compute capability 10.0 or more, got 9.0",
        ),
        ({"fp8_format": "hybrid"}, {"capability": (8, 0)}, {}, "--fp8-recipe delayed: expected a GPU of compute cap"),
    ],
)
def test_what_is_asked_for_and_not_there_is_named(asked, parts, model, said) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        kernel_fields(KernelConfig(**asked), replace(H100, **parts), **LLAMA | model)


def config_of(kernels: KernelConfig, parts: Parts, folder: Path = TINY_LLAMA, **activations: Any) -> TransformerConfig:
    return transformer_config(
        read_architecture(folder),
        ParallelConfig(tensor_model_parallel_size=2),
        ComputeConfig(bf16=True),
        ActivationConfig(**activations),
        on_gpu=True,
        num_model_chunks=None,
        kernels=kernels,
        parts=parts,
    )


def test_megatron_is_told() -> None:
    """Its own configuration takes the fields and their values (rotary fusion it only takes where the kernel is)."""
    known = {field.name for field in fields(TransformerConfig)}
    asked = KernelConfig(
        rope_fusion=False, deterministic_mode=True, fp8_format="hybrid", fp8_margin=1,
        fp8_amax_history_len=1024, fp8_amax_compute_algo="max",
    )  # fmt: skip
    assert kernel_fields(asked, H100, **LLAMA).keys() <= known
    config = config_of(asked, H100, recompute_granularity="selective", recompute_modules=("mlp", "core_attn"))
    assert (config.fp8, config.fp8_recipe, config.fp8_margin) == ("hybrid", "delayed", 1)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    assert config.gradient_accumulation_fusion
    assert config.deterministic_mode
    assert config.recompute_modules == ["mlp", "core_attn"]
    overlapped = config_of(KernelConfig(rope_fusion=False, tp_comm_overlap=True), H100)
    assert overlapped.tp_comm_overlap
    assert overlapped.tp_comm_bootstrap_backend == "nccl"
    assert overlapped.fp8 is None


def test_yarn_is_rotated_without_the_fusion(tmp_path) -> None:
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64
    }  # fmt: skip
    folder = make_folder("llama", tmp_path / "yarn", rope_parameters=rope)
    assert not config_of(KernelConfig(), replace(H100, compiler=False), folder).apply_rope_fusion


class Quantization(Enum):
    """Transformer Engine's UserBufferQuantizationMode."""

    NONE = "none"
    FP8 = "fp8"


def initialize_ub(
    shape, tp_size, use_fp8=False, quantization_modes=None, dtype=None, ub_cfgs=None, bootstrap_backend=None
) -> None:
    """The signature of Transformer Engine 2.10."""


def initialize_ub_1_9(shape, tp_size, use_fp8=False, dtype=None, ub_cfgs=None, bootstrap_backend=None) -> None:
    """That of 1.9 to 2.6."""


@pytest.mark.parametrize("fp8_format", [None, "hybrid"])
def test_user_buffers_are_asked_for_as_megatron_does(fp8_format) -> None:
    kernels = KernelConfig(tp_comm_overlap=True, tp_comm_bootstrap_backend="gloo", fp8_format=fp8_format)
    for function in (initialize_ub, initialize_ub_1_9):
        given = buffer_arguments(function, kernels, tokens=4096, hidden_size=64, tp_size=2, modes=Quantization)
        bound = inspect.signature(function).bind(**given).arguments
        assert (bound["shape"], bound["tp_size"], bound["bootstrap_backend"]) == ([4096, 64], 2, "gloo")
        if function is initialize_ub:
            both = [Quantization.FP8, Quantization.NONE]
            assert bound["quantization_modes"] == (both if fp8_format else [Quantization.NONE])
        else:
            assert bound["use_fp8"] == bool(fp8_format)


class Chunk(torch.nn.Module):
    """A model chunk that only keeps what it is built with."""

    def __init__(self, architecture: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config


@pytest.mark.parametrize("overlap", [True, False])
def test_a_build_makes_the_user_buffers_it_needs(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the layers, and for the tokens that the configuration then names."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(build, "make_user_buffers", lambda kernels, **sizes: made.append(sizes))
    monkeypatch.setattr(build.Parts, "here", staticmethod(lambda device, *, transformer_engine: H100))
    monkeypatch.setattr(build, "layer_spec", lambda *args, **options: bool(made) == overlap or pytest.fail("too late"))
    monkeypatch.setattr(build, "TokenWeightedGPT", Chunk)
    layout: Any = SimpleNamespace(tp_size=2, pp_rank=0, is_last_stage=True, vpp_size=None)
    architecture = read_architecture(TINY_LLAMA)
    (chunk,) = build.build_model(
        architecture,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ComputeConfig(bf16=True),
        layout,
        prepare_device(),
        kernels=KernelConfig(rope_fusion=False, tp_comm_overlap=overlap),
        tokens=128,
    )
    sizes = {"tokens": 128, "hidden_size": architecture.hidden_size, "tp_size": 2}
    assert made == ([sizes] if overlap else [])
    assert getattr(chunk.config, BUFFER_TOKENS, None) == (128 if overlap else None)


def test_user_buffers_are_not_used_for_other_tokens() -> None:
    config = config_of(KernelConfig(rope_fusion=False, tp_comm_overlap=True), H100)
    setattr(config, BUFFER_TOKENS, 128)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer in model:  # as Transformer Engine's linear modules
        vars(layer).update(config=config, ub_overlap_ag_fprop=True, ub_bulk_wgrad=True, ub_overlap_rs_fprop=False)

    def uses() -> list[tuple[bool, ...]]:
        names = ("ub_overlap_ag_fprop", "ub_bulk_wgrad", "ub_overlap_rs_fprop")
        return [tuple(vars(layer)[name] for name in names) for layer in model]

    for tokens, used in ((128, True), (64, False)):
        with as_in_scoring([model], tokens):
            assert uses() == [(used, used, False)] * 2
        assert uses() == [(True, True, False)] * 2


def contexts_of_a_step(config) -> list[bool]:
    """On a rank: for each forward pass of a step, with fp8 in the model's configuration, whether it asked for FP8; and
    whether it had gradients."""
    asked: list[bool] = []
    inputs = open_inputs(config)
    with layout_of(Axes()) as layout, pytest.MonkeyPatch.context() as patch:
        run = Run.start(config, inputs, layout, prepare_device())
        run.chunks[0].config.fp8 = "hybrid"
        run.chunks[0].config.fp8_recipe = "delayed"
        plain = transformer_block.get_fp8_context

        def seen(*args: Any, **kwargs: Any) -> Any:
            asked.append(torch.is_grad_enabled())
            return plain(*args, **kwargs)

        patch.setattr(transformer_block, "get_fp8_context", seen)
        run.step(next(run.loader), 0)
        assert run.chunks[0].config.fp8 == "hybrid"
        release(run.step.model)
    return asked


def test_scoring_is_not_in_fp8(ranks, reference_data) -> None:
    """Two micro-batches train; before them one pass scores."""
    config = options(Axes(), reference_data, weighting=DENSE, train=TrainConfig(train_iters=1, global_batch_size=2))
    [asked] = ranks(1).run(contexts_of_a_step, config)
    assert asked == [True, True]


def test_the_optimizer_is_told(monkeypatch, reference_data) -> None:
    """Megatron's own configuration takes the fields; it refuses without Transformer Engine, as we do before."""
    precise = OptimizationConfig(
        use_precision_aware_optimizer=True, main_grads_dtype="bf16", exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"
    )
    config = options(Axes(), reference_data, optimizer=precise)
    with pytest.raises(ValueError, match=r"^--use-precision-aware-optimizer: expected Transformer Engine with"):
        optimizer.optimizer_fields(config)
    monkeypatch.setattr(optimizer, "USING_TE_OPTIMIZER", True)
    assert optimizer.optimizer_fields(config)["exp_avg_dtype"] == torch.bfloat16
    offloaded = replace(config, optimizer=replace(precise, optimizer_cpu_offload=True, optimizer_offload_fraction=0.5))
    with pytest.raises(ValueError, match=r"^--optimizer-cpu-offload: expected a GPU"):
        optimizer.optimizer_fields(offloaded)
    monkeypatch.setattr(optimizer, "prepare_device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
    told = OptimizerConfig(**optimizer.optimizer_fields(offloaded))
    assert (told.main_grads_dtype, told.main_params_dtype) == (torch.bfloat16, torch.float32)
    assert (told.exp_avg_dtype, told.exp_avg_sq_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (told.optimizer_cpu_offload, told.optimizer_offload_fraction) == (True, 0.5)


def failing_compile(*args: Any, **kwargs: Any) -> None:
    """A C compiler without Python's headers, as Triton calls it."""
    source = "#include <Python-is-not-here.h>\n"
    subprocess.run(["cc", "-x", "c", "-c", "-", "-o", os.devnull], input=source.encode(), check=True, stderr=-3)


def no_compiler(*args: Any, **kwargs: Any) -> None:
    """Triton's words without one."""
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


@pytest.mark.parametrize("fails", [failing_compile, no_compiler])
def test_without_a_compiler_one_warning_and_plain_tiles(fails, monkeypatch) -> None:
    """Triton is there and its first launch, which compiles, fails."""
    tried: list[bool] = []

    def launch(*args: Any, **kwargs: Any) -> None:
        tried.append(True)
        fails()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return launch

    monkeypatch.setattr(logit_tiles.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_tiles, "_kernels", lambda: (Kernel(), Kernel()))
    compiles, device = logit_tiles.kernels_compile, torch.device("cpu")
    compiles.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Triton's kernels cannot be compiled here") as told:
            assert [compiles(device) for _ in range(3)] == [False] * 3
        assert (len(told), len(tried)) == (1, 1)
        monkeypatch.setattr(logit_tiles, "kernels_compile", lambda device: False)
        assert logit_tiles.tile_operations(torch.device("cuda"), torch.float32) is logit_tiles.PLAIN
    finally:
        compiles.cache_clear()


def test_with_a_compiler_the_kernels_are_taken(monkeypatch) -> None:
    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: None

    monkeypatch.setattr(logit_tiles.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_tiles, "_kernels", lambda: (Kernel(), Kernel()))
    logit_tiles.kernels_compile.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logit_tiles.kernels_compile(torch.device("cpu"))
    logit_tiles.kernels_compile.cache_clear()
    monkeypatch.setattr(logit_tiles, "kernels_compile", lambda device: True)
    assert logit_tiles.tile_operations(torch.device("cuda"), torch.float32) is triton_tiles


def test_deterministic_mode_sets_what_is_not_set(monkeypatch) -> None:
    switched: list[bool] = []
    monkeypatch.setattr(determinism.torch, "use_deterministic_algorithms", switched.append)
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    be_deterministic(environment)
    assert environment == {
        "NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"
    }  # fmt: skip
    assert switched == [True]


@pytest.mark.parametrize(
    ("name", "value"),
    [("NCCL_ALGO", "Ring,Tree"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")],
)
def test_deterministic_mode_refuses_the_opposite(name, value) -> None:
    environment = {name: value}
    with pytest.raises(ValueError, match=f"^--deterministic-mode: {name}: expected .*, got '{value}'"):
        be_deterministic(environment)
    assert environment == {name: value}
    assert not torch.are_deterministic_algorithms_enabled()


def deterministic_steps(axes: Axes, configs: list) -> list:
    """On a rank: steps in deterministic mode, of which PyTorch refuses what it has no deterministic algorithm for."""
    torch.use_deterministic_algorithms(True)
    try:
        return run_steps(axes, configs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_mode_learns_the_same(ranks, reference_data) -> None:
    axes = Axes(tp=2)
    train = TrainConfig(train_iters=2, global_batch_size=2)
    plain, deterministic = (
        options(axes, reference_data, weighting=DENSE, train=train, kernels=KernelConfig(deterministic_mode=mode))
        for mode in (False, True)
    )
    pool = ranks(2)
    [once, again] = pool.run(deterministic_steps, axes, [deterministic, deterministic])[0]
    [expected] = pool.run(run_steps, axes, [plain])[0]
    assert once == again
    for key in METRICS:
        assert once[key] == pytest.approx(expected[key], rel=1e-6), key


def test_a_run_is_deterministic_before_it_joins_its_world() -> None:
    """The environment is read when CUDA and NCCL begin: `train` sets it first."""
    code = """
import os, torch
from megatron_tw.training import loop
from megatron_tw.config import *
def joined(parallel):
    print(os.environ["NCCL_ALGO"], torch.are_deterministic_algorithms_enabled())
    raise SystemExit
loop.join_world = joined
loop.train(RunConfig(data=DataConfig(data_path=("d",), seq_length=8), train=TrainConfig(train_iters=1),
                     kernels=KernelConfig(deterministic_mode=True)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Ring", "True"]


def test_programs_start_without_the_compiler() -> None:
    """What Megatron-Core hands to torch.compile is compiled when it is first called."""
    code = """
import sys, torch
compile_now = torch.compile
import megatron_tw.training.loop
from megatron.core.jit import jit_fuser
assert torch.compile is compile_now
assert jit_fuser is not compile_now
assert not {"torch._inductor.compile_fx", "torch._dynamo"} & sys.modules.keys()
twice = jit_fuser(lambda x: 2 * x, backend="eager")
assert "torch._dynamo" not in sys.modules
assert twice(torch.ones(2)).tolist() == [2, 2]
assert "torch._dynamo" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
