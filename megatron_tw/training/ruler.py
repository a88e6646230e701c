"""RULER while a model is trained: teacher-forced exactness on a few examples of tasks that need no outside text."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tw.config import RunConfig
from megatron_tw.config.ruler import RulerOptions
from megatron_tw.data.tokenizer import fingerprint_of, load_tokenizer
from megatron_tw.evaluation.ruler.exactness import Forward
from megatron_tw.evaluation.ruler.scoring import Work, first_tokens, open_examples, ruler_exactness
from megatron_tw.evaluation.ruler.tasks import Texts
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout


def open_ruler(config: RunConfig, tokenizer_dir: Path | None) -> Work:
    """The examples of --eval-ruler.

    Raises:
        ValueError: no tokenizer, or a task that does not fit the length of a row.
    """
    if tokenizer_dir is None or fingerprint_of(tokenizer_dir) is None:
        raise ValueError("--eval-ruler: prompts need the tokenizer, which neither --data-path nor the model holds")
    tokenizer = load_tokenizer(tokenizer_dir)
    try:
        return open_examples(
            RulerOptions(ruler_samples=config.train.eval_ruler_samples),
            config.train.eval_ruler or (),
            (config.data.seq_length,),
            Texts(),
            tokenizer,
            first_tokens(config.data.bos_id, tokenizer),
        )
    except ValueError as error:
        raise ValueError(f"--eval-ruler: {error}") from error


def ruler_metrics(
    work: Work, model: Sequence[torch.nn.Module], config: RunConfig, layout: Layout, device: Device
) -> dict[str, float]:
    """ "ruler_TASK": mean exactness of each task, 0 to 1, on every rank. Collective over the world."""
    forward = Forward(
        chunks=model,
        layout=layout,
        device=device,
        sequence_parallel=config.parallel.uses_sequence_parallel,
        micro_batch_size=config.train.micro_batch_size,
    )
    means = torch.zeros(len(work.examples), dtype=torch.float64, device=device.device)
    for place, examples in enumerate(work.examples):
        flags = ruler_exactness(forward, examples, work, keep_bar=False)
        if flags is not None:
            means[place] = flags["answers"].mean()
    if layout.pp_size > 1:
        dist.broadcast(means, layout.last_stage_rank, group=layout.pp_group)
    return {f"ruler_{examples.name}": mean for examples, mean in zip(work.examples, means.tolist(), strict=True)}
