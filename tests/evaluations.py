"""Evaluations on gloo ranks, and models and data small enough for them."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny import BOS, Axes, make_folder, prepare_ready_rows

from megatron_tw.config import parse_options
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.evaluation.kept import Kept
from megatron_tw.evaluation.program import evaluate
from megatron_tw.evaluation.results import Results
from megatron_tw.parallel.layout import destroy_layout


def flags_of(axes: Axes) -> list[str]:
    """The layout as options."""
    sizes = (("tensor", axes.tp), ("pipeline", axes.pp))
    flags = [f"--{name}-model-parallel-size={size}" for name, size in sizes if size > 1]
    flags += [f"--context-parallel-size={axes.cp}"] if axes.cp > 1 else []
    return flags + ([f"--num-layers-per-virtual-pipeline-stage={axes.vpp_layers}"] if axes.vpp_layers else [])


def run_evaluation(options: Sequence[str]) -> str | None:
    """On a rank: what tools/evaluate.py does; its summary, where it is written."""
    config = parse_options(list(options), EvaluationConfig)
    try:
        evaluation = evaluate(config)
        if evaluation is None:
            return None
        evaluation.save(config.evaluation.output)
        return evaluation.summary()
    finally:
        destroy_layout()
        gc.collect()


@contextmanager
def counted_passes(stop_after: int | None) -> Iterator[list[str]]:
    """On a rank: the parts that are written; the evaluation dies at the one after `stop_after` of them."""
    written: list[str] = []
    real = Kept.write

    def write(self: Kept, part: str, arrays: Any) -> None:
        if stop_after is not None and len(written) == stop_after:
            raise RuntimeError("killed")
        real(self, part, arrays)
        written.append(part)

    Kept.write = write  # type: ignore[method-assign]
    try:
        yield written
    finally:
        Kept.write = real  # type: ignore[method-assign]


def run(options: Sequence[str], stop_after: int | None = None) -> list[str]:
    """On a rank: an evaluation, killed after some parts; the parts that it wrote."""
    with counted_passes(stop_after) as written:
        try:
            run_evaluation(options)
        except RuntimeError:
            assert stop_after is not None
    return written


def run_or_die(options: Sequence[str], stop_after: int) -> None:
    """On a rank: an evaluation that dies after some parts."""
    with counted_passes(stop_after):
        run_evaluation(options)


def parts_there(output: Path) -> set[str]:
    """The parts that an evaluation that was cut off has left."""
    return {file.stem for file in output.with_name(f"{output.name}.partial").glob("*.npz")}


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".npz":
            found |= {f"{file.name} {name}": array.tobytes() for name, array in np.load(file).items()}
        else:
            found[file.name] = file.read_text()
    return found


def values(folder: Path) -> dict[tuple[str, str], float | None]:
    """The figures of results.json by task and metric."""
    return {(record.task, record.metric): record.value for record in Results.load(folder).records}


def make_sharp_model(folder: Path, sharpness: float = 5.0, **changes: object) -> Path:
    """A random tiny Llama that is sure of what it says, so that contexts matter."""
    make_folder("llama", folder, **changes)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder)
    return folder


def make_near_model(model: Path, folder: Path, noise: float = 0.02) -> Path:
    """A model a little beside another one."""
    near = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    near.save_pretrained(folder)
    return folder


def make_likely_rows(model: Path, output: Path, *, rows: int, tokens: int) -> Path:
    """Rows drawn from the model itself: it predicts them well, and worse without what it drew them from."""
    drawn_from: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    begin = torch.full((rows, 1), BOS)
    drawn = drawn_from.generate(begin, max_length=tokens, min_length=tokens, do_sample=True, pad_token_id=0)
    return prepare_ready_rows(np.ascontiguousarray(drawn.numpy()), output)
