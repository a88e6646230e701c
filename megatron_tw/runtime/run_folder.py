"""What the folder of a run holds: which checkpoints are complete, which of them is the newest, and whether a run may
write there.

A checkpoint is complete when its folder has its name: it is written under another one and renamed. (Before checkpoints
had checksums it was complete when the tracker named it; what such a run left unfinished has no `.metadata`.)
"""

import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tw.data.files import typed
from megatron_tw.model.architecture import Architecture, parse_architecture
from megatron_tw.model.families.table import expected_tensors

FORMAT_VERSION = 1
TRACKER = "latest_checkpointed_iteration.txt"
HEADER_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
_NAME = re.compile(r"iter_(\d{7,})")


class DamagedCheckpointError(ValueError):
    """A checkpoint that should be there and cannot be used."""

    def __init__(self, directory: Path, text: str) -> None:
        super().__init__(text)
        self.directory = directory


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run has come: what a resumed run needs besides weights and optimizer state.

    loader: the data loader's state. seq_length: tokens of a row, the context length that an export names. scores:
    fingerprint of the cached scores that the weights were made from, None without. old_context: tokens of the context
    that the model had before, None where nobody said. bad_steps: what decides whether a step is one.
    """

    iteration: int
    consumed_samples: int
    seq_length: int
    loader: dict[str, Any]
    scores: str | None = None
    old_context: int | None = None
    bad_steps: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerShards:
    """How optimizer state that was saved as the ranks held it (--no-dist-ckpt-optim-fully-reshardable) is cut: only
    ranks that cut it alike can read it.

    model_chunks: of a pipeline stage. bucket_size: parameters of a bucket of gradients, None for one bucket.
    """

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    model_chunks: int
    bucket_size: int | None

    def describe(self) -> str:
        buckets = "one bucket" if self.bucket_size is None else f"buckets of {self.bucket_size} parameters"
        chunks = f" x {self.model_chunks} chunks" if self.model_chunks > 1 else ""
        return f"TP {self.tensor_model_parallel_size} x PP {self.pipeline_model_parallel_size}{chunks}, {buckets}"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk and what its header says.

    megatron_core: the version that wrote it, "" where the header does not say. optimizer_shards: None where any layout
    can read the optimizer's state.
    """

    directory: Path
    state: RunState
    architecture: Architecture
    layout: str
    weights_only: bool
    scorer_state: bool
    megatron_core: str = ""
    optimizer_shards: OptimizerShards | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """Tokenizer files kept with the checkpoint; may be absent."""
        return self.directory / "tokenizer"


