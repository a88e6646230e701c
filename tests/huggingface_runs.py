"""Runs of the Hugging Face Trainer on the tiny Llama and reference rows, in this process or on gloo ranks."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState
from tiny import STRIDE, TINY_LLAMA, WINDOW, reference_rows
from torch.utils.data import Dataset

from megatron_tw.integrations.huggingface import TokenWeightingConfig, TokenWeightingTrainer

Example = dict[str, torch.Tensor]
WINDOWS: dict[str, Any] = {"short_window": WINDOW, "short_stride": STRIDE}
DENSE = TokenWeightingConfig(weighting="dense", **WINDOWS)
SPARSE = TokenWeightingConfig(weighting="sparse", weighting_parameters={"sparsification": 0.2}, **WINDOWS)


class Examples(Dataset):
    """A dataset of these examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def whole_rows(order: np.ndarray, **columns: np.ndarray) -> Examples:
    """Rows of the reference measurements in this order, every target counted; `columns` beside them."""
    rows = torch.from_numpy(reference_rows())
    return Examples(
        [
            {
                "input_ids": rows[row],
                "labels": rows[row],
                **{name: torch.from_numpy(column[row]) for name, column in columns.items()},
            }
            for row in order.flatten()
        ]
    )


def collate_right_padded(examples: Sequence[Example]) -> Example:
    """Rows of several lengths as a batch, padded with token 0."""
    length = max(len(example["input_ids"]) for example in examples)

    def column(name: str, fill: int) -> torch.Tensor:
        pad = torch.nn.functional.pad
        return torch.stack([pad(x[name], (0, length - len(x[name])), value=fill) for x in examples])

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}


def load_tiny_llama(**options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32, **options)


def arguments(output: Path | str, kind: Any = transformers.TrainingArguments, **changes: Any) -> Any:
    """Of this kind of TrainingArguments, as the reference runs were made."""
    settings: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.01, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "max_grad_norm": 1.0, "num_train_epochs": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(**{**settings, **changes})


def logs_of(trainer: transformers.Trainer) -> dict[str, np.ndarray]:
    """What the Trainer logged of its steps, by name."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: np.array([entry[name] for entry in steps]) for name in steps[0]}


def train(
    data: Examples,
    config: TokenWeightingConfig,
    output: Path | str,
    model: Callable[[], Any] = load_tiny_llama,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """The logs of a run."""
    trainer = TokenWeightingTrainer(
        model=model(),
        args=arguments(output, **changes),
        train_dataset=data,
        data_collator=collate_right_padded if "short_nll" not in data[0] else None,
        token_weighting=config,
    )
    trainer.train()
    return logs_of(trainer)


def train_on_rank(*args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """On a rank: `train`, with a fresh Accelerator afterwards."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # asked for; the process group is there already
    try:
        return train(*args, ddp_backend="gloo", **kwargs)
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        AcceleratorState._reset_state(reset_partial_state=True)


def load_sharded_tiny_llama() -> Any:
    """On two ranks: the model as transformers loads it for FSDP2, each with its shard."""
    return load_tiny_llama(distributed_config=transformers.distributed.DistributedConfig(fsdp_size=2))
