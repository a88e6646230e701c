"""Training on GPUs follows the reference runs: with our own layers and with Transformer Engine's, on as many GPUs as
there are."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_launch import ROOT, environment
from test_scoring import BF16_RELATIVE
from test_training import metrics_of, reference_data
from tiny import SEQ_LENGTH, STRIDE, TINY_LLAMA, WINDOW

__all__ = ["reference_data"]  # a fixture of test_training
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
FP32_RELATIVE = 2e-3
"""cuBLAS and the attention kernels add in other orders than a CPU, and 12 updates amplify that."""
SIZES = {"TP": "--tensor-model-parallel-size", "PP": "--pipeline-model-parallel-size", "CP": "--context-parallel-size"}


def losses(data: Path, save: Path, *options: str, gpus: int = 1) -> np.ndarray:
    """The unweighted losses of 12 steps with dense weights."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)),
        *("tools/train.py", "--load-hf", str(TINY_LLAMA), "--data-path", str(data), "--save", str(save)),
        *("--seq-length", str(SEQ_LENGTH), "--no-shuffle", "--global-batch-size", "2", "--train-iters", "12"),
        *("--weighting", "dense", "--short-window", str(WINDOW), "--short-stride", str(STRIDE), "--lr", "1e-3"),
        *options,
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(CUDA_VISIBLE_DEVICES=visible),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return metrics_of(save)["lm_loss"]


@pytest.mark.parametrize("axis", ["", "TP", "PP", "CP"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_trajectory(implementation, axis, reference, reference_data, tmp_path):
    gpus = 2 if axis else 1
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    if implementation == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")
    options = ["--transformer-impl", implementation]
    if axis:
        options += [SIZES[axis], "2"]
    relative = FP32_RELATIVE
    if implementation == "transformer_engine":
        # Its fused attention, which context parallelism needs, is for half precision.
        options, relative = [*options, "--bf16"], BF16_RELATIVE
    expected = np.load(reference / "trajectory_dense_unfrozen.npz")["unweighted_loss"]
    np.testing.assert_allclose(losses(reference_data, tmp_path / "run", *options, gpus=gpus), expected, rtol=relative)
