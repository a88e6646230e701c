"""Checkpoints of a run in Megatron's distributed format: written under any layout, read under any other.

    SAVE/latest_checkpointed_iteration.txt    number of the newest complete checkpoint
    SAVE/iter_0000030/                        weights and optimizer state (megatron.core.dist_checkpointing)
    SAVE/iter_0000030/run.json                versioned header: iteration, consumed samples, model, layout
    SAVE/iter_0000030/config.yaml             the resolved options
    SAVE/iter_0000030/tokenizer/              tokenizer files, for export

A checkpoint counts only once latest_checkpointed_iteration.txt names it, which is written last and by rename.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tw.config import save_config
from megatron_tw.model.architecture import Architecture, export_hf_config, parse_architecture
from megatron_tw.model.build import copy_tokenizer
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.huggingface import expected_tensors
from megatron_tw.parallel.layout import Layout

FORMAT_VERSION = 1
TRACKER = "latest_checkpointed_iteration.txt"
HEADER_FILE, CONFIG_FILE = "run.json", "config.yaml"
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
"""Optimizer state in the shape of the parameters, so that another layout can read it; gathered on the host of one
data-parallel rank, which needs 12 bytes for each parameter of its tensor- and pipeline-parallel shard."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run has come: what a resumed run needs besides weights and optimizer state.

    loader: the data loader's state. seq_length: tokens of a row, the context length that an export names. scores:
    fingerprint of the cached scores that the weights were made from, None without. old_context: tokens of the context
    that the model had before, None where nobody said.
    """

    iteration: int
    consumed_samples: int
    seq_length: int
    loader: dict[str, Any]
    scores: str | None = None
    old_context: int | None = None


class HasState(Protocol):
    """A part of a run that keeps something of its own in a checkpoint."""

    def sharded_state(self) -> dict[str, Any]:
        """Entries of a sharded state dict, named as nothing else in the checkpoint is; may be empty."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take these entries back from a loaded state dict."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk and what its header says."""

    directory: Path
    state: RunState
    architecture: Architecture
    layout: str
    weights_only: bool
    scorer_state: bool

    @property
    def tokenizer_dir(self) -> Path:
        """Tokenizer files kept with the checkpoint; may be absent."""
        return self.directory / "tokenizer"


def find_checkpoint(folder: str | Path) -> SavedCheckpoint | None:
    """The newest complete checkpoint of a run's folder, or the one that `folder` itself is; None when there is none.

    Raises:
        ValueError: the tracker names a checkpoint that is missing, or whose header is unreadable or of another version.
    """
    tracker, directory = Path(folder) / TRACKER, Path(folder)
    if not (directory / HEADER_FILE).is_file():
        if not tracker.is_file():
            return None
        text = tracker.read_text().strip()
        if not text.isdigit():
            raise ValueError(f"{tracker}: expected an iteration number, got {text!r}")
        directory = checkpoint_dir(folder, int(text))
    header_path = directory / HEADER_FILE
    try:
        header = json.loads(header_path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--load {folder}: names the checkpoint {directory.name}, but {header_path}: {error}"
        ) from error
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(f"{header_path}: expected version {FORMAT_VERSION}, got {header.get('version')!r}")
    architecture = parse_architecture(header["hf_config"], str(header_path))
    state = RunState(**header["state"])
    return SavedCheckpoint(
        directory, state, architecture, header["layout"], header["weights_only"], header["scorer_state"]
    )


def checkpoint_dir(folder: str | Path, iteration: int) -> Path:
    """Folder of one checkpoint, named as Megatron names it."""
    return Path(folder) / f"iter_{iteration:07d}"


def check_same_model(saved: SavedCheckpoint, architecture: Architecture) -> None:
    """Refuse a checkpoint whose weights have other shapes than the model that --load-hf names.

    Raises:
        ValueError: names the first tensor that differs.
    """
    ours, theirs = expected_tensors(architecture), expected_tensors(saved.architecture)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"--load {saved.directory}: a checkpoint of another model: {name} has shape "
                f"{theirs.get(name, 'none')}, --load-hf has {ours.get(name, 'none')}"
            )


def check_save_target(save: str | None, load: str | None) -> None:
    """Refuse to write a run into a folder that holds one, unless that run is the one resumed.

    Raises:
        ValueError: names --save and what was found.
    """
    if save is None:
        return
    path = Path(save)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--save {save}: expected a folder, found a file")
    holds_run = path.is_dir() and (
        (path / TRACKER).exists() or (path / "metrics.jsonl").exists() or any(path.glob("iter_*"))
    )
    if holds_run and (load is None or Path(load).resolve() != path.resolve()):
        raise ValueError(
            f"--save {save}: the folder already holds a run; resume it with --load {save}, or choose another folder"
        )


def save_checkpoint(
    save: str | Path,
    chunks: Sequence[TokenWeightedGPT],
    state: RunState,
    layout: Layout,
    *,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    scorer: HasState | None = None,
    config: object | None = None,
    tokenizer_dir: Path | None = None,
) -> Path:
    """Write a checkpoint under `save` and return its folder. Collective over the world; storage is shared.

    optimizer: takes part after at least one step (there is no state before); None saves the weights alone.
    config: the resolved options, kept beside the checkpoint. tokenizer_dir: its tokenizer files are kept, for export.
    """
    directory = checkpoint_dir(save, state.iteration)
    if layout.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)  # the rest of a save that was cut off
        directory.mkdir(parents=True)
    dist.barrier()
    sharded = _model_state(chunks)
    if optimizer is not None and scheduler is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(_model_state(chunks), metadata=dict(_METADATA))
        sharded["scheduler"] = scheduler.state_dict()
    scorer_state = scorer.sharded_state() if scorer is not None else {}
    sharded |= scorer_state
    dist_checkpointing.save(sharded, str(directory))
    if layout.rank == 0:
        architecture = chunks[0].architecture
        header = {
            "version": FORMAT_VERSION,
            "state": asdict(state),
            "weights_only": optimizer is None,
            "scorer_state": bool(scorer_state),
            "layout": layout.describe(),
            "hf_config": export_hf_config(
                architecture, max_position_embeddings=state.seq_length, dtype=next(chunks[0].parameters()).dtype
            ),
        }
        (directory / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")
        if config is not None:
            save_config(config, directory / CONFIG_FILE)
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, directory / "tokenizer")
        replace_text(Path(save) / TRACKER, f"{state.iteration}\n")
    dist.barrier()
    return directory


def load_checkpoint(
    saved: SavedCheckpoint,
    chunks: Sequence[TokenWeightedGPT],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    scorer: HasState | None = None,
) -> None:
    """Read weights, and with an optimizer its state and the schedule's, into a model of any layout. Collective over
    the world."""
    if saved.weights_only:
        optimizer = scheduler = None
    sharded = _model_state(chunks)
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(
            _model_state(chunks), is_loading=True, metadata=dict(_METADATA)
        )
    if scorer is not None and saved.scorer_state:
        sharded |= scorer.sharded_state()
    state = dist_checkpointing.load(sharded, str(saved.directory))
    for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True):
        chunk.load_state_dict(state[key])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if scorer is not None and saved.scorer_state:
        scorer.load_state(state)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _chunk_keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _model_state(chunks: Sequence[TokenWeightedGPT]) -> dict[str, Any]:
    return {key: chunk.sharded_state_dict() for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True)}
