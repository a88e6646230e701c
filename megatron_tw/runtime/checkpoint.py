"""Checkpoints of a run in Megatron's distributed format: written under any layout, read under any other.

    SAVE/latest_checkpointed_iteration.txt    number of the newest complete checkpoint
    SAVE/iter_0000030/                        weights and optimizer state (megatron.core.dist_checkpointing)
    SAVE/iter_0000030/run.json                versioned header: iteration, consumed samples, model, layout
    SAVE/iter_0000030/config.yaml             the resolved options
    SAVE/iter_0000030/tokenizer/              tokenizer files, for export
    SAVE/iter_0000030/checksums.json          of all these files

    write iter_0000030.1a2b3c4d.partial -> checksums -> still our folder? -> rename -> name it in the tracker

The number in the partial folder's name is the run's own, so a rank of a dead run that still writes never writes into
what another run keeps; and a checkpoint is there complete or not at all. `begin_checkpoint` does the writing, or starts
a process on each rank that does, and `UnfinishedCheckpoint.complete` the rest.
"""

import inspect
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron import core
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import FileSystemReader

from megatron_tw.config import save_config
from megatron_tw.model.architecture import export_hf_config
from megatron_tw.model.build import copy_tokenizer
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.beside import WriterBeside
from megatron_tw.runtime.checkpoint_errors import damage_named, no_warnings_of_torch, one_error
from megatron_tw.runtime.checksums import Entry, seal
from megatron_tw.runtime.lock import FolderLock
from megatron_tw.runtime.optimizer import load_optimizer
from megatron_tw.runtime.run_folder import (
    FORMAT_VERSION,
    HEADER_FILE,
    TRACKER,
    OptimizerShards,
    RunState,
    SavedCheckpoint,
    check_optimizer_shards,
    checkpoint_dir,
    complete_checkpoints,
    unfinished,
)

CONFIG_FILE = "config.yaml"
_FOR_ANY_LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
"""Optimizer state in the shape of the parameters, so that another layout can read it. One data-parallel rank gathers it
on its host, which needs about 24 bytes for each parameter of its tensor- and pipeline-parallel shard while it does: the
12 bytes of fp32 main weight and moments whole, and of one of them at a time what it receives and joins. Loading, every
rank reads those 12 bytes."""
_AS_RANKS_HOLD_IT = {"distrib_optim_sharding_type": "dp_reshardable"}
"""Each rank writes its own part, without gathering it; read by the same TP, PP, model chunks and buckets alone."""


class HasState(Protocol):
    """A part of a run that keeps something of its own in a checkpoint."""

    def sharded_state(self) -> dict[str, Any]:
        """Entries of a sharded state dict, named as nothing else in the checkpoint is; may be empty."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take these entries back from a loaded state dict."""


