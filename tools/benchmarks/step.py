"""What weighting costs: seconds of a training step with plain cross-entropy, and with unfrozen scoring before it.

One model takes the steps of all schemes in turn, so that whatever else slows the machine down slows all of them.
First undisturbed steps: their medians, and the ratio to uniform. Then steps with clocks inside, which split them:

    scoring          the short windows' forward pass
    forward          the long forward pass, its loss and weights
    backward
    optimizer
    communication    inside any of those, taken out of their time
    other

On a GPU the clocks wait for its queue, so the parts of a step come to more than an undisturbed step.

    tools/benchmarks/step.py                                 # on a CPU: one rank, then TP 2, ranks started from here
    torchrun --nproc-per-node 8 tools/benchmarks/step.py     # TP over all the ranks of the launcher
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_tw.config import (
    ComputeConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)
from megatron_tw.parallel.devices import prepare_device, synchronize

if TYPE_CHECKING:
    from megatron_tw.training.loop import Run

BOUND = 1.4
"""What a step with unfrozen scoring may cost, in uniform steps: a forward pass is about a third of a step."""
SCHEMES = {
    "uniform": WeightingOptions(),
    "dense": WeightingOptions(weighting="dense"),
    "sparse": WeightingOptions(weighting="sparse"),
}
PARTS = ("scoring", "forward", "backward", "optimizer", "communication", "other")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
    "barrier",
)
BOS = 0


class Stopwatch:
    """Seconds by part; what a part does inside another is taken out of the other's. Off until `running`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = False
        self._parts: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.running or (name == "forward" and "scoring" in self._parts):
            yield
            return
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                result = function(*args, **kwargs)
            return _TimedWork(self, result) if kwargs.get("async_op") and result is not None else result

        return call

    def _charge(self) -> None:
        synchronize()
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


@dataclass
class _TimedWork:
    """A collective under way: waiting for it is communication."""

    watch: Stopwatch
    work: dist.Work

    def wait(self, *args: Any) -> Any:
        with self.watch.part("communication"):
            return self.work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """On every rank of the launcher's world: the figures by scheme; None on all but rank 0."""
    warnings.filterwarnings("ignore", module="torch|megatron")
    watch = Stopwatch()
    for name in COLLECTIVES:  # before Megatron-Core is imported: it keeps some of them under names of its own
        setattr(dist, name, watch.timed("communication", getattr(dist, name)))
    from megatron.core.pipeline_parallel import schedules

    from megatron_tw.parallel.layout import make_layout, start_process_group
    from megatron_tw.training.inputs import open_inputs
    from megatron_tw.training.loop import Run

    for name in ("forward", "backward"):
        setattr(schedules, f"{name}_step", watch.timed(name, getattr(schedules, f"{name}_step")))
    device = prepare_device()
    start_process_group(device, 10)
    with _inputs(options) as folder:
        config = _config(options, folder, dist.get_world_size())
        inputs = open_inputs(config)
        run = Run.start(config, inputs, make_layout(config.parallel), device)
        assert run.step.scorer is not None
        run.step.optimizer.step = watch.timed("optimizer", run.step.optimizer.step)
        run.step.scorer.short_nll = watch.timed("scoring", run.step.scorer.short_nll)  # type: ignore[method-assign]
        gc.collect()
        gc.disable()  # a collection of all that was imported takes as long as a small step
        seconds, parts = _take_steps(run, watch, options.repetitions)
        gc.enable()
        if not run.layout.reports:
            return None
        return {
            "layout": run.layout.describe(),
            "device": device.type,
            "parameters": _layer_parameters(options),
            "options": {key: value for key, value in vars(options).items() if key != "output"},
            "schemes": {
                name: {
                    "step_seconds": median(seconds[name]),
                    "ratio": median(seconds[name]) / median(seconds["uniform"]),
                    "steps": seconds[name],
                    "parts": {part: median(step.get(part, 0.0) for step in parts[name]) for part in PARTS},
                }
                for name in SCHEMES
            },
        }


