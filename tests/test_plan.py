"""tools/plan.py end to end: simulated ranks of the recipes (with fewer layers), the search, times, errors."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from programs import Programs
from test_launch import ROOT
from tiny import TINY_LLAMA, prepare_ready_rows, reference_rows

from megatron_tw.config import ParallelConfig, RunConfig, check_config, parse_options
from megatron_tw.config.options import options_of as options_in
from megatron_tw.config.plan import PlanConfig, PlanOptions, check_plan
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.flops import model_flops
from megatron_tw.parallel.gpus import GPUS
from megatron_tw.planning import calibration
from megatron_tw.planning import run as planning_run
from megatron_tw.planning.formulas import flops_of_a_rank, memory_of, scoring_bytes, training_bytes, weights_of_a_rank
from megatron_tw.planning.limits import NOT_SIMULATED
from megatron_tw.planning.picture import memory_picture
from megatron_tw.planning.plan import Plan
from megatron_tw.planning.record import Collective
from megatron_tw.planning.roofline import Cluster, collective_seconds, members_in_node, phase_times
from megatron_tw.planning.run import Planned, layout_options, make_plan
from megatron_tw.planning.search import best_of_each, candidates, estimated_seconds, gather_choices
from megatron_tw.planning.shapes import SHAPES, named_architecture
from megatron_tw.planning.simulate import most_costly_iteration, with_own_layers
from megatron_tw.planning.sizes import Sizes
from megatron_tw.planning.table import format_plan
from megatron_tw.planning.traffic import collectives_of, elementwise_bytes
from megatron_tw.planning.transformer_engine import STATUS, unpaired
from megatron_tw.runtime.checkpoint import CONFIG_FILE
from megatron_tw.weighting.options import schedule_from_options

EXAMPLES = ROOT / "examples"
RECIPES = {
    "extend_llama3_32k": ("llama3-8b", 8),
    "extend_llama3_128k": ("llama3-8b", 8),
    "recipes/llama3_8b_32k_64gpus": ("llama3-8b", 64),
    "recipes/llama3_8b_128k": ("llama3-8b", 64),
    "recipes/llama3_8b_512k": ("llama3-8b", 256),
    "recipes/llama3_8b_1m": ("llama3-8b", 1024),
    "recipes/llama3.1_70b_128k": ("llama3.1-70b", 256),
}
IN_THE_SUITE = ("extend_llama3_32k", "recipes/llama3_8b_1m")


def options_of(recipe: str, *options: str) -> PlanConfig:
    return parse_options(["--config", str(EXAMPLES / f"{recipe}.yaml"), *options], PlanConfig)


def shrunk(name: str, layers: int, folder: Path) -> str:
    """A folder with the config.json of a published model, with fewer layers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name][1] | {"num_hidden_layers": layers}))
    return str(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_by_formula_with_all_its_layers(recipe: str) -> None:
    model, gpus = RECIPES[recipe]
    config = options_of(recipe, "--model", model, "--world-size", str(gpus))
    check_plan(config)
    sizes = Sizes.of(config.run_config(), named_architecture(model), gpus)
    assert memory_of(sizes).total + 8e9 < GPUS["h100"].memory_bytes


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_waits_an_hour_while_a_checkpoint_is_written(file: Path) -> None:
    assert (
        parse_options(["--config", str(file), "--world-size", "8"], PlanConfig).parallel.distributed_timeout_minutes
        == 60
    )


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=() if name in IN_THE_SUITE else pytest.mark.full) for name in RECIPES],
)
def test_the_plan_of_a_recipe(recipe: str, tmp_path: Path) -> None:
    model, gpus = RECIPES[recipe]
    stages = options_of(recipe, "--world-size", "8").parallel.pipeline_model_parallel_size
    chunk = options_of(recipe, "--world-size", "8").parallel.num_layers_per_virtual_pipeline_stage
    folder = shrunk(model, 2 * stages if chunk is None else 2 * stages * chunk, tmp_path / "model")
    planned = make_plan(options_of(recipe, "--load-hf", folder, "--world-size", str(gpus)))
    plan, sizes = planned.plan, planned.plan.sizes
    check_against_formulas(plan)
    assert plan.fits
    assert "fits" in format_plan(planned)
    expected = model_flops(sizes.architecture, sizes.rows, sizes.config.data.seq_length)
    rate = plan.utilization * plan.step_seconds * gpus * plan.cluster.gpu.peak_flops
    assert rate == pytest.approx(expected)
    assert 0.1 < plan.utilization < 0.7
    check_output(planned, tmp_path)


