"""A simulated rank comes to what a real one does: memory, FLOPs and collectives of a step, under every kind of layout.

The real ranks are gloo ranks on a CPU, watched from outside (watched.py). Both run a Llama of 2 or 4 layers on rows of
1,024 tokens: small, but its activations and its weights are both megabytes, of which 1% is more than most tensors.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import BOS, Axes, prepare_ready_rows
from watched import watched_step

from megatron_tw.config import (
    ActivationConfig,
    ComputeConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)
from megatron_tw.model.architecture import read_architecture
from megatron_tw.planning.processes import simulate_all
from megatron_tw.planning.record import Simulation
from megatron_tw.planning.simulate import Job

LENGTH, WINDOW, HIDDEN, FFN, VOCAB, HEADS, GROUPS = 1024, 256, 256, 640, 1024, 8, 4
DENSE = WeightingOptions(weighting="dense")
SPARSE = WeightingOptions(weighting="sparse", sparsification=0.2)


@dataclass(frozen=True)
class Case:
    """A run to compare, on its rank `rank`. dp_overlap, microbatches and `changes` of the options."""

    name: str
    axes: Axes
    rank: int = 0
    microbatches: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    full: bool = False


BF16 = {"compute": ComputeConfig(bf16=True)}
RECOMPUTE = {
    "activations": ActivationConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
}
CASES = [
    Case("one rank", Axes(), full=True),
    Case("one rank, recompute", Axes(), changes=RECOMPUTE),
    Case("one rank, bf16", Axes(), changes=BF16, full=True),
    Case("one rank, uniform", Axes(), microbatches=3, changes={"weighting": WeightingOptions()}, full=True),
    Case("TP 2", Axes(tp=2), rank=1, full=True),
    Case("TP 2, sparse", Axes(tp=2), changes={"weighting": SPARSE}),
    Case("CP 2", Axes(cp=2)),
    Case("DP 2", Axes(dp=2), rank=1, changes=BF16),
    Case("PP 2, first stage", Axes(pp=2), microbatches=2, full=True),
    Case("PP 2, last stage", Axes(pp=2), rank=1, microbatches=2),
    Case("CP 2 x TP 2", Axes(tp=2, cp=2), rank=3, full=True),
    Case("VPP 2, first stage", Axes(pp=2, vpp_layers=1), microbatches=4, full=True),
    Case("VPP 2, last stage", Axes(pp=2, vpp_layers=1), rank=1, microbatches=4, full=True),
    Case("moving average", Axes(dp=2), changes={"scorer": ScorerConfig(scorer="ema")}, full=True),
]


def write_model(folder: Path, layers: int) -> None:
    """A Hugging Face folder of a random Llama."""
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": WINDOW, "bos_token_id": BOS,
        "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    keys = HIDDEN * GROUPS // HEADS
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm": (HIDDEN,), at + "post_attention_layernorm": (HIDDEN,)}
        shapes |= {f"{at}self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj": (keys, HIDDEN) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes |= {at + "mlp.down_proj": (HIDDEN, FFN)}
    torch.manual_seed(0)
    save_file(
        {f"{name}.weight": 0.05 * torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors"
    )


def write_rows(folder: Path) -> None:
    """Random rows."""
    ids = np.random.default_rng(0).integers(2, VOCAB, size=(16, LENGTH))
    ids[:, 0] = BOS
    prepare_ready_rows(ids, folder, vocab_size=VOCAB)


def options(case: Case, model: Path, rows: Path) -> RunConfig:
    sections = {
        "parallel": case.axes.parallel(),
        "model": ModelConfig(load_hf=str(model)),
        "data": DataConfig(data_path=(str(rows),), seq_length=LENGTH, bos_id=BOS),
        "train": TrainConfig(train_iters=2, global_batch_size=case.microbatches * case.axes.dp),
        "weighting": DENSE,
        "windows": WindowsConfig(short_window=WINDOW),
    }
    return RunConfig(**{**sections, **case.changes})


def job(case: Case, model: Path, rows: Path, **changes: Any) -> Job:
    return Job(
        config=options(case, model, rows),
        architecture=read_architecture(model),
        world_size=case.axes.world_size,
        rank=case.rank,
        on_gpu=False,
        **changes,
    )


def compare(case: Case, simulated: Simulation, real: dict[str, Any]) -> None:
    """Equal to the byte and to the operation, FLOPs and collectives by phase, these by group as well; with sparse
    weights, where chance says how many targets of a shard get one, within 1% of a whole step."""
    total, by_kind = real["peak"]
    ours = simulated.peak.bytes_by_category
    payloads: Counter[tuple[str, ...]] = Counter()
    for one in simulated.collectives:
        payloads[one.phase, one.group, one.operation, str(one.group_size)] += one.payload_bytes
    flops = {(phase, kind): number for phase, kinds in simulated.flops.items() for kind, number in kinds.items()}
    for kind in ("parameters", "gradients", "optimizer"):
        assert ours[kind] == by_kind.get(kind, 0), f"{case.name}: {kind}"
    sparse = case.changes.get("weighting") is SPARSE
    within = 0.01 if sparse else 0.0
    compared: Callable[[Any], dict[Any, float]] = of_a_step if sparse else dict
    assert simulated.peak.total == pytest.approx(total, rel=within, abs=0), case.name
    assert ours["activations"] + ours["other"] == pytest.approx(
        by_kind["activations"] + by_kind["other"], rel=within, abs=0
    ), case.name
    assert compared(flops) == pytest.approx(compared(real["flops"]), rel=within, abs=0), case.name
    assert compared(payloads) == pytest.approx(compared(real["payloads"]), rel=within, abs=0), case.name


def of_a_step(by_phase: dict[Any, float]) -> dict[Any, float]:
    """Without the phase, the first part of a name."""
    found: Counter[Any] = Counter()
    for (_, *name), number in by_phase.items():
        found[tuple(name)] += number  # type: ignore[assignment]
    return dict(found)


def check_cases(cases: list[Case], folder: Path, ranks: Callable, *, layers: int) -> None:
    model, rows = folder / "llama", folder / "rows"
    write_model(model, layers)
    write_rows(rows)
    simulations = simulate_all([job(case, model, rows) for case in cases])
    for case, simulated in sorted(zip(cases, simulations, strict=True), key=lambda pair: pair[0].axes.world_size):
        real = ranks(case.axes.world_size).run(watched_step, case.axes, options(case, model, rows))
        compare(case, simulated, real[case.rank])


def test_simulated_ranks_come_to_what_real_ones_do(tmp_path: Path, ranks: Callable) -> None:
    check_cases([case for case in CASES if not case.full], tmp_path, ranks, layers=2)


@pytest.mark.full
def test_more_simulated_ranks_come_to_what_real_ones_do(tmp_path: Path, ranks: Callable) -> None:
    check_cases([case for case in CASES if case.full], tmp_path, ranks, layers=4)