def _take_steps(
    run: "Run", watch: Stopwatch, repetitions: int
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, float]]]]:
    """Rounds of one step of each scheme: one to warm up, `repetitions` undisturbed, half as many clocked.

    Returns by scheme the seconds of the undisturbed steps, and the seconds by part of the clocked ones.
    """
    from megatron_tw.weighting.options import schedule_from_options

    schedules = {name: schedule_from_options(weighting) for name, weighting in SCHEMES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SCHEMES}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in SCHEMES}
    rounds = 1 + repetitions + (repetitions + 1) // 2
    with tqdm(
        total=rounds * len(SCHEMES), desc=run.layout.describe(), unit="step", disable=not run.layout.reports
    ) as bar:
        for number in range(rounds):
            watch.running = number > repetitions
            for name, schedule in schedules.items():
                run.step.schedule = schedule
                watch.seconds.clear()
                with watch.part("other"):
                    metrics = run.step(next(run.loader), run.iteration)
                run.iteration += 1
                if watch.running:
                    parts[name].append(dict(watch.seconds))
                elif number > 0:
                    seconds[name].append(metrics["step_seconds"])
                bar.update()
    return seconds, parts


def format_figures(figures: dict[str, Any]) -> str:
    """The table of one layout."""
    options = figures["options"]
    lines = [
        f"{figures['layout']} on {figures['device']}: {figures['parameters'] / 1e6:.1f}M parameters "
        f"without embeddings, N {options['seq_length']}, n {options['short_window']}, {options['micro_batches']} "
        f"micro-batches; seconds, medians of {options['repetitions']} interleaved steps",
        f"{'scheme':10}{'step':>9}{'ratio':>8}   " + "".join(f"{part:>14}" for part in PARTS),
    ]
    for name, scheme in figures["schemes"].items():
        parts = "".join(f"{scheme['parts'][part]:14.3f}" for part in PARTS)
        lines.append(f"{name:10}{scheme['step_seconds']:9.3f}{scheme['ratio']:8.2f}   {parts}")
    worst = max(scheme["ratio"] for scheme in figures["schemes"].values())
    lines.append(f"highest ratio {worst:.2f}, bound {BOUND}: {'held' if worst <= BOUND else 'NOT HELD'}")
    return "\n".join(lines)


def _layer_parameters(options: argparse.Namespace) -> int:
    """Of all layers, without embeddings and norms: four attention and three MLP matrices each."""
    hidden, ffn = options.hidden_size, _ffn_size(options)
    return int(options.layers * (4 * hidden**2 + 3 * hidden * ffn))


def _ffn_size(options: argparse.Namespace) -> int:
    return int(options.hidden_size * 8 // 3 // 64 * 64)


def _config(options: argparse.Namespace, folder: Path, world_size: int) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=world_size),
        model=ModelConfig(load_hf=str(folder / "model")),
        compute=ComputeConfig(bf16=options.bf16),
        data=DataConfig(data_path=(str(folder / "rows"),), seq_length=options.seq_length, bos_id=BOS),
        train=TrainConfig(train_iters=10**6, micro_batch_size=1, global_batch_size=options.micro_batches),
        weighting=SCHEMES["sparse"],  # decides that there is a scorer
        windows=WindowsConfig(short_window=options.short_window),
    )


@contextmanager
def _inputs(options: argparse.Namespace) -> Iterator[Path]:
    """A folder with a random model and random rows, made by rank 0 for all ranks."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        if dist.get_rank() == 0:
            _write_inputs(options, Path(own))
        dist.broadcast_object_list(shared)
        yield Path(shared[0])
        dist.barrier()


def _write_inputs(options: argparse.Namespace, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tw.data.prepare import prepare_rows

    torch.manual_seed(1)
    heads = max(2, options.hidden_size // 64)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=_ffn_size(options),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.seq_length,
        bos_token_id=BOS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows_RN = torch.randint(1, options.vocab_size, (8 * options.micro_batches, options.seq_length))
    rows_RN[:, 0] = BOS
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows_RN.tolist()))
    prepare_rows(
        [file],
        folder / "rows",
        seq_length=options.seq_length,
        tokenizer=None,
        vocab_size=options.vocab_size,
        bos_id=BOS,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seq-length", type=int, default=1024, help="N: tokens of a row")
    parser.add_argument("--short-window", type=int, default=256, help="n: tokens of a window")
    parser.add_argument("--micro-batches", type=int, default=4, help="of one row each, in a step")
    parser.add_argument("--repetitions", type=int, default=5, help="undisturbed steps of each scheme")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], metavar="TP", help="what to start; not under torchrun"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the figures as JSON, a line a layout")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    if "RANK" not in os.environ:
        for ranks in options.ranks:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            subprocess.run([*command, __file__, *arguments], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        return
    figures = measure(options)
    if figures is not None:
        print(format_figures(figures), flush=True)
        if options.output is not None:
            figures["options"].pop("ranks")
            with options.output.open("a") as file:
                file.write(json.dumps(figures) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