def check_against_formulas(plan: Plan) -> None:
    """Simulation and formulas know nothing of each other."""
    sizes, last = plan.sizes, plan.simulations[-1]
    expected = flops_of_a_rank(sizes)
    for phase in ("scoring", "forward", "backward"):
        for kind in ("gemm", "attention"):
            assert last.flops[phase][kind] == pytest.approx(expected[phase][kind], rel=0.01), (phase, kind)
    peak = plan.simulations[0].peak.bytes_by_category
    weights = weights_of_a_rank(sizes, last=False).total
    shared = sizes.copies * sizes.config.parallel.context_parallel_size
    assert peak["parameters"] == pytest.approx(2 * weights, rel=0.001)
    assert peak["gradients"] == pytest.approx(4 * weights, rel=0.001)
    assert peak["optimizer"] == pytest.approx(12 * weights / shared, rel=0.01)
    estimate = memory_of(sizes).total
    assert plan.fullest.peak.total == pytest.approx(estimate, rel=0.15)


def check_output(planned: Planned, folder: Path) -> None:
    text = format_plan(planned)
    assert max(map(len, text.splitlines())) <= 120
    (folder / "plan.json").write_text(json.dumps(planned.plan.to_json()))
    check_what_was_not_run(planned.plan, text)
    assert json.loads((folder / "plan.json").read_text())["fits"] == planned.plan.fits
    assert memory_picture(planned.plan).startswith(b"\x89PNG")
    small = replace(planned.plan.cluster, gpu=replace(planned.plan.cluster.gpu, memory_bytes=1e9))
    too_large = replace(planned.plan, cluster=small)
    assert not too_large.fits
    largest = max(too_large.fullest.peak.bytes_by_category.items(), key=lambda entry: entry[1])[0]
    assert f"DOES NOT FIT: needs {too_large.needed_bytes / 1e9:.1f} GB" in format_plan(Planned(plan=too_large))
    assert f"the largest part: {largest}" in format_plan(Planned(plan=too_large))


def check_what_was_not_run(plan: Plan, text: str) -> None:
    """Allowances with their reasons, those of 0 bytes too; Transformer Engine's layers, tensor by tensor; and what may
    become of gathered keys and values."""
    content = plan.to_json()
    lines = text.splitlines()
    for allowance in NOT_SIMULATED:
        said = f"{allowance.name} +{content['allowances'][allowance.name] / 1e9:.1f} +{re.escape(allowance.why)}"
        assert any(re.match(said, line) for line in lines), said
        assert content["allowances_why"][allowance.name] == allowance.why
    assert content["allowances"]["Transformer Engine"] == 0
    assert plan.allowance == sum(content["allowances"].values())

    layer = content["transformer_engine_layer"]
    assert layer["status"] == STATUS
    again = len(plan.simulations[-1].saved_by_layer) == 1  # of a layer that is run again, its input
    assert again == (not layer["modules"]) == (STATUS not in text)
    if not again:
        sums = [sum(sum(module[side].values()) for module in layer["modules"]) for side in ("simulated", "read")]
        assert sums[0] == sum(plan.simulations[-1].saved_by_layer.values())
        assert sums[1] - sums[0] == sum(module["more_bytes"] for module in layer["modules"])
        ffn = plan.sizes.architecture.ffn_hidden_size // plan.config.parallel.tensor_model_parallel_size
        tensor = f"mlp.linear_fc2: input [{plan.sizes.local_tokens}, 1, {ffn}] bfloat16"
        assert [module["module"] for module in layer["modules"] if tensor in module["read"]] == ["mlp.linear_fc2"]
        (total,) = [line for line in lines if "more tensors have the same sizes in both" in line]
        assert total.split()[-2:] == [f"{size / 1e6:.2f}" for size in sums]
        alone = [tensor for row in plan.te_differences for tensor in unpaired([row])]
        assert sum(tensor.read - tensor.simulated for tensor in alone) == sums[1] - sums[0]
    assert ("--recompute-cp-gather" in text) == bool(gather_choices(plan.sizes))


