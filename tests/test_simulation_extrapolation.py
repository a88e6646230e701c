"""A step told by fewer micro-batches and layers is the step with all; what a layer saves; scorers; errors."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tiny import Axes

from megatron_tw.config import (
    ActivationConfig,
    ComputeConfig,
    DataConfig,
    ParallelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)
from megatron_tw.model.architecture import parse_architecture
from megatron_tw.planning.processes import simulate_all
from megatron_tw.planning.record import Simulation
from megatron_tw.planning.simulate import Job, ranks_to_simulate
from megatron_tw.planning.transformer_engine import differences, saved_by_te_layer

HIDDEN, FFN, HEADS, GROUPS, SIZE, LENGTH = 256, 640, 8, 4, 32, 2048
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": 2048, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "bos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
FULL = ActivationConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def job(axes: Axes, *, layers: int, microbatches: int, rank: int = 0, **changes: Any) -> Job:
    sections = {
        "parallel": axes.parallel(),
        "compute": ComputeConfig(bf16=True),
        "data": DataConfig(data_path=("nowhere",), seq_length=LENGTH),
        "train": TrainConfig(train_iters=2, global_batch_size=microbatches * axes.dp),
        "weighting": WeightingOptions(weighting="dense"),
        "windows": WindowsConfig(short_window=512),
    }
    return Job(
        config=RunConfig(**{**sections, **changes}),
        architecture=parse_architecture(LLAMA | {"num_hidden_layers": layers}, "config.json"),
        world_size=axes.world_size,
        rank=rank,
    )


EQUAL = [
    pytest.param(Axes(tp=2, cp=2), {"layers": 7, "microbatches": 6}, id="TP 2 x CP 2"),
    pytest.param(
        Axes(pp=2, dp=2),
        {"layers": 12, "microbatches": 6, "activations": FULL},
        id="PP 2 x DP 2, recompute",
        marks=pytest.mark.full,
    ),
    pytest.param(
        Axes(pp=2, vpp_layers=6), {"layers": 24, "microbatches": 8, "rank": 1}, id="VPP 2", marks=pytest.mark.full
    ),
]


@pytest.mark.parametrize(("axes", "arguments"), EQUAL)
def test_a_part_tells_the_whole(axes: Axes, arguments: dict[str, Any]) -> None:
    part = job(axes, **arguments)
    told, run = simulate_all([part, replace(part, all_microbatches=True, all_layers=True)])
    assert run.extrapolated == ""
    assert "layers" in told.extrapolated
    assert "micro-batches" in told.extrapolated
    assert told.flops.keys() == run.flops.keys()
    for phase, kinds in run.flops.items():
        assert told.flops[phase] == pytest.approx(kinds), phase
    assert sorted(map(str, told.collectives)) == sorted(map(str, run.collectives))
    # The padding at the end of a gradient buffer is a few hundred bytes.
    for phase, moment in run.peak_by_phase.items():
        found = told.peak_by_phase[phase]
        assert found.total == pytest.approx(moment.total, rel=0.02 if phase == "build" else 1e-4), phase
        if phase != "build":  # whose peak may lie elsewhere with more layers
            assert found.bytes_by_category == pytest.approx(moment.bytes_by_category, rel=1e-4, abs=2048), phase
    assert Simulation.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert max(moment.total for moment in told.timeline) == pytest.approx(told.peak.total, rel=1e-3)


def test_saved_tensors_of_a_layer_are_what_activations_consist_of() -> None:
    """Two more layers hold just as much more, and the whole of what a layer saves under recomputation is its input."""
    few, more, again = simulate_all(
        [
            job(Axes(tp=2), layers=n, microbatches=1, activations=a)
            for n, a in ((2, ActivationConfig()), (4, ActivationConfig()), (2, FULL))
        ]
    )
    saved = sum(more.saved_by_layer.values())
    grown = (more.peak_by_phase["forward"].bytes_by_category["activations"]
             - few.peak_by_phase["forward"].bytes_by_category["activations"])  # fmt: skip
    assert grown / 2 == pytest.approx(saved, rel=0.01)
    assert sum(again.saved_by_layer.values()) == LENGTH * HIDDEN // 2 * 2
    read = saved_by_te_layer(
        job(Axes(tp=2), layers=2, microbatches=1).config, job(Axes(), layers=2, microbatches=1).architecture
    )
    assert read is not None
    rows = differences(more.saved_by_layer, read)
    assert sum(row.bytes for row in rows) == sum(read.values()) - saved < 0
    assert all(row.simulated for row in rows)
    # Its input is attention's output, which is counted there.
    assert [row.module for row in rows if not row.read] == ["self_attention.linear_proj"]
    assert read["self_attention.core_attention: keys [2048, 1, 2, 32] bfloat16"] == 2048 * 2 * 32 * 2


def test_scorers_and_memory_that_lingers() -> None:
    """The moving average is 4 bytes a weight; cached scores need no scoring pass; a second model is simulated."""
    base = job(Axes(), layers=2, microbatches=1)
    second = parse_architecture(LLAMA | {"num_hidden_layers": 1}, "config.json")
    cached = replace(base.config, scorer=ScorerConfig(scorer="frozen", scores=("nowhere",)))
    live = replace(base.config, scorer=ScorerConfig(scorer="frozen", scorer_hf="nowhere"))
    ema = replace(base.config, scorer=ScorerConfig(scorer="ema"))
    own, average, stored, other = simulate_all(
        [base, replace(base, config=ema), replace(base, config=cached),
         replace(base, config=live, scorer_architecture=second)]
    )  # fmt: skip
    weights = own.peak.bytes_by_category["parameters"] // 2
    assert average.peak_by_phase["forward"].bytes_by_category["other"] >= 4 * weights
    assert "scoring" not in stored.flops
    assert other.peak.bytes_by_category["parameters"] > own.peak.bytes_by_category["parameters"]
    # The unfrozen scorer leaves window 0 out, the second model does not.
    windows = {"own": 6, "other": 7}
    assert 0 < other.flops["scoring"]["gemm"] < own.flops["scoring"]["gemm"] * windows["other"] / windows["own"]


def test_errors_name_the_job_and_chosen_ranks_are_the_ends_of_the_pipeline() -> None:
    good = job(Axes(tp=2, pp=2), layers=2, microbatches=1)
    assert ranks_to_simulate(good.config, good.architecture, 8) == [0, 4]
    bad = replace(
        good, config=replace(good.config, parallel=ParallelConfig(tensor_model_parallel_size=3)), world_size=3
    )
    with pytest.raises(ValueError, match=r"^rank 0 of 3 \(TP 3 x PP 1 x CP 1, rows of 2048 tokens\): --"):
        simulate_all([bad])
