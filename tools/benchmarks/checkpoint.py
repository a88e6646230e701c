"""What checkpoints cost: seconds of writing and of reading one, with checksums and without; and of the steps that are
made while one is written beside them (--async-save).

One model is saved and loaded in turn in all ways, so what else the machine does slows all. What is read
was just written, so it comes from memory; from a disk, reading takes longer and hashing does not.

    tools/benchmarks/checkpoint.py
    torchrun --nproc-per-node 8 tools/benchmarks/checkpoint.py     # TP over all the ranks of the launcher
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist

from megatron_tw.config import CheckpointConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.parallel.layout import make_layout, start_process_group


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """On every rank: seconds by what was done."""
    from megatron_tw.runtime.intact import open_checkpoint
    from megatron_tw.runtime.saver import Saver
    from megatron_tw.training.inputs import open_inputs
    from megatron_tw.training.loop import Run

    device = prepare_device()
    config = RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=dist.get_world_size()),
        model=ModelConfig(load_hf=str(folder / "model")),
        data=DataConfig(data_path=(str(folder / "rows"),), seq_length=options.seq_length),
        train=TrainConfig(train_iters=10**6, global_batch_size=1),
        checkpoint=CheckpointConfig(save=str(folder / "run")),
    )
    inputs = open_inputs(config)
    run = Run.start(config, inputs, make_layout(config.parallel), device)
    saver = Saver(options=config.checkpoint, needed=frozenset(), say=lambda text: None)
    beside = Saver(options=replace(config.checkpoint, async_save=True), needed=frozenset(), say=lambda text: None)
    step = partial(run.step, next(run.loader), 0)
    step()
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        dist.barrier()
        begun = time.perf_counter()
        work()
        dist.barrier()
        seconds.setdefault(name, []).append(time.perf_counter() - begun)

    def save() -> None:
        saver.save(run.begin_checkpoint)

    def save_without() -> None:
        with mock.patch("megatron_tw.runtime.checksums.hash_files", return_value={}):
            save()

    def look_and_step() -> None:
        beside.look()
        step()

    def is_there() -> bool:
        return beside.newest is not None

    def save_beside() -> None:
        """A save, and steps until it is complete, as in a run."""
        run.config = replace(run.config, checkpoint=beside.options)
        beside.newest = None
        begun = time.perf_counter()
        timed("save beside, the run waits", lambda: beside.save(run.begin_checkpoint))
        while not is_there():
            timed("step beside", look_and_step)
        seconds.setdefault("save beside, until it is there", []).append(time.perf_counter() - begun)
        run.config = config

    def load(verify: bool) -> None:
        saved = open_checkpoint(folder / "run", verify=verify)
        assert saved is not None
        from megatron_tw.runtime.checkpoint import load_checkpoint

        load_checkpoint(saved, run.chunks, run.step.optimizer, run.step.scheduler)

    for _ in range(options.repetitions + 1):
        timed("save without", save_without)
        timed("save with", save)
        timed("load without", lambda: load(False))
        timed("load with", lambda: load(True))
        for _ in range(5):
            timed("step", step)
        save_beside()
    return {name: values[1:] for name, values in seconds.items()}  # the first one warms up


def write_inputs(options: argparse.Namespace, folder: Path) -> None:
    """A random model and a few rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tw.data.prepare import prepare_rows

    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 64,
        max_position_embeddings=options.seq_length,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    file = folder / "rows.jsonl"
    rows_RN = torch.randint(1, options.vocab_size, (4, options.seq_length))
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows_RN.tolist()))
    prepare_rows([file], folder / "rows", seq_length=options.seq_length, tokenizer=None, vocab_size=options.vocab_size)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hidden-size", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoints are written (default: the system's)")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch|megatron")
    start_process_group(prepare_device(), 10)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        shared = [own]
        if dist.get_rank() == 0:
            write_inputs(options, Path(own))
        dist.broadcast_object_list(shared)
        seconds = measure(options, Path(shared[0]))
        if dist.get_rank() == 0:
            checkpoint = Path(own) / "run" / "iter_0000000"
            size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
            print(f"{dist.get_world_size()} ranks, {size / 2**30:.2f} GiB, medians of {options.repetitions}")
            for what in ("save", "load"):
                ours, plain = (median(seconds[f"{what} {way}"]) for way in ("with", "without"))
                print(f"{what}: {plain:.3f} s without checksums, {ours:.3f} s with, ratio {ours / plain:.2f}")
            during, step = median(seconds["step beside"]), median(seconds["step"])
            waits, there, saves = (
                median(seconds[f"save {name}"])
                for name in ("beside, the run waits", "beside, until it is there", "with")
            )
            print(
                f"save beside the training: the run waits {waits:.3f} s, {waits / saves:.2f} of a save; it is there "
                f"after {there:.3f} s; a step meanwhile {during:.3f} s, without {step:.3f} s, ratio {during / step:.2f}"
            )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
