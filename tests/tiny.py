"""The tiny Llama of tests/reference, its rows and layouts, for tests that run on gloo ranks."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tw.config import ComputeConfig, ParallelConfig, virtual_pipeline_size
from megatron_tw.data.files import header_checksum
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.model.architecture import Architecture, read_architecture
from megatron_tw.model.build import build_model, load_hf
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.parallel.layout import Layout, destroy_layout, make_layout

REFERENCE = Path(__file__).parent / "reference"
TINY_LLAMA = REFERENCE / "tiny_llama"
SEQ_LENGTH, WINDOW, STRIDE, BOS, VOCAB = 256, 64, 48, 1, 320


@dataclass(frozen=True)
class Axes:
    """A layout to test: sizes of the axes, and layers per virtual stage (0: not interleaved)."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    vpp_layers: int = 0

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def name(self) -> str:
        names = [(self.tp, "TP"), (self.pp, "PP"), (self.cp, "CP"), (self.dp, "DP")]
        text = "x".join(f"{name}{size}" for size, name in names if size > 1) or "1rank"
        return text + (f"-{self.vpp_layers}layers" if self.vpp_layers else "")

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            context_parallel_size=self.cp,
            num_layers_per_virtual_pipeline_stage=self.vpp_layers or None,
            distributed_timeout_minutes=2,
        )


@contextmanager
def layout_of(axes: Axes, num_layers: int = 4) -> Iterator[Layout]:
    """On a rank: the groups of `axes`, taken down again at the end."""
    prepare_device()
    parallel = axes.parallel()
    try:
        yield make_layout(parallel, num_model_chunks=virtual_pipeline_size(parallel, num_layers))
    finally:
        destroy_layout()
        gc.collect()  # a model that still refers to a group keeps the group's threads alive


def load_tiny(axes: Axes, layout: Layout, folder: Path = TINY_LLAMA) -> tuple[Architecture, list[TokenWeightedGPT]]:
    """On a rank: the model of `folder` under `layout`, filled from it."""
    architecture = read_architecture(folder)
    chunks = build_model(architecture, axes.parallel(), ComputeConfig(), layout, prepare_device())
    load_hf(chunks, folder, architecture, layout)
    return architecture, chunks


def make_folder(family: str, folder: Path, **changes: Any) -> Path:
    """A random tiny model of a family in Hugging Face format; no parameter is at its initial value. `changes`: of the
    family's config."""
    import torch
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": SEQ_LENGTH,
        "bos_token_id": BOS, "eos_token_id": 2,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "llama": {"head_dim": 32},
        "mistral": {"sliding_window": SEQ_LENGTH},
        "qwen2": {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 16},
        "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
        "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.1},
    }
    config = transformers.AutoConfig.for_model(family, **{**shape, **own.get(family, {}), **changes})
    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def release(model: Sequence[Any]) -> None:
    """Let go of a model wrapped for training. Megatron's gradient hooks hold the wrapper in a cycle through
    autograd's nodes that
    Python's garbage collector does not see, and with it all process groups of its layout and their threads."""
    for chunk in model:
        vars(chunk).clear()


def reference_rows() -> np.ndarray:
    """The four rows [4, 256] of the reference measurements."""
    return np.load(REFERENCE / "windows.npz")["input_ids"]


def edit_header(file: Path, **fields: Any) -> None:
    """Change fields of a folder's header file (... leaves one out), with a checksum that fits."""
    content = {**json.loads(file.read_text()), **fields}
    content = {name: value for name, value in content.items() if name != "checksum" and value is not ...}
    file.write_text(json.dumps({**content, "checksum": header_checksum(content)}))


def prepare_ready_rows(rows: np.ndarray, output: Path, *, vocab_size: int | None = VOCAB) -> Path:
    """A dataset folder of ready rows, in their order."""
    source = output.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    prepare_rows([source], output, seq_length=rows.shape[1], tokenizer=None, vocab_size=vocab_size, bos_id=BOS)
    return output
