"""A few layers of a model's width: time and peak memory of a training step, beside plain Megatron-Core and the plan.

    tools/benchmarks/layers.py --output FILE                                   # Llama-3-8B's width, bf16: one GPU
    tools/benchmarks/layers.py --shape toy --seq-length 256 --output FILE      # a CPU

Each program runs in a process of its own (ranks of its own under `--ranks`), on the same made-up rows:

    ours             a step with uniform, dense and sparse weights, the scoring pass included; the waits of its host
    Megatron-Core    its GPTModel with its layers, its forward pass, its cross-entropy, its optimizer
    plan             the simulated step (megatron_tw/planning): peak memory, FLOPs, and its time by roofline on the GPU

Where Megatron-Core's step cannot fit the GPU by formula it is not run, and where it fails the others' figures stay.
Memory is that of the allocator on a GPU, on a CPU (Linux) that of the process beyond what it was before the model.
Time and memory of one layer: differences between --layers and half as many, over their number.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from host_waits import host_waits
from plain_megatron import ENGINES_LAYERS, PlainMegatron, least_bytes, takes_engine
from process_memory import PeakMemory

from megatron_tw.config import (
    ActivationConfig,
    ComputeConfig,
    DataConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)
from megatron_tw.parallel.devices import prepare_device, synchronize

SHAPES: dict[str, dict[str, int]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama3-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "toy": {
        "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}  # fmt: skip
SCHEMES = {
    "uniform": WeightingOptions(),
    "dense": WeightingOptions(weighting="dense"),
    "sparse": WeightingOptions(weighting="sparse"),
}
OURS, PLAIN = "ours", "Megatron-Core"
OURS_LAYERS = "this project's own layers"


# ---- on each rank, in a process of its own ----


def measure_ours(options: argparse.Namespace) -> dict[str, Any]:
    """By scheme: seconds and peak bytes of a step, seconds of its scoring; and host waits of a micro-batch."""
    from megatron_tw.model.build import takes_transformer_engine
    from megatron_tw.model.gpt import transformer_engine_available
    from megatron_tw.planning.made_up import make_up_inputs
    from megatron_tw.runtime.opening import join_world, open_layout
    from megatron_tw.training.loop import Run
    from megatron_tw.weighting.options import schedule_from_options

    config = run_config(options)
    device = join_world(config.parallel)
    memory = PeakMemory(device)
    inputs = make_up_inputs(
        config, architecture(options), world_size=dist.get_world_size(), old_context=None, scorer_architecture=None
    )
    run = Run.start(config, inputs, open_layout(config.parallel, inputs.source), device)
    for chunk in run.chunks:
        give_weights(chunk.parameters())
    run.step.optimizer.reload_model_params()
    batches = next(run.loader)

    def step(count: int | None = None) -> dict[str, Any]:
        run.iteration += 1
        return run.step(batches[:count], run.iteration) | run.step.clock.metrics()

    engine = takes_transformer_engine(
        config.compute, available=transformer_engine_available() and device.type == "cuda"
    )
    figures: dict[str, Any] = {
        "layout": run.layout.describe(), "layers": ENGINES_LAYERS if engine else OURS_LAYERS, "schemes": {}
    }  # fmt: skip
    schedules = {name: schedule_from_options(SCHEMES[name]) for name in options.schemes}
    for name, schedule in schedules.items():
        run.step.schedule = schedule
        step()  # kernels are compiled, the optimizer gets its state
        peaks, steps = [], []
        for _ in range(options.repetitions):
            with memory.of_block() as block:
                steps.append(step())
            peaks.append(block.peak_bytes)
        figures["schemes"][name] = {
            "seconds": median(metrics["step_seconds"] for metrics in steps),
            "scoring_seconds": median(metrics["scoring_seconds"] for metrics in steps),
            "peak_bytes": max(peaks),
        }
    if len(batches) > 1:
        one, all_of_them = (host_waits(device, partial(step, count)) for count in (1, None))
        more = len(batches) - 1
        figures["waits"] = {
            "scheme": name,
            "of": one.source,
            "in_a_step": all_of_them.total,
            "in_a_micro_batch": (all_of_them.total - one.total) / more,
            "places": dict(Counter(all_of_them.places).most_common(12)),
        }
    return figures


def measure_plain(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of a step of Megatron-Core alone."""
    from megatron_tw.planning.made_up import MadeUpRows
    from megatron_tw.runtime.opening import join_world

    device = join_world(run_config(options).parallel)
    memory = PeakMemory(device)
    shape = architecture(options)
    rows = MadeUpRows(
        num_rows=options.micro_batches, seq_length=options.seq_length, vocab_size=shape.vocab_size, bos_id=0
    )
    rows_RN = torch.stack([torch.from_numpy(rows[index]) for index in range(options.micro_batches)])
    plain = PlainMegatron(shape, bf16=options.bf16, tp_size=dist.get_world_size(), recompute=options.recompute)
    give_weights(plain.parameters())
    plain.optimizer.reload_model_params()
    seconds, peaks = [], []
    for number in range(options.repetitions + 1):
        with memory.of_block() as block:
            synchronize()
            started = time.perf_counter()
            plain.step(rows_RN)
            synchronize()
        if number > 0:
            seconds.append(time.perf_counter() - started)
            peaks.append(block.peak_bytes)
    return {"seconds": median(seconds), "peak_bytes": max(peaks), "layers": plain.layers_of}


