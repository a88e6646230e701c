"""Training on GPUs follows the reference runs: with our own layers and with Transformer Engine's, on as many GPUs as
there are. Stop and resume, export, scoring and evaluation in bf16, with recomputation and kept logits: on a GPU where
there is one, and the same on a CPU."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bottom_right
import numpy as np
import pytest
import torch
from programs import TOOLS, Programs
from test_launch import ROOT, environment
from test_packed import data as packed_data
from test_scoring import BF16_RELATIVE
from test_training import metrics_of, reference_data
from tiny import SEQ_LENGTH, STRIDE, TINY_LLAMA, WINDOW, reference_rows

from megatron_tw.evaluation.result import EvaluationResult

__all__ = ["packed_data", "reference_data"]  # fixtures of test_packed and test_training
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
SHORT = ("--short-window", str(WINDOW), "--short-stride", str(STRIDE))
RUN = (
    *("--load-hf", str(TINY_LLAMA), "--seq-length", str(SEQ_LENGTH), "--no-shuffle", "--global-batch-size", "2"),
    *("--weighting", "dense", "--lr", "1e-3"),
)
FP32_RELATIVE = 2e-3
"""cuBLAS and the attention kernels add in other orders than a CPU, and 12 updates amplify that."""
SIZES = {"TP": "--tensor-model-parallel-size", "PP": "--pipeline-model-parallel-size", "CP": "--context-parallel-size"}


def start(tool: str, *options: str, gpus: int = 1) -> None:
    """A program of the project on GPUs, under the launcher."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    done = subprocess.run(
        [*launcher, f"tools/{TOOLS[tool]}.py", *options],
        cwd=ROOT,
        env=environment(CUDA_VISIBLE_DEVICES=visible),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture
def run(device: str, programs: Programs, tmp_path: Path) -> Callable[..., None]:
    """Runs a program on the device."""

    def on_cpu(tool: str, *options: str) -> None:
        answer = programs.run(tool, options, tmp_path, timeout=300)
        assert answer.status == 0, answer.stderr[-4000:]

    return on_cpu if device == "cpu" else start


def losses(data: Path, save: Path, *options: str, gpus: int = 1) -> np.ndarray:
    """The unweighted losses of 12 steps with dense weights."""
    given = [*RUN, *SHORT, "--data-path", str(data), "--save", str(save), "--train-iters", "12"]
    start("train", *given, *options, gpus=gpus)
    return metrics_of(save)["lm_loss"]


def skip_without(implementation: str, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    if implementation == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")


@needs_gpu
@pytest.mark.parametrize("axis", ["", "TP", "PP", "CP"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_trajectory(implementation, axis, reference, reference_data, tmp_path):
    gpus = 2 if axis else 1
    skip_without(implementation, gpus)
    options = ["--transformer-impl", implementation]
    if axis:
        options += [SIZES[axis], "2"]
    relative = FP32_RELATIVE
    if implementation == "transformer_engine":
        # Its fused attention, which context parallelism needs, is for half precision.
        options, relative = [*options, "--bf16"], BF16_RELATIVE
    expected = np.load(reference / "trajectory_dense_unfrozen.npz")["unweighted_loss"]
    np.testing.assert_allclose(losses(reference_data, tmp_path / "run", *options, gpus=gpus), expected, rtol=relative)


@needs_gpu
@pytest.mark.parametrize("ranks_of", ["", "CP"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_packed_rows(implementation, ranks_of, packed_data, programs, tmp_path):
    """With our attention and on Transformer Engine's THD path, against the same run on a CPU."""
    gpus = 2 if ranks_of else 1
    skip_without(implementation, gpus)
    options = ["--transformer-impl", implementation, *([SIZES[ranks_of], "2"] if ranks_of else [])]
    relative = FP32_RELATIVE
    if implementation == "transformer_engine":
        options, relative = [*options, "--bf16"], BF16_RELATIVE
    given = [*RUN, *SHORT, "--data-path", str(packed_data), "--save", str(tmp_path / "cpu"), "--train-iters", "12"]
    answer = programs.run("train", given, tmp_path, timeout=300)
    assert answer.status == 0, answer.stderr[-4000:]
    found = losses(packed_data, tmp_path / "gpu", *options, gpus=gpus)
    np.testing.assert_allclose(found, metrics_of(tmp_path / "cpu")["lm_loss"], rtol=relative)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_with_recomputation_and_kept_logits_resumes_exports_and_is_evaluated(
    run, device, reference_data, tmp_path
):
    def train(name: str, *options: str) -> dict[str, np.ndarray]:
        save = tmp_path / name
        given = [*RUN, *SHORT, "--data-path", str(reference_data), "--train-iters", "4", "--bf16"]
        run("train", *given, "--save", str(save), *options)
        return metrics_of(save)

    recomputing = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    saving = (*recomputing, "--loss-keep-logits-mib", "1")
    plain = train("plain", "--loss-keep-logits-mib", "0")
    straight = train("straight", *saving, "--save-hf", str(tmp_path / "hf"))
    train("stopped", *saving, "--exit-interval", "2")
    resumed = train("stopped", *saving, "--load", str(tmp_path / "stopped"))
    exact = 0.0 if device == "cpu" else 1e-3  # a GPU's attention adds up in another order each time
    for key in ("lm_loss", "weighted_loss", "weight_std", "grad_norm"):
        np.testing.assert_allclose(resumed[key], straight[key], rtol=exact, err_msg=key)
        np.testing.assert_allclose(straight[key], plain[key], rtol=BF16_RELATIVE, err_msg=key)

    folder = str(tmp_path / "evaluation")
    rows = ["--data-path", str(reference_data), "--seq-length", str(SEQ_LENGTH), "--eval-rows", "2"]
    run("evaluate", "--load", str(tmp_path / "straight"), *rows, *SHORT, "--bf16", "--output", folder)
    result = EvaluationResult.load(folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    order = np.load(ROOT / "tests" / "reference" / "trajectory_uniform.npz")["row_index"].flatten()
    ids_RN = torch.from_numpy(reference_rows()[order[:2]]).long()
    with torch.no_grad():
        logits_RTV = model(ids_RN).logits[:, :-1]
    nll_RT = torch.nn.functional.cross_entropy(logits_RTV.transpose(1, 2), ids_RN[:, 1:], reduction="none").numpy()
    assert abs(result.long_nll - nll_RT).mean() < BF16_RELATIVE * nll_RT.mean()


@pytest.mark.parametrize("device", DEVICES)
def test_scores_from_disk_train_as_the_reference_did(run, device, reference, reference_data, tmp_path):
    scores, save = str(tmp_path / "scores"), tmp_path / "run"
    data = ("--data-path", str(reference_data))
    run("score", "--load-hf", str(TINY_LLAMA), *data, *SHORT, "--output", scores)
    frozen = ("--scorer", "frozen", "--scores", scores)
    run("train", *RUN, *SHORT, *data, *frozen, "--train-iters", "12", "--save", str(save))
    expected = np.load(reference / "trajectory_dense_frozen.npz")["unweighted_loss"]
    np.testing.assert_allclose(metrics_of(save)["lm_loss"], expected, rtol=FP32_RELATIVE)


def test_bottom_right_attention_holds_no_matrix_of_scores():
    options = ["--keys", "4096", "--heads", "8", "--groups", "2", "--head-size", "64", "--output", "unused"]
    figures = bottom_right.measure(bottom_right.build_parser().parse_args(options), 4096)
    assert figures["kernels"]
    assert "math" not in figures["kernels"]
    assert figures["extra_bytes"] < figures["scores_bytes"]