def test_a_layout_is_found_that_training_takes(tmp_path: Path) -> None:
    """As a user does it, in a process of its own; the answer is read back by the options of a training."""
    folder = shrunk("llama3.2-1b", 2, tmp_path / "model")
    command = [
        *(sys.executable, str(ROOT / "tools" / "plan.py"), "--load-hf", folder, "--world-size", "4", "--find-layout"),
        *("--seq-length", "16384", "--global-batch-size", "4", "--bf16", "--finalists", "1", "--gpu", "a100"),
        *("--weighting", "sparse", "--sparsification", "0.2", "--short-window", "4096"),
        *("--output", str(tmp_path / "plan")),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "plan").iterdir()} == {"plan.json", "memory.png", "layout.yaml"}
    content = json.loads((tmp_path / "plan" / "plan.json").read_text())
    again = parse_options(
        [
            *("--config", str(tmp_path / "plan" / "layout.yaml"), "--model", "llama3.2-1b", "--world-size", "4"),
            *("--seq-length", "16384", "--global-batch-size", "4"),
        ],
        PlanConfig,
    )
    check_plan(again)
    layout = yaml.safe_load((tmp_path / "plan" / "layout.yaml").read_text())
    assert {name: content["options"][name] for name in layout} == layout
    assert "Layouts: " in done.stdout
    assert "fits: " in done.stdout


def searched(model: str, gpus: int, *options: str, gpu: str = "h100") -> list[Any]:
    config = options_of("extend_llama3_32k", "--model", model, "--world-size", str(gpus), "--find-layout", *options)
    run, cluster = config.run_config(), Cluster.of(replace(config.plan, gpu=gpu), transformer_engine=False)
    found = candidates(run, named_architecture(model), cluster, scorer=None, fixed=3e9, share=0.05)
    return best_of_each(found, cluster)


def test_the_search_ranks_what_fits_by_time() -> None:
    best = searched("llama3-8b", 8)
    fitting = [candidate for candidate in best if candidate.bytes <= GPUS["h100"].memory_bytes]
    assert [candidate.seconds for candidate in fitting] == sorted(candidate.seconds for candidate in fitting)
    axes = [candidate.axes for candidate in best]
    assert len(set(axes)) == len(axes) > 10
    assert all(layout.model_parallel_size <= 8 and layout.tensor_model_parallel_size <= 8 for layout in axes)
    assert best[0].sizes.rows == 128  # the recipe's
    published = next(c for c in best if (c.axes.tensor_model_parallel_size, c.axes.context_parallel_size) == (2, 4))
    assert published.seconds < 1.1 * best[0].seconds


def test_what_recomputation_frees_by_formula() -> None:
    """Against simulated ranks of the 32k recipe with 8 layers, in GB: 0.41 gathered again, 0.34 selective, 2.82 mlp."""
    config = options_of("extend_llama3_32k", "--world-size", "8").run_config()
    architecture = replace(named_architecture("llama3-8b"), num_layers=8)

    def freed(**options: Any) -> float:
        again = replace(config, activations=replace(config.activations, **options))
        both = (training_bytes(Sizes.of(one, architecture, 8)) for one in (config, again))
        return (next(both) - next(both)) / 1e9

    assert freed(recompute_cp_gather=True) == pytest.approx(0.41, rel=0.1)
    assert freed(recompute_granularity="selective") == pytest.approx(0.34, rel=0.2)
    modules = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
    assert freed(**modules) == pytest.approx(2.82, rel=0.1)