def find_checkpoint(folder: str | Path, option: str = "--load") -> SavedCheckpoint | None:
    """The newest complete checkpoint of a run's folder, or the one that `folder` itself is; None when there is none.

    Raises:
        DamagedCheckpointError: the checkpoint's header is missing, unreadable or of another version.
        ValueError: a file, or the tracker is missing though there are checkpoints, or names none.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder}: expected a folder, found a file")
    if (folder / HEADER_FILE).is_file() or is_complete(folder):
        return _read_checkpoint(folder)
    tracker, complete = folder / TRACKER, complete_checkpoints(folder)
    if not tracker.is_file():
        if (first := _killed_before_the_tracker(folder)) is not None:
            return _read_checkpoint(first)
        if complete:
            raise ValueError(
                f"{option} {folder}: {TRACKER} is missing, but there are checkpoints; take the newest with "
                f"{option} {complete[-1]}"
            )
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdigit():
        newest = f"; take the newest checkpoint with {option} {complete[-1]}" if complete else ""
        raise ValueError(f"{tracker}: expected an iteration number, got {text!r}{newest}")
    return _read_checkpoint(checkpoint_dir(folder, int(text)))


def check_optimizer_shards(saved: SavedCheckpoint, own: OptimizerShards) -> None:
    """Refuse optimizer state that other ranks cut otherwise than this run's, which is `own`.

    Raises:
        ValueError: tells both, and the option that takes the weights alone.
    """
    cut = saved.optimizer_shards
    if cut is not None and cut != own:
        raise ValueError(
            f"--load {saved.directory}: its optimizer state was saved for the same layout alone "
            f"(--no-dist-ckpt-optim-fully-reshardable), {cut.describe()}; this run has {own.describe()}. "
            "--pretrained-checkpoint takes the weights alone"
        )


def unfinished(path: Path) -> Path:
    """Where the next content of a small file lies until it takes its place."""
    return path.with_name(path.name + ".partial")


def _killed_before_the_tracker(folder: Path) -> Path | None:
    """The first checkpoint of a run that was killed when that had its name, and the tracker had not yet."""
    tracker = unfinished(folder / TRACKER)
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    first = checkpoint_dir(folder, int(text)) if text.isdigit() else None
    return first if first is not None and complete_checkpoints(folder) == [first] else None


def checkpoint_dir(folder: str | Path, iteration: int) -> Path:
    """Folder of one checkpoint, named as Megatron names it."""
    return Path(folder) / f"iter_{iteration:07d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, the oldest first. Complete, which is not undamaged."""
    found = [path for path in folder.glob("iter_*") if is_complete(path)] if folder.is_dir() else []
    return sorted(found, key=_iteration)


def is_complete(path: Path) -> bool:
    """Whether a folder is a complete checkpoint of a run."""
    named = path.is_dir() and _NAME.fullmatch(path.name) is not None
    return named and ((path / ".metadata").exists() or (path / HEADER_FILE).exists())


def earlier_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a run before one of them, the newest first."""
    before = [path for path in complete_checkpoints(directory.parent) if _iteration(path) < _iteration(directory)]
    return before[::-1]


def surplus_checkpoints(
    complete: Sequence[Path], *, keep_last: int | None, retain_interval: int | None, needed: Collection[Path]
) -> list[Path]:
    """Of complete checkpoints, the oldest first and the newest one last, those that need not be kept.

    keep_last: how many of the newest are kept (None: one where there is an interval, else all). retain_interval: those
    of iterations that it divides are kept. needed: those that are kept whatever the rest says,
    resolved.

    >>> folders = [checkpoint_dir("run", iteration) for iteration in (10, 20, 30, 40, 50)]
    >>> [path.name for path in surplus_checkpoints(folders, keep_last=2, retain_interval=20, needed=())]
    ['iter_0000010', 'iter_0000030']
    """
    if keep_last is None and retain_interval is None:
        return []
    return [
        path
        for path in complete[: -(keep_last or 1)]
        if path.resolve() not in needed and (retain_interval is None or _iteration(path) % retain_interval != 0)
    ]


def remove_checkpoint(directory: Path) -> None:
    """Remove a complete checkpoint; killed meanwhile, what is left is none, and the folder's next run removes it.

    Raises:
        OSError: it cannot be removed.
    """
    renamed = directory.with_name(f"{directory.name}.removed.partial")
    shutil.rmtree(renamed, ignore_errors=True)
    directory.rename(renamed)
    shutil.rmtree(renamed)


def _iteration(path: Path) -> int:
    """The iteration in a checkpoint's name; -1 where it has another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def check_same_model(saved: SavedCheckpoint, architecture: Architecture, option: str = "--load") -> None:
    """Refuse a checkpoint of another model than the one that --load-hf names; `option` named the checkpoint. Rope and
    length may differ: they are what runs change.

    Raises:
        ValueError: names the first tensor or number that differs.
    """
    what = f"{option} {saved.directory}: a checkpoint of another model"
    ours_type, saved_type = architecture.family.model_type, saved.architecture.family.model_type
    if ours_type != saved_type:
        raise ValueError(f"{what}: model_type {saved_type}, --load-hf has {ours_type}")
    ours, theirs = expected_tensors(architecture), expected_tensors(saved.architecture)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{what}: {name} has shape {theirs.get(name, 'none')}, --load-hf has {ours.get(name, 'none')}"
            )
    for name in ("num_attention_heads", "num_query_groups", "norm_epsilon"):  # which no shape need show
        number, expected = getattr(saved.architecture, name), getattr(architecture, name)
        if number != expected:
            raise ValueError(f"{what}: {name} {number}, --load-hf has {expected}")