@torch.no_grad()
def give_weights(parameters: Any) -> None:
    """Numbers of a usual size, so that no kernel meets NaN."""
    torch.manual_seed(1)
    for parameter in parameters:
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)


MEASURE: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {OURS: measure_ours, PLAIN: measure_plain}


# ---- what runs ----


def architecture(options: argparse.Namespace) -> Any:
    from megatron_tw.model.architecture import parse_architecture

    raw = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "num_hidden_layers": options.layers, "max_position_embeddings": options.seq_length,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, **SHAPES[options.shape],
    }  # fmt: skip
    return parse_architecture(raw, f"the shape {options.shape}")


def run_config(options: argparse.Namespace) -> RunConfig:
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=options.ranks),
        compute=ComputeConfig(bf16=options.bf16),
        activations=ActivationConfig(**(recompute if options.recompute else {})),  # type: ignore[arg-type]
        data=DataConfig(data_path=("made-up rows",), seq_length=options.seq_length),
        train=TrainConfig(train_iters=10**6, micro_batch_size=1, global_batch_size=options.micro_batches),
        weighting=SCHEMES[options.schemes[-1]],
        windows=WindowsConfig(short_window=options.short_window)
        if options.schemes[-1] != "uniform"
        else WindowsConfig(),
    )


def plan(options: argparse.Namespace, *, device_name: str | None, engine: bool) -> dict[str, Any]:
    """What the simulator says of a step of each scheme on rank 0.

    device_name: the GPU, as CUDA calls it; None: a CPU. engine: take the rates of Transformer Engine's attention.
    """
    from megatron_tw.parallel.gpus import gpu_of
    from megatron_tw.planning.processes import simulate_all
    from megatron_tw.planning.simulate import Job

    gpu = gpu_of(device_name)
    jobs = []
    for name in options.schemes:
        config = replace(run_config(options), weighting=SCHEMES[name])
        if name == "uniform":
            config = replace(config, windows=WindowsConfig())
        jobs.append(
            Job(
                config=config,
                architecture=architecture(options),
                world_size=options.ranks,
                rank=0,
                on_gpu=device_name is not None,
            )
        )
    return {
        name: {
            "peak_bytes": simulation.peak.total,
            "flops": sum(sum(kinds.values()) for kinds in simulation.flops.values()),
            "seconds": None if gpu is None else planned_seconds(job, simulation, gpu.kind, engine=engine),
            "layers": simulation.layers,
        }
        for name, job, simulation in zip(options.schemes, jobs, simulate_all(jobs), strict=True)
    }


def planned_seconds(job: Any, simulation: Any, kind: str, *, engine: bool) -> float:
    """Of a simulated step by roofline, on a GPU of this kind (megatron_tw/parallel/gpus.py)."""
    from megatron_tw.config.plan import PlanOptions
    from megatron_tw.planning.plan import rank_times
    from megatron_tw.planning.roofline import Cluster
    from megatron_tw.planning.sizes import Sizes

    cluster = Cluster.of(PlanOptions(world_size=job.world_size, gpu=kind), transformer_engine=engine)
    sizes = Sizes.of(job.config, job.architecture, job.world_size)
    return sum(time.total for time in rank_times(sizes, cluster, simulation).values())


def plain_figures(options: argparse.Namespace, memory_bytes: float | None) -> dict[str, Any]:
    """Those of Megatron-Core; "not_run" or "failed" in their place, and why. memory_bytes: of the GPU."""
    engine = takes_engine(bf16=options.bf16)
    least = least_bytes(
        architecture(options),
        tokens=options.seq_length,
        bf16=options.bf16,
        tp_size=options.ranks,
        recompute=options.recompute,
        engine=engine,
    )
    if memory_bytes is not None and sum(least.values()) > memory_bytes:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in least.items() if size)
        return {
            "not_run": f"by formula it does not fit: at least {_gib(sum(least.values()))} GiB ({parts}) of the GPU's "
            f"{_gib(memory_bytes)}"
        }
    try:
        return in_own_process(PLAIN, options)
    except RuntimeError as error:
        return {"failed": str(error)}


def in_own_process(program: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        settings = json.dumps({**vars(options), "output": None})
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(options.ranks),
        ]
        done = subprocess.run(
            [*launcher, __file__, "--one", program, "--settings", settings, "--output", str(file)],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program}: ended with status {done.returncode}\n{done.stderr[-3000:]}")
        return json.loads(file.read_text())