def test_gathering_again_takes_less_time_than_attending_again_and_frees_as_much() -> None:
    """By formula, in the plan of every layout; so the search offers one of the two."""
    config = options_of(
        "extend_llama3_32k", "--world-size", "1024", "--seq-length", str(2**20), "--short-window", "8192"
    )
    run, architecture = config.run_config(), named_architecture("llama3-8b")
    cluster = Cluster.of(replace(config.plan, gpu="h100"), transformer_engine=False)
    parallel = ParallelConfig(tensor_model_parallel_size=8, context_parallel_size=32)
    sizes = Sizes.of(replace(run, parallel=parallel), architecture, 1024)
    kept, gathered, attended = gather_choices(sizes).values()
    # Keys and values of 2^20 tokens, 128 wide, in bf16, of 32 layers; those of 2^15 are kept instead.
    freed = 2 * (2**20 - 2**15) * 128 * 2 * 32
    for again in (gathered, attended):
        assert training_bytes(kept) - training_bytes(again) == pytest.approx(freed)
    seconds = [estimated_seconds(choice, cluster) for choice in (kept, gathered, attended)]
    assert seconds == sorted(seconds)
    # 32 layers x (2^20)^2 / 2 pairs x 32 heads x 128 x 4 FLOPs of attention once more, on 256 ranks, of every row.
    once_more = 32 * 2**39 * 32 * 128 * 4 / 256 * sizes.rows / 4 / GPUS["h100"].attention_flops
    assert seconds[2] - seconds[1] == pytest.approx(once_more, rel=0.01)

    def choices(**changes: Any) -> int:
        return len(gather_choices(replace(sizes, config=replace(sizes.config, **changes))))

    full = replace(run.activations, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    engine = replace(run.compute, transformer_impl="transformer_engine")
    alone = replace(parallel, context_parallel_size=1)
    assert [choices(), choices(activations=full), choices(compute=engine), choices(parallel=alone)] == [3, 0, 0, 0]


def test_gathering_again_is_a_choice_where_layers_keep_gathered_keys() -> None:
    def found(implementation: str) -> set[bool]:
        best = searched("llama3-8b", 8, "--transformer-impl", implementation, "--global-batch-size", "8")
        return {candidate.sizes.config.activations.recompute_cp_gather for candidate in best}

    assert found("auto") == {False}  # Transformer Engine's layers would refuse it
    assert True in found("local")


def test_with_less_memory_layers_are_run_again() -> None:
    rich, poor = searched("llama3-8b", 8, gpu="h200"), searched("llama3-8b", 8, "--global-batch-size", "8")
    assert rich[0].sizes.config.activations.recompute_granularity is None
    small = [c for c in poor if c.axes.tensor_model_parallel_size == 1 and c.axes.pipeline_model_parallel_size == 4]
    assert any(c.sizes.config.activations.recompute_granularity == "full" for c in small)


@pytest.mark.parametrize(
    ("group", "size", "inside"), [("TP", 8, 8), ("CP", 4, 1), ("DP x CP", 32, 1), ("DP", 8, 1), ("world", 256, 8)]
)
def test_links_of_groups(group: str, size: int, inside: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=8, context_parallel_size=4)
    cluster = Cluster.of(PlanOptions(world_size=256), transformer_engine=False)
    assert members_in_node(group, parallel, cluster, size) == inside


def test_seconds_of_collectives() -> None:
    """By hand: a ring of 8 carries 7/8 of the tensor past each rank; large enough for latency to be nothing."""
    cluster = Cluster.of(
        PlanOptions(world_size=64, nvlink_gbytes_per_second=100, network_gbytes_per_second=10), transformer_engine=False
    )
    parallel = ParallelConfig(tensor_model_parallel_size=8)

    def seconds(group: str, operation: str, size: int) -> float:
        moved = Collective(
            phase="forward", group=group, operation=operation, group_size=size, count=1, payload_bytes=10**12
        )
        return collective_seconds(moved, parallel, cluster)

    assert seconds("TP", "all_gather", 8) == pytest.approx(10 * 7 / 8, rel=1e-3)
    assert seconds("TP", "all_reduce", 8) == pytest.approx(20 * 7 / 8, rel=1e-3)
    assert seconds("DP", "reduce_scatter", 8) == pytest.approx(100 * 7 / 8, rel=1e-3)  # one card a node
    assert seconds("world", "all_reduce", 64) == pytest.approx(2 * 12.5 * 63 / 64, rel=1e-3)  # eight cards a node


def test_utilization_of_llama3_8b_at_8k_is_near_the_published() -> None:
    """Megatron-LM and NeMo publish 50 to 60% for Llama-3-8B at 8k tokens in bf16 on H100 with Transformer Engine."""
    options = ["--model", "llama3-8b", "--world-size", "8", "--seq-length", "8192", "--weighting", "uniform"]
    options += ["--interpolation", "null", "--short-window", "null", "--short-stride", "null"]
    options += ["--tensor-model-parallel-size", "1", "--context-parallel-size", "2"]
    options += ["--transformer-impl", "transformer_engine"]
    config = options_of("extend_llama3_32k", *options)
    sizes = Sizes.of(config.run_config(), named_architecture("llama3-8b"), 8)
    cluster = Cluster.of(config.plan, transformer_engine=True)
    flops = model_flops(sizes.architecture, sizes.rows, 8192)
    assert 0.50 < flops / estimated_seconds(sizes, cluster) / 8 / 989e12 < 0.60


@pytest.fixture
def measured(programs: Programs, tmp_path: Path) -> Path:
    """A run of five steps on a CPU."""
    prepare_ready_rows(reference_rows(), tmp_path / "rows")
    options = "--data-path rows --seq-length 256 --train-iters 5 --save run --weighting dense --short-window 64"
    answer = programs.run("train", [*options.split(), "--load-hf", str(TINY_LLAMA)], tmp_path)
    assert answer.status == 0, answer.stderr
    return tmp_path / "run" / "metrics.jsonl"


def test_a_measured_run_sets_the_times(measured: Path) -> None:
    """A plan of that very run, calibrated by it, comes to what it took."""
    options = ["--load-hf", str(TINY_LLAMA), "--world-size", "1", "--seq-length", "256", "--weighting", "dense"]
    config = parse_options([*options, "--short-window", "64", "--calibrate", str(measured)], PlanConfig)
    plan = make_plan(config).plan
    steps = [json.loads(line) for line in measured.read_text().splitlines()][3:]
    assert plan.step_seconds == pytest.approx(np.median([step["step_seconds"] for step in steps]), rel=0.3)
    assert plan.cluster.step_scale > 10  # a CPU
    assert "scaled to a run" in format_plan(Planned(plan=plan))


@pytest.mark.parametrize(
    "options",
    [
        *(
            f"--fp8-format hybrid {more}"
            for more in ("--fp8-recipe mxfp8", "--fp8-margin 1", "--fp8-amax-history-len 16")
        ),
        "--fp8-format hybrid --fp8-amax-compute-algo max",
        "--tp-comm-overlap --tp-comm-bootstrap-backend gloo",
        "--use-precision-aware-optimizer --optimizer-cpu-offload --optimizer-offload-fraction 0.5",
        "--use-precision-aware-optimizer --main-grads-dtype bf16 --main-params-dtype fp16",
        "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype fp8",
        "--cp-comm-type a2a",
        "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2,2",
    ],
)
def test_what_is_not_simulated_leaves_no_option_that_depends_on_it(options: str) -> None:
    config = options_of("extend_llama3_32k", "--model", "llama3-8b", "--world-size", "8", *options.split())
    check_plan(config)
    own, left_out = with_own_layers(config.run_config())
    check_config(own, 8)
    assert set(left_out) == {word for word in options.split() if word.startswith("--")}


def test_a_live_scorer_counts_with_its_own_shape() -> None:
    """By hand, of each layer and token: 6 hidden states, 2 of keys' width and 3 of the MLP's, halved by TP 2. The model
    itself leaves window 0 out."""
    model, small = named_architecture("llama3-8b"), named_architecture("llama3.2-1b")
    live = ("--scorer", "frozen", "--scorer-hf", "folder")

    def sizes(*options: str, scorer: Architecture | None = None) -> Sizes:
        config = options_of("extend_llama3_32k", "--model", "llama3-8b", "--world-size", "8", *options)
        return Sizes.of(config.run_config(), model, 8, scorer)

    def scoring(of: Sizes) -> tuple[float, float, float]:
        sent = sum(c.payload_bytes for c in collectives_of(of) if c.phase == "scoring" and c.group == "TP")
        return elementwise_bytes(of, transformer_engine=False)["scoring"], sent, scoring_bytes(of)

    own, same, less = sizes(), sizes(*live, scorer=model), sizes(*live, scorer=small)
    windows = same.windows_of_a_rank / own.windows_of_a_rank
    assert scoring(same) == pytest.approx([windows * number for number in scoring(own)])
    layer = (6 * 2048 + 2 * 512 + 3 * 8192) / (6 * 4096 + 2 * 1024 + 3 * 14336)
    shares = [number / of for number, of in zip(scoring(less), scoring(same), strict=True)]
    assert shares == pytest.approx([layer * 16 / 32, 2048 / 4096 * 16 / 32, layer])
    # Over two stages it is whole on the last, where a model in training has half its layers.
    pipelined = ("--pipeline-model-parallel-size", "2", "--context-parallel-size", "2")
    whole, half = sizes(*pipelined, *live, scorer=model), sizes(*pipelined)
    windows = whole.windows_of_a_rank / half.windows_of_a_rank
    for index in (0, 1):
        assert scoring(whole)[index] == pytest.approx(2 * windows * scoring(half)[index])
    for kind in ("gemm", "attention"):
        assert flops_of_a_rank(whole)["scoring"][kind] == pytest.approx(
            whole.windows_of_a_rank / same.windows_of_a_rank * flops_of_a_rank(same)["scoring"][kind], rel=0.01
        )
    cluster = Cluster.of(PlanOptions(world_size=8), transformer_engine=False)
    for of, waits in ((whole, False), (half, True)):  # a scorer that is whole on one stage waits for no other
        times = phase_times(flops_of_a_rank(of), collectives_of(of), {}, sizes=of, cluster=cluster)
        assert (times["scoring"].bubble > 0) == waits
        assert times["forward"].bubble > 0


def test_calibration_knows_the_scorer_of_the_measured_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = shrunk("llama3.2-1b", 2, tmp_path / "scorer")
    options = {
        "load_hf": "gone", "data_path": "rows", "seq_length": 4096, "train_iters": 9, "bf16": True, "scorer": "frozen",
        "weighting": "dense", "short_window": 1024, "scorer_hf": scorer,
    }  # fmt: skip
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(options))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step_seconds": 3.0, "scoring_seconds": 1.0, "world_size": 1}) + "\n")
    checkpoint = SimpleNamespace(directory=tmp_path, architecture=named_architecture("llama3-8b"))
    monkeypatch.setattr(calibration, "find_checkpoint", lambda *_: checkpoint)
    cluster = Cluster.of(PlanOptions(world_size=1), transformer_engine=False)
    few = calibration.calibrated(cluster, str(metrics), transformer_engine=False)
    (tmp_path / "scorer" / "config.json").write_text(json.dumps(SHAPES["llama3-8b"][1]))
    many = calibration.calibrated(cluster, str(metrics), transformer_engine=False)
    assert many.step_scale == few.step_scale
    assert few.scoring_scale > 10 * many.scoring_scale  # a second is long for two layers
    (tmp_path / "scorer" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"--calibrate .*: expected the run's --scorer-hf where it was: .* not found"):
        calibration.calibrated(cluster, str(metrics), transformer_engine=False)


