"""Training models of other families equals an independent trainer: transformers' model, full logits, the method as
published, and torch's AdamW, on one process in fp32. Imports nothing of the project's own for the oracle.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import metrics_of, run_all, run_steps
from tiny import BOS, SEQ_LENGTH, STRIDE, VOCAB, WINDOW, Axes, prepare_ready_rows, reference_rows
from torch import Tensor

from megatron_tw.config import RunConfig, parse_options

STEPS, ROWS_A_STEP = 6, 2
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.01, 1.0
RELATIVE = 2e-4  # fp32 sums in another order, over six steps; as the reference trajectories
SCHEMES = {"dense": ["--interpolation", "0.75"], "sparse": ["--sparsification", "0.2"]}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LAYOUTS = [Axes(), Axes(tp=2), Axes(cp=2)]
FULL_LAYOUTS = [
    Axes(pp=2),
    Axes(tp=4),
    Axes(tp=2, cp=2),
    Axes(pp=2, vpp_layers=1),
]  # TP 4: more ranks than key-value heads
EACH_LAYOUT = [pytest.param(axes, id=axes.name) for axes in LAYOUTS] + [
    pytest.param(axes, id=axes.name, marks=pytest.mark.full) for axes in FULL_LAYOUTS
]


def make_folder(family: str, folder: Path) -> Path:
    """A random tiny model in Hugging Face format. Biases, norms and embeddings are not at their initial values."""
    import transformers

    config: transformers.PretrainedConfig
    if family == "qwen3":
        config = transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    else:
        rope = YARN if family == "phi-yarn" else {"rope_type": "default", "rope_theta": 10000.0}
        rope = {**rope, "partial_rotary_factor": 0.5}
        config = transformers.PhiConfig(**SHAPE, resid_pdrop=0.1, rope_parameters=rope)
    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def nll_of(model: torch.nn.Module, tokens_RN: Tensor) -> Tensor:
    """NLL [R, N - 1] from the whole logits; positions start at 0."""
    logits = model(input_ids=tokens_RN, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens_RN[:, 1:], reduction="none")


@torch.no_grad()
def short_nll_of(model: torch.nn.Module, row_N: Tensor, long_T: Tensor) -> Tensor:
    """Of the model itself: window k >= 1 begins at k * stride with BOS and scores its last `stride` targets."""
    short_T = long_T.detach().clone()  # targets 1 .. n keep the long NLL
    for first in range(WINDOW, SEQ_LENGTH, STRIDE):
        start = first - WINDOW + STRIDE
        window = row_N[start : start + WINDOW].clone()
        window[0] = BOS
        nll = nll_of(model, window[None])[0]
        for target in range(first, first + STRIDE):
            if target > WINDOW:
                short_T[target - 1] = nll[target - start - 1]
    return short_T


def weights_of(scheme: str, long_T: Tensor, short_T: Tensor) -> Tensor:
    """dense: |difference|, l1, lambda 0.75. sparse: the top 20 % of |difference| get weight 1, l1."""
    score_T = (long_T - short_T).abs().double()
    count = len(score_T)
    if scheme == "sparse":
        chosen = score_T.topk(int(0.2 * count)).indices
        score_T = torch.zeros_like(score_T)
        score_T[chosen] = 1.0
    weights_T = score_T * count / score_T.sum()
    return weights_T if scheme == "sparse" else 0.75 + 0.25 * weights_T


@cache
def oracle(folder: Path, scheme: str) -> dict[str, list[float]]:
    """Weighted loss, unweighted loss and gradient norm of each step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    rows = torch.from_numpy(reference_rows()).long()
    metrics: dict[str, list[float]] = {"weighted_loss": [], "lm_loss": [], "grad_norm": []}
    for step in range(STEPS):
        weighted = unweighted = 0.0
        optimizer.zero_grad()
        for i in range(ROWS_A_STEP):
            row_N = rows[(step * ROWS_A_STEP + i) % len(rows)]
            long_T = nll_of(model, row_N[None])[0]
            weights_T = weights_of(scheme, long_T.detach(), short_nll_of(model, row_N, long_T))
            loss = (weights_T * long_T).mean() / ROWS_A_STEP
            loss.backward()
            weighted, unweighted = weighted + loss.item(), unweighted + long_T.mean().item() / ROWS_A_STEP
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        for name, value in zip(metrics, (weighted, unweighted, norm.item()), strict=True):
            metrics[name].append(value)
    return metrics


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {family: make_folder(family, folder / family) for family in ("phi", "phi-yarn", "qwen3")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_ready_rows(reference_rows(), tmp_path_factory.mktemp("rows") / "rows")


def run_config(folder: Path, data: Path, scheme: str, axes: Axes, *more: str) -> RunConfig:
    argv = [
        *("--load-hf", str(folder), "--data-path", str(data), "--seq-length", str(SEQ_LENGTH)),
        *("--train-iters", str(STEPS), "--global-batch-size", str(ROWS_A_STEP), "--no-shuffle"),
        *("--lr", str(LR), "--adam-beta2", str(BETAS[1]), "--adam-eps", str(EPS), "--bos-id", str(BOS)),
        *("--weight-decay", str(WEIGHT_DECAY), "--clip-grad", str(CLIP), "--weighting", scheme, *SCHEMES[scheme]),
        *("--short-window", str(WINDOW), "--short-stride", str(STRIDE)),
        *("--tensor-model-parallel-size", str(axes.tp), "--pipeline-model-parallel-size", str(axes.pp)),
        *("--context-parallel-size", str(axes.cp)),
        *("--num-layers-per-virtual-pipeline-stage", str(axes.vpp_layers or "null")),
    ]
    return parse_options([*argv, *more], RunConfig)


@pytest.mark.parametrize("axes", EACH_LAYOUT)
def test_six_steps_equal_an_independent_trainer(axes, folders, data, ranks):
    runs = [("phi-yarn", "dense"), ("phi", "sparse"), ("qwen3", "dense"), ("qwen3", "sparse")]
    configs = [run_config(folders[family], data, scheme, axes) for family, scheme in runs]
    for rank, found in enumerate(ranks(axes.world_size).run(run_steps, axes, configs)):
        for (family, scheme), metrics in zip(runs, found, strict=True):
            for name, expected in oracle(folders[family], scheme).items():
                where = f"{family} {scheme}: {name} on rank {rank}"
                np.testing.assert_allclose(metrics[name], expected, rtol=RELATIVE, err_msg=where)


FULL_RECOMPUTATION = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


@pytest.mark.parametrize(
    ("family", "scheme", "before", "after"),
    [("phi-yarn", "dense", Axes(tp=2), Axes(pp=2)), ("qwen3", "sparse", Axes(pp=2), Axes(tp=2))],
    ids=["phi-yarn", "qwen3"],
)
def test_a_run_goes_on_under_another_layout(family, scheme, before, after, folders, data, ranks, tmp_path):
    """With the activations of all layers made again, then with those of the attention."""
    save = ["--save", str(tmp_path), "--load", str(tmp_path)]
    first = run_config(folders[family], data, scheme, before, *save, *FULL_RECOMPUTATION, "--exit-interval", "3")
    second = run_config(folders[family], data, scheme, after, *save, "--recompute-granularity", "selective")
    ranks(2).run(run_all, [first])
    ranks(2).run(run_all, [second])
    metrics = metrics_of(tmp_path)
    assert len(metrics["iteration"]) == STEPS
    for name, expected in oracle(folders[family], scheme).items():
        np.testing.assert_allclose(metrics[name], expected, rtol=RELATIVE, err_msg=name)
