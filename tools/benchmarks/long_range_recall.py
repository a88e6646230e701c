"""Does weighting help a model to use a longer context? A synthetic test with a known answer.

Each long row plants facts among its first n tokens and asks for them beyond 2n, so more than n tokens later
(planted_facts.py). Noisy filler, and facts that are asked for soon, lie between. A tiny Llama learns rows of n tokens,
where facts are asked for too, and is then extended to N tokens with each scheme in turn, by the training code itself,
on the same rows for the same steps.

Reported on held-out rows, mean and standard deviation over seeds:

    recall        share of the asked values that are the model's first choice; of far facts, more than n tokens back
    key NLL       mean NLL of those values; they are the rows' key tokens, known and not guessed
    short NLL     mean NLL of all targets of rows of n tokens, as the base was trained on
    weight        mean weight of the asked values by the scheme at its last step; 1 is their weight in uniform

Schemes of a seed start from the same base and see the same rows, so each is also compared with uniform seed by seed.

    OMP_NUM_THREADS=1 tools/benchmarks/long_range_recall.py --output DIR

R = rows, N = tokens of a row, T = N - 1 targets, V = vocabulary.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from planted_facts import BOS, VOCAB, Rows, make_rows
from recall_figures import Measured, format_table, plot, plot_gain
from tqdm import tqdm

from megatron_tw.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)

SCHEMES = ("uniform", "dense", "sparse", "longce", "exact")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the experiment; each is an option."""

    context: int = 32
    """n: tokens of a row of the base training, and of the scorer's windows."""
    seq_length: int = 512
    """N: tokens of a row of the extension."""
    facts: int = 4
    """Far facts of a long row; facts of a row of n tokens."""
    hidden_size: int = 64
    layers: int = 2
    rotary_base: float = 10000.0
    """Of the base training."""
    extended_rotary_base: float = 200000.0
    base_iters: int = 300
    base_rows: int = 64
    """Rows of a step of the base training."""
    base_lr: float = 3e-3
    train_iters: int = 120
    rows: int = 2
    """Rows of a step of the extension."""
    lr: float = 3e-4
    warmup: int = 10
    kappa: float = 0.2
    """--sparsification of sparse."""
    interpolation: float = 0.75
    """Lambda of dense."""
    truncation: float = 5.0
    """Gamma of longce."""
    alpha: float = 0.15
    """Of exact."""
    gamma: float = 0.5
    """Of exact."""
    tau: int = 0
    """Of exact, in tokens; 0 for n."""
    points: int = 6
    """Measurements along the extension."""
    held_out_rows: int = 64

    def describe(self) -> str:
        """The extension, in words."""
        return (
            f"extended from {self.context} to {self.seq_length} tokens in {self.train_iters} steps of {self.rows} rows"
        )

    def rows_of(self, seq_length: int, num_rows: int, *, seed: int, part: int) -> Rows:
        """Rows of this experiment."""
        return make_rows(
            context=self.context, facts=self.facts, seq_length=seq_length, num_rows=num_rows, seed=seed, part=part
        )


# --- one model: in a worker process -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training run of the experiment: the base of a seed (scheme None), or an extension of it."""

    settings: Settings
    seed: int
    scheme: str | None
    folder: Path
    """Of the seed."""

    @property
    def iters(self) -> int:
        return self.settings.base_iters if self.scheme is None else self.settings.train_iters


_steps_done: Any = None
"""Shared counter of all processes, for the progress bar."""


def _start_worker(steps_done: Any) -> None:
    global _steps_done
    _steps_done = steps_done
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch|megatron")