@contextmanager
def _half_the_layers(options: argparse.Namespace) -> Any:
    whole, options.layers = options.layers, options.layers // 2
    try:
        yield whole - options.layers
    finally:
        options.layers = whole


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    name, memory = None, None
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    figures: dict[str, Any] = {
        "device": name or "cpu",
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        OURS: in_own_process(OURS, options),
    }
    figures |= {
        PLAIN: plain_figures(options, memory),
        "plan": plan(options, device_name=name, engine=figures[OURS]["layers"] == ENGINES_LAYERS),
    }
    if options.layers > 1:
        with _half_the_layers(options) as more:
            fewer = in_own_process(OURS, options)["schemes"]
        figures["a_layer"] = {
            name: {key: (scheme[key] - fewer[name][key]) / more for key in ("seconds", "peak_bytes")}
            for name, scheme in figures[OURS]["schemes"].items()
        }
    return figures


def as_markdown(figures: dict[str, Any]) -> str:
    """Tables of what was measured, as in docs/measurements.md."""
    settings, plain = figures["settings"], figures[PLAIN]
    lines = [
        f"{settings['layers']} layers of {settings['shape']}'s width, rows of {settings['seq_length']:,} tokens, "
        f"{settings['micro_batches']} micro-batches of one row, {figures[OURS]['layout']}, "
        f"{'bf16' if settings['bf16'] else 'fp32'}{', full recompute' if settings['recompute'] else ''}, "
        f"{figures['device']}; medians of {settings['repetitions']}. x: times {PLAIN}. Layers: {_layers(figures)}.",
        "",
        "| | step (s) | x | of it scoring (s) | plan (s) | measured / plan | peak GiB | x | plan GiB | "
        "measured / plan | TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    if "seconds" in plain:
        peak = _gib(plain["peak_bytes"])
        lines.append(f"| {PLAIN} | {plain['seconds']:.3f} | 1.00 | | | | {peak} | 1.00 | | | |")
    else:
        lines.append(f"| {PLAIN} | {'failed' if 'failed' in plain else 'not run'} | | | | | | | | | |")
    for name, scheme in figures[OURS]["schemes"].items():
        planned = figures["plan"][name]
        cells = [
            f"{scheme['seconds']:.3f}", _ratio(scheme["seconds"], plain.get("seconds"), 2),
            f"{scheme['scoring_seconds']:.3f}",
            "" if planned["seconds"] is None else f"{planned['seconds']:.3f}",
            _ratio(scheme["seconds"], planned["seconds"], 2),
            _gib(scheme["peak_bytes"]), _ratio(scheme["peak_bytes"], plain.get("peak_bytes"), 2),
            _gib(planned["peak_bytes"]), _ratio(scheme["peak_bytes"], planned["peak_bytes"], 3),
            f"{planned['flops'] / scheme['seconds'] / 1e12:.3g}",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if "not_run" in plain:
        lines += ["", f"{PLAIN} was not run: {plain['not_run']}."]
    for name, layer in figures.get("a_layer", {}).items():
        lines += ["", f"One layer, {name}: {layer['seconds']:.4f} s, {_gib(layer['peak_bytes'])} GiB."]
    waits = figures[OURS].get("waits")
    if waits:
        lines += [
            "",
            f"{waits['of'][0].upper()}{waits['of'][1:]}, {waits['scheme']}: {waits['in_a_step']} in a step, "
            f"{waits['in_a_micro_batch']:g} in each micro-batch more.",
            *(f"- {count} x {place}" for place, count in waits["places"].items()),
        ]
    return "\n".join(lines)


def _layers(figures: dict[str, Any]) -> str:
    """Whose layers each of the three had, and what follows for the ratios."""
    ours, planned = figures[OURS]["layers"], next(iter(figures["plan"].values()))["layers"]
    said = f"ours {ours}, {PLAIN} {figures[PLAIN].get('layers', 'none')}, the plan {planned}"
    if ours == ENGINES_LAYERS:
        said += (
            "; so measured / plan compares two makes of layers (the plan's time takes the rate of Transformer Engine's "
            "attention)"
        )
    return said


def _ratio(one: float, other: float | None, digits: int) -> str:
    return "" if other is None else f"{one / other:.{digits}f}"


def _gib(number: float) -> str:
    return f"{number / 2**30:.3f}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=8192, help="N: tokens of a row")
    parser.add_argument("--short-window", type=int, help="n: tokens of a window (default: N / 4)")
    parser.add_argument("--micro-batches", type=int, default=2, help="of one row each, in a step")
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="the last one has a scorer"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1, help="TP over so many")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--recompute", action="store_true", help="all activations, layer by layer")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="for the figures, as JSON")
    parser.add_argument("--one", choices=MEASURE, help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch|megatron")
    if options.one is not None:  # a rank
        prepare_device()
        figures = MEASURE[options.one](argparse.Namespace(**json.loads(options.settings)))
        if dist.get_rank() == 0:
            options.output.write_text(json.dumps(figures))
        dist.destroy_process_group()
        return
    options.short_window = options.short_window or options.seq_length // 4
    figures = measure_all(options)
    options.output.write_text(json.dumps(figures, indent=1))
    print(as_markdown(figures))
    if "failed" in figures[PLAIN]:
        sys.exit(f"error: {figures[PLAIN]['failed']}")


if __name__ == "__main__":
    main(sys.argv[1:])
