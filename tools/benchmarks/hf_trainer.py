"""What token weighting costs in the Hugging Face Trainer: a step's seconds and the most memory that training holds.

The stock Trainer, with its logits, against TokenWeightingTrainer, each in a process of its own, one after the other and
as many times as there are repetitions, so that whatever else slows the machine down slows all of them. Memory is what
comes on top of the model as it was loaded: on a GPU what PyTorch allocated, on a CPU the resident memory.

    tools/benchmarks/hf_trainer.py                 # on a CPU
    tools/benchmarks/hf_trainer.py --bf16 ...      # on a GPU, if there is one
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from megatron_tw.integrations.huggingface import TokenWeightingConfig, TokenWeightingTrainer

STOCK = "stock"
SCHEMES = (STOCK, "uniform", "dense", "sparse")


class Clock(transformers.TrainerCallback):
    """Seconds from the end of a step to the end of the next one, scoring included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: the median step of one scheme, and peak bytes beyond the model."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(options, folder)
        before = _held_bytes(peak=False)
        trainer.train()
        return {"seconds": median(clock.seconds), "bytes": _held_bytes(peak=True) - before}


def make_trainer(options: argparse.Namespace, folder: str) -> tuple[transformers.Trainer, Clock]:
    torch.manual_seed(0)
    heads = max(2, options.hidden_size // 64)
    config = transformers.LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.seq_length,
        bos_token_id=1,
    )
    ids = torch.randint(3, options.vocab_size, (options.steps + 1, options.seq_length))
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=options.steps + 1,
        bf16=options.bf16,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        activation_checkpointing=options.activation_checkpointing,
    )
    clock = Clock()
    common: dict[str, Any] = {
        "model": transformers.LlamaForCausalLM(config),
        "args": arguments,
        "train_dataset": [{"input_ids": row, "labels": row} for row in ids],
        "callbacks": [clock],
    }
    if options.scheme == STOCK:
        return transformers.Trainer(**common), clock
    weighting = TokenWeightingConfig(weighting=options.scheme, short_window=options.short_window)
    return TokenWeightingTrainer(**common, token_weighting=weighting), clock


def _held_bytes(*, peak: bool) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    import psutil

    return psutil.Process().memory_info().rss


def format_figures(figures: dict[str, list[dict[str, float]]]) -> str:
    """A table: medians over the repetitions, and ratios to the stock Trainer."""
    middle = {scheme: {name: median(run[name] for run in runs) for name in runs[0]} for scheme, runs in figures.items()}
    lines = ["| trainer | step (s) | ratio | memory (MiB) | ratio |", "| --- | --- | --- | --- | --- |"]
    for scheme, values in middle.items():
        time_ratio, memory_ratio = (values[name] / middle[STOCK][name] for name in ("seconds", "bytes"))
        lines.append(
            f"| {scheme} | {values['seconds']:.2f} | {time_ratio:.2f} | {values['bytes'] / 2**20:.0f} | "
            f"{memory_ratio:.2f} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--seq-length", type=int, default=2048, help="N: tokens of a row")
    parser.add_argument("--short-window", type=int, default=512, help="n: tokens of a window")
    parser.add_argument("--steps", type=int, default=2, help="of each run, after one that is not counted")
    parser.add_argument("--repetitions", type=int, default=2, help="runs of each scheme")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--scheme", choices=SCHEMES, help="measure this one alone, in this process, as JSON")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    if options.scheme is not None:
        print(json.dumps(measure(options)))
        return
    figures: dict[str, list[dict[str, float]]] = {scheme: [] for scheme in SCHEMES}
    for _ in range(options.repetitions):
        for scheme, runs in figures.items():
            command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--scheme", scheme]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(printed.splitlines()[-1]))
    print(format_figures(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