@dataclass(kw_only=True)
class UnfinishedCheckpoint:
    """A checkpoint between its first file and its name, on every rank.

    option: what names the folder, for messages. beside: what writes this rank's files, where that is not done yet.
    """

    directory: Path
    partial: Path
    option: str
    iteration: int
    lock: FolderLock | None
    beside: WriterBeside | None = None

    def complete(self, *, wait: bool) -> Path | None:
        """Give it its name when the files of all ranks are on disk, and return its folder; None where some are not yet
        and `wait` is False. Collective over the world.

        Raises:
            OSError, ValueError: as `save_checkpoint`.
        """
        beside = self.beside
        digests: dict[str, Entry] = {}
        if not wait and beside is not None and not beside.is_done():
            return None
        with _whole_or_nothing(self.partial, f"{self.option}: {self.directory.name}"):
            if beside is not None:
                self.beside = None
                with one_error():
                    digests = beside.finish()
            seal(self.partial, digests)
            with _on_rank_0():
                if dist.get_rank() == 0:
                    self._give_its_name()
        return self.directory

    def abandon(self) -> None:
        """End what writes it. Not collective: another rank may be lost. The folder's next run removes its files."""
        if self.beside is not None:
            self.beside.abandon()

    @contextmanager
    def abandoned_on_error(self) -> Iterator[None]:
        """Around what belongs to its beginning."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def _give_its_name(self) -> None:
        _sync_folder(self.partial)
        if self.lock is not None:
            self.lock.check()
        save = self.directory.parent
        replaced = save / f"{self.directory.name}.replaced.partial"
        with text_in_place_of(save / TRACKER, f"{self.iteration}\n"):
            if self.directory.exists():  # of a run that was taken back to an earlier checkpoint
                self.directory.rename(replaced)  # whole: removing it takes time, in which a run may be killed
            self.partial.rename(self.directory)
        _sync_folder(save)
        shutil.rmtree(replaced, ignore_errors=True)


def save_checkpoint(
    save: str | Path, chunks: Sequence[TokenWeightedGPT], state: RunState, layout: Layout, **options: Any
) -> Path:
    """Write a checkpoint under `save` and return its folder. Collective over the world; storage is shared. options: of
    `begin_checkpoint`.

    Raises:
        OSError: it could not be written, on every rank; those that were there are as they were.
        ValueError: another run has taken the folder.
    """
    directory = begin_checkpoint(save, chunks, state, layout, **options).complete(wait=True)
    assert directory is not None
    return directory


def begin_checkpoint(
    save: str | Path,
    chunks: Sequence[TokenWeightedGPT],
    state: RunState,
    layout: Layout,
    *,
    lock: FolderLock | None = None,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    scorer: HasState | None = None,
    config: object | None = None,
    tokenizer_dir: Path | None = None,
    for_any_layout: bool = True,
    expected_bytes: int = 0,
    beside: bool = False,
) -> UnfinishedCheckpoint:
    """Write the files of a checkpoint under `save`. Collective over the world; storage is shared.

    lock: rank 0's, of the folder; None on the others. optimizer: takes part after at least one step (there is no state
    before); None saves the weights alone. config: the resolved options, kept beside the checkpoint. tokenizer_dir: its
    tokenizer files are kept, for export. for_any_layout: whether another layout can read the optimizer's state.
    expected_bytes: what it will take on disk, about; the newest one tells too. beside: what is large is written by a
    process that each rank starts, from a copy in the host's memory: the weights may change when this returns.

    Raises:
        OSError, ValueError: as `save_checkpoint`.
    """
    directory = checkpoint_dir(save, state.iteration)
    names = [f"{directory.name}.{uuid.uuid4().hex[:8]}.partial"]
    dist.broadcast_object_list(names, src=0)
    unfinished = UnfinishedCheckpoint(
        directory=directory,
        partial=Path(save) / names[0],
        option=f"--save {save}",
        iteration=state.iteration,
        lock=lock,
    )
    with _whole_or_nothing(unfinished.partial, f"--save {save}: {directory.name}"), unfinished.abandoned_on_error():
        with _on_rank_0():
            if layout.rank == 0:
                if lock is not None:
                    lock.check()
                _check_room(Path(save), expected_bytes)
                unfinished.partial.mkdir(parents=True)
        sharded = _model_state(chunks)
        if optimizer is not None and scheduler is not None:
            metadata = dict(_FOR_ANY_LAYOUT if for_any_layout else _AS_RANKS_HOLD_IT)
            sharded["optimizer"] = optimizer.sharded_state_dict(_model_state(chunks), metadata=metadata)
            sharded["scheduler"] = scheduler.state_dict()
        scorer_state = scorer.sharded_state() if scorer is not None else {}
        sharded |= scorer_state
        with one_error():
            _write_shards(sharded, unfinished, beside=beside)
        with _on_rank_0():
            if layout.rank == 0:
                header = {
                    "version": FORMAT_VERSION,
                    "state": asdict(state),
                    "weights_only": optimizer is None,
                    "scorer_state": bool(scorer_state),
                    "layout": layout.describe(),
                    "megatron_core": core.__version__,
                    "optimizer_shards": None
                    if optimizer is None or for_any_layout
                    else asdict(optimizer_shards(chunks, optimizer)),
                    "hf_config": export_hf_config(
                        chunks[0].architecture,
                        max_position_embeddings=state.seq_length,
                        dtype=next(chunks[0].parameters()).dtype,
                    ),
                }
                (unfinished.partial / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")
                if config is not None:
                    save_config(config, unfinished.partial / CONFIG_FILE)
                if tokenizer_dir is not None:
                    copy_tokenizer(tokenizer_dir, unfinished.partial / "tokenizer")
    return unfinished


def _write_shards(sharded: dict[str, Any], unfinished: UnfinishedCheckpoint, *, beside: bool) -> None:
    """Write a sharded state dict, or start a process on each rank that does."""
    options: dict[str, Any] = {"preprocess_common_before_consistancy_check": _without_gathered_state}
    if not beside:
        dist_checkpointing.save(sharded, str(unfinished.partial), **options)
        return
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # from 0.17 on; else NVIDIA's NVRx
        options["async_strategy"] = "mcore"
    request = dist_checkpointing.save(sharded, str(unfinished.partial), async_sharded_save=True, **options)
    assert request is not None
    unfinished.beside = WriterBeside(request, unfinished.partial)


def _check_room(save: Path, expected_bytes: int) -> None:
    """That what is free is enough for a checkpoint as large as the newest one and as expected: the newest may hold less
    than this one will, such as weights alone."""
    newest = complete_checkpoints(save)[-1:]
    sizes = [file.stat().st_size for directory in newest for file in directory.rglob("*") if file.is_file()]
    there = next(folder for folder in (save.absolute(), *save.absolute().parents) if folder.is_dir())
    needed, free = max(sum(sizes), expected_bytes), shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"expected {needed / 2**30:.3g} GiB of free space, nothing was written")


def load_checkpoint(
    saved: SavedCheckpoint,
    chunks: Sequence[TokenWeightedGPT],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    scorer: HasState | None = None,
    *,
    share_among: dist.ProcessGroup | None = None,
) -> None:
    """Read weights, and with an optimizer its state and the schedule's, into a model of any layout. Collective over
    the world.

    share_among: ranks that hold the same of the model, of which each reads a part and sends it to the others (None:
    each reads all that it needs).

    Raises:
        ValueError: a file that cannot be read (one whose checksum was not compared before), or optimizer state that was
        saved for another layout alone.
    """
    if saved.weights_only:
        optimizer = scheduler = None
    cut = saved.optimizer_shards if optimizer is not None else None
    sharded = _model_state(chunks)
    if optimizer is not None:
        check_optimizer_shards(saved, optimizer_shards(chunks, optimizer))
        metadata = dict(_FOR_ANY_LAYOUT if cut is None else _AS_RANKS_HOLD_IT)
        sharded["optimizer"] = optimizer.sharded_state_dict(_model_state(chunks), is_loading=True, metadata=metadata)
    if scorer is not None and saved.scorer_state:
        sharded |= scorer.sharded_state()
    with no_warnings_of_torch(), damage_named(saved):
        FileSystemReader(saved.directory).read_metadata()  # where this fails, torch prints a traceback and goes on
        strategy = None
        if share_among is not None and share_among.size() > 1:
            strategy = FullyParallelLoadStrategyWrapper(
                get_default_load_sharded_strategy(str(saved.directory)), share_among
            )
        state = dist_checkpointing.load(sharded, str(saved.directory), strategy)
    for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True):
        chunk.load_weights(state[key])
    if optimizer is not None:
        load_optimizer(optimizer, state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if scorer is not None and saved.scorer_state:
        scorer.load_state(state)


def optimizer_shards(chunks: Sequence[TokenWeightedGPT], optimizer: MegatronOptimizer) -> OptimizerShards:
    """How this run's ranks cut the optimizer's state among them."""
    parallel = chunks[0].config
    part = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    return OptimizerShards(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        model_chunks=len(chunks),
        bucket_size=part.ddp_config.bucket_size if part.ddp_config.overlap_grad_reduce else None,
    )


@contextmanager
def text_in_place_of(path: Path, text: str) -> Iterator[None]:
    """A small file's new content, which is on disk beside it (`unfinished`) when the block begins and takes its place
    when that is done: a reader sees the old content or the new one, never a part."""
    with unfinished(path).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    yield
    unfinished(path).replace(path)


@contextmanager
def _whole_or_nothing(partial: Path, what: str) -> Iterator[None]:
    """Around the writing of `partial`: where it fails nothing of it is left, and the error names the one before."""
    try:
        yield
    except (OSError, ValueError) as error:
        free = shutil.disk_usage(partial.parent).free if partial.parent.is_dir() else 0
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, ValueError):
            raise
        complete = complete_checkpoints(partial.parent)
        kept = f"the newest checkpoint is {complete[-1]}" if complete else "there is no earlier checkpoint"
        raise OSError(f"{what} could not be written, {free / 2**30:.3g} GiB were free: {error}; {kept}") from error


@contextmanager
def _on_rank_0() -> Iterator[None]:
    """Around what rank 0 does while the others wait: its error is raised on every rank."""
    error = None
    try:
        yield
    except (OSError, ValueError) as failed:
        error = failed
    raise_together(error)


def _without_gathered_state(common: dict[str, Any]) -> dict[str, Any]:
    """The state that all ranks must have alike: without the optimizer's, which is gathered on one data-parallel rank
    and None on the others."""
    optimizer = common.get("optimizer")
    if not isinstance(optimizer, dict):
        return common
    return common | {"optimizer": {key: value for key, value in optimizer.items() if key != "param_state"}}


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _chunk_keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _model_state(chunks: Sequence[TokenWeightedGPT]) -> dict[str, Any]:
    return {key: chunk.sharded_state_dict() for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True)}