def check_save_target(save: str | None, load: str | None) -> None:
    """Refuse to write a run into a folder that holds one, unless that run (or a checkpoint of it) is the one resumed. A
    folder in which no checkpoint was ever completed holds none.

    Raises:
        ValueError: names --save and what was found.
    """
    if save is None:
        return
    path = Path(save)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--save {save}: expected a folder, found a file")
    resumed = load is not None and path.resolve() in (Path(load).resolve(), Path(load).resolve().parent)
    if not resumed and ((path / TRACKER).exists() or complete_checkpoints(path)):
        raise ValueError(
            f"--save {save}: the folder already holds a run; resume it with --load {save}, or choose another folder"
        )


def begin_again(save: Path) -> list[str]:
    """Make ready for a run's first step a folder in which no checkpoint was completed: the metrics of the run that died
    there are set aside. What was done and seen, in words. One process does this."""
    said = []
    for path in sorted(save.glob("iter_*")):
        if _NAME.fullmatch(path.name) and not is_complete(path):
            said.append(f"{path.name} was never completed")
    metrics = save / METRICS_FILE
    if metrics.is_file() and metrics.stat().st_size:
        number = 1
        while (aside := save / f"{METRICS_FILE}.{number}").exists():
            number += 1
        metrics.rename(aside)
        said.append(f"metrics of the run that died before its first checkpoint: {aside.name}")
    return [f"--save {save}: begun again ({'; '.join(said)})"] if said else []


def remove_partial_checkpoints(save: Path) -> None:
    """Remove what runs that were killed while they saved left. One process does this, which holds the folder."""
    for path in save.glob("iter_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def check_space(path: Path, what: str, needed: int, content: str) -> None:
    """Refuse to begin what cannot be kept. needed: bytes that will be written at `path`, which need not be there yet.

    Raises:
        ValueError: less is free; `what` names the option and its value, `content` what is to be written.
    """
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{what}: expected {needed / 2**30:.3g} GiB of free space for {content}, got {free / 2**30:.3g} GiB"
        )


def _read_checkpoint(directory: Path) -> SavedCheckpoint:
    path = directory / HEADER_FILE
    try:
        header = json.loads(path.read_text())
        if header["version"] != FORMAT_VERSION:
            raise DamagedCheckpointError(
                directory, f"{path}: expected version {FORMAT_VERSION}, got {header['version']!r}"
            )
        architecture = parse_architecture(header["hf_config"], str(path))
        state: RunState = typed(RunState, header["state"], "state")
        layout, weights_only, scorer_state = (
            typed(kind, header[name], name)
            for name, kind in (("layout", str), ("weights_only", bool), ("scorer_state", bool))
        )
        if _iteration(directory) not in (-1, state.iteration) or min(state.iteration, state.consumed_samples) < 0:
            raise ValueError(f"state: iteration {state.iteration} after {state.consumed_samples} samples")
        wrote = typed(str, header.get("megatron_core", ""), "megatron_core")
        shards = header.get("optimizer_shards")
        cut = typed(OptimizerShards, shards, "optimizer_shards") if shards is not None else None
        return SavedCheckpoint(directory, state, architecture, layout, weights_only, scorer_state, wrote, cut)
    except DamagedCheckpointError:
        raise
    except OSError as error:
        raise DamagedCheckpointError(directory, f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(directory, f"{path} is damaged ({' '.join(str(error).split())})") from error