@pytest.mark.parametrize(("given", "step"), [([], 100), (["--train-iters", "50"], 49)], ids=str)
def test_the_costliest_stage_is_planned(given: list[str], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[RunConfig] = []

    def plans(layouts: list[Sizes], *_: Any) -> list[Any]:
        planned.extend(sizes.config for sizes in layouts)
        return [None]

    monkeypatch.setattr(planning_run, "_plans", plans)
    options = ["--model", "llama3-8b", "--world-size", "8", "--seq-length", "8192", "--short-window", "2048", "--bf16"]
    schedule = "0: uniform; 100: dense"
    make_plan(parse_options([*options, "--weighting-schedule", schedule, *given], PlanConfig))
    (run,) = planned
    assert most_costly_iteration(schedule_from_options(run.weighting), run.train.train_iters) == step


def test_named_models_can_be_read() -> None:
    sizes = {"llama3-8b": 8.03e9, "llama3.1-70b": 70.6e9, "llama3.2-1b": 1.24e9, "phi-2": 2.78e9, "qwen3-8b": 8.19e9}
    sizes |= {"qwen2.5-7b": 7.62e9, "mistral-7b": 7.25e9, "smollm2-135m": 0.1345e9}
    for name in SHAPES:
        architecture = named_architecture(name)
        if name in sizes:
            config = parse_options(["--model", name, "--world-size", "1", "--seq-length", "1024"], PlanConfig)
            weights = weights_of_a_rank(Sizes.of(config.run_config(), architecture, 1), last=True)
            assert weights.total == pytest.approx(sizes[name], rel=0.01), name


def test_options_of_a_layout_are_all_of_a_training() -> None:
    config = options_of("extend_llama3_32k", "--model", "llama3-8b", "--world-size", "8")
    plan: Any = type("Plan", (), {"config": config.run_config()})
    chosen = layout_options(plan)
    assert chosen["tensor_model_parallel_size"] == 2
    assert chosen["recompute_granularity"] is None
    make: Callable[..., Any] = parse_options
    assert make(["--model", "llama3-8b", "--world-size", "8", "--seq-length", "32768"], PlanConfig) is not None


def test_a_plan_takes_every_option_of_training() -> None:
    """A training's YAML file can be planned as it is, and nothing of it is lost on the way."""
    assert options_in(RunConfig).keys() <= options_in(PlanConfig).keys()
    options = ["--world-size", "8", "--model", "llama3-8b", "--seq-length", "32768", "--bf16", "--fp8-format", "hybrid"]
    assert parse_options(options, PlanConfig).run_config().kernels.fp8_format == "hybrid"