def run_task(task: Task) -> list[dict[str, float]]:
    """Train and measure; the base is exported for the extensions. Returns the measurements along the way."""
    from megatron_tw.parallel.devices import prepare_device
    from megatron_tw.parallel.layout import destroy_layout, make_layout, start_process_group
    from megatron_tw.training.inputs import open_inputs
    from megatron_tw.training.loop import Run

    settings, is_base = task.settings, task.scheme is None
    if is_base:
        prepare_seed(settings, task.seed, task.folder)
    config = _options(task)
    device = prepare_device()
    start_process_group(device, config.parallel.distributed_timeout_minutes)
    inputs = open_inputs(config)
    try:
        run = Run.start(config, inputs, make_layout(config.parallel), device)
        meter = Meter(task, run)
        measured = [meter.measure(0)]
        every = max(1, task.iters // settings.points)
        while run.iteration < task.iters:
            run.step(next(run.loader), run.iteration)
            run.iteration += 1
            if run.iteration % every == 0 or run.iteration == task.iters:
                measured.append(meter.measure(run.iteration))
            if _steps_done is not None:
                with _steps_done.get_lock():
                    _steps_done.value += 1
        if is_base:
            from megatron_tw.model.build import save_hf

            architecture = inputs.source.architecture
            save_hf(
                run.chunks, task.folder / "base", architecture, run.layout, max_position_embeddings=settings.context
            )
    finally:
        destroy_layout()
    return measured


def _options(task: Task) -> RunConfig:
    """The options of the run, as tools/train.py would read them."""
    s, is_base = task.settings, task.scheme is None
    weighting = {
        "dense": WeightingOptions(weighting="dense", interpolation=s.interpolation),
        "sparse": WeightingOptions(weighting="sparse", sparsification=s.kappa),
        "longce": WeightingOptions(weighting="longce", truncation=s.truncation),
        "exact": WeightingOptions(weighting="exact", alpha=s.alpha, gamma=s.gamma, tau=s.tau or s.context),
    }.get(task.scheme or "uniform", WeightingOptions())
    rows = s.base_rows if is_base else s.rows
    return RunConfig(
        model=ModelConfig(
            load_hf=str(task.folder / ("random" if is_base else "base")),
            rotary_base=s.rotary_base if is_base else s.extended_rotary_base,
        ),
        data=DataConfig(
            data_path=(str(task.folder / ("short_rows" if is_base else "long_rows")),),
            seq_length=s.context if is_base else s.seq_length,
            bos_id=BOS,
        ),
        train=TrainConfig(train_iters=task.iters, micro_batch_size=rows, global_batch_size=rows, seed=task.seed),
        optimizer=OptimizationConfig(
            lr=s.base_lr if is_base else s.lr,
            min_lr=0.0,
            lr_decay_style="cosine" if is_base else "constant",
            lr_warmup_iters=min(s.warmup, task.iters - 1),
        ),
        weighting=weighting,
        windows=WindowsConfig() if is_base else WindowsConfig(short_window=s.context, scoring_micro_batch=16),
        checkpoint=CheckpointConfig(),
    )


class Meter:
    """Measures the model of a run on held-out rows."""

    def __init__(self, task: Task, run: Any) -> None:
        self.run, self.settings, self.is_base = run, task.settings, task.scheme is None
        s = self.settings
        self.short = s.rows_of(s.context, 4 * s.held_out_rows, seed=task.seed, part=2)
        self.long = s.rows_of(s.seq_length, s.held_out_rows, seed=task.seed, part=3)

    def measure(self, iteration: int) -> dict[str, Any]:
        """Recall near and far, by distance too, and the NLLs of the module's docstring."""
        short_right, short_nll_RT = self._forward(self.short)
        measured: dict[str, Any] = {
            "iteration": iteration,
            "short_recall": float(short_right.mean()),
            "short_nll": float(short_nll_RT.mean()),
        }
        rows = self.short if self.is_base else self.long
        right, nll_RT = (short_right, short_nll_RT) if self.is_base else self._forward(rows)
        far = rows.distance > (0 if self.is_base else self.settings.context)
        row, column = rows.asked[far].T
        measured |= {
            "recall": float(right[far].mean()),
            "key_nll": float(nll_RT[row, column - 1].mean()),
            "lm_loss": float(nll_RT.mean()),
            "near_recall": float(right[~far].mean()) if not far.all() else float("nan"),
        }
        if not self.is_base:
            if iteration == self.settings.train_iters:
                measured["weight"] = float(self._weights(nll_RT)[row, column - 1].mean())
            octaves = np.floor(np.log2(rows.distance / self.settings.context)).astype(int)
            measured["recall_by_octave"] = {
                int(octave): float(right[far & (octaves == octave)].mean()) for octave in np.unique(octaves[far])
            }
        return measured

    def _forward(self, rows: Rows) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Whether each asked value is the first choice [A], and all NLLs [R, T]."""
        import torch

        from megatron_tw.model.sequence import SequenceShard

        shard = SequenceShard.over(None, rows.ids.shape[1])
        first, nll = [], []
        with torch.no_grad():
            for ids_MN in torch.from_numpy(rows.ids).split(max(1, 8192 // rows.ids.shape[1])):
                ids_MN = ids_MN.to(self.run.step.device.device)
                logits_NMV = self.run.chunks[0](
                    input_ids=ids_MN, position_ids=None, attention_mask=None, packed_seq_params=shard
                )
                logits_MTV = logits_NMV.transpose(0, 1)[:, :-1, :VOCAB].float()
                first.append(logits_MTV.argmax(-1).cpu())
                nll.append(torch.nn.functional.cross_entropy(logits_MTV.mT, ids_MN[:, 1:], reduction="none").cpu())
        row, column = rows.asked.T
        return torch.cat(first).numpy()[row, column - 1] == rows.ids[row, column], torch.cat(nll).numpy()

    def _weights(self, long_RT: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The weights [R, T] that the scheme would give the held-out long rows now."""
        import torch

        from megatron_tw.weighting import token_weights

        step = self.run.step
        rows_RN, long = torch.from_numpy(self.long.ids).to(step.device.device), torch.from_numpy(long_RT)
        short = None
        if step.scorer is not None:
            short = step.scorer.complete(step.scorer.short_nll(rows_RN, torch.arange(len(rows_RN))).cpu(), long)
        return token_weights(long, short, step.schedule.at(self.run.iteration)).numpy()


# --- the experiment ---------------------------------------------------------------------------------------------------


def prepare_seed(settings: Settings, seed: int, folder: Path) -> None:
    """Rows and the random model of a seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tw.data.prepare import prepare_rows

    s = settings
    folder.mkdir(parents=True)
    # The base sees its rows a few times, the extension each of its rows once.
    for name, length, num_rows, part in (
        ("short_rows", s.context, min(s.base_iters * s.base_rows, 8192), 0),
        ("long_rows", s.seq_length, s.train_iters * s.rows, 1),
    ):
        rows = s.rows_of(length, num_rows, seed=seed, part=part)
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows.ids.tolist()))
        prepare_rows([file], folder / name, seq_length=length, tokenizer=None, vocab_size=VOCAB, bos_id=BOS)
        file.unlink()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=s.hidden_size,
        intermediate_size=s.hidden_size * 2,
        num_hidden_layers=s.layers,
        num_attention_heads=max(1, s.hidden_size // 32),
        num_key_value_heads=max(1, s.hidden_size // 32),
        max_position_embeddings=s.context,
        bos_token_id=BOS,
        eos_token_id=None,
        tie_word_embeddings=True,  # copying a token is then easy to learn
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); with the usual 0.02 so small a model hardly starts
    )
    LlamaForCausalLM(config).save_pretrained(folder / "random")


def run_experiment(
    settings: Settings, seeds: Sequence[int], schemes: Sequence[str], folder: Path, processes: int
) -> Measured:
    """Every base and every extension, `processes` at a time, each in one process of one thread."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = get_context("spawn")
    steps_done = context.Value("i", 0)
    measured: Measured = {seed: {} for seed in seeds}
    total = len(seeds) * (settings.base_iters + len(schemes) * settings.train_iters)
    tasks = [Task(settings=settings, seed=seed, scheme=None, folder=folder / f"seed{seed}") for seed in seeds]
    with (
        ProcessPoolExecutor(processes, context, _start_worker, (steps_done,)) as pool,
        tqdm(total=total, desc="training", unit="step", dynamic_ncols=True) as bar,
    ):
        running: dict[Future[list[dict[str, Any]]], Task] = {pool.submit(run_task, task): task for task in tasks}
        while running:
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            bar.update(steps_done.value - bar.n)
            for future in done:
                task = running.pop(future)
                measured[task.seed][task.scheme or "base"] = future.result()
                if task.scheme is None:
                    extensions = [replace(task, scheme=scheme) for scheme in schemes]
                    running |= {pool.submit(run_task, extension): extension for extension in extensions}
    return measured


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="uniform is always among them"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = vars(build_parser().parse_args(arguments))
    output, seeds, schemes, processes = (options.pop(name) for name in ("output", "seeds", "schemes", "processes"))
    settings = Settings(**options)
    if output.exists() and any(output.iterdir()):
        sys.exit(f"error: --output {output}: expected a new or empty folder, found one that holds files")
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [name for name in SCHEMES if name in ("uniform", *schemes)]
        measured = run_experiment(settings, seeds, chosen, Path(folder), processes)
    seconds = time.monotonic() - started
    table = format_table(measured, context=settings.context, run=settings.describe())
    print(table)
    content = {"settings": asdict(settings), "seeds": seeds, "seconds": seconds, "measured": measured}
    (output / "recall.json").write_text(json.dumps(content, indent=1) + "\n")
    (output / "recall.md").write_text(table + "\n")
    plot(measured, output / "recall.png", context=settings.context)
    plot_gain(measured, output / "gain.png", context=settings.context)
    print(f"{output}/recall.json, recall.md, recall.png, gain.png ({seconds:.0f} s)")


if __name__ == "__main__":
    main(sys.argv[1:])
