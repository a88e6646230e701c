"""The checkpoint that --load or --pretrained-checkpoint names, found, and compared with its checksums before anything
reads it; and exports."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tw.runtime.checksums import CHECKSUMS_FILE, damage
from megatron_tw.runtime.run_folder import (
    DamagedCheckpointError,
    SavedCheckpoint,
    earlier_checkpoints,
    find_checkpoint,
)


def open_checkpoint(folder: str | Path, *, verify: bool, option: str = "--load") -> SavedCheckpoint | None:
    """The newest complete checkpoint of a run's folder, or the one that `folder` itself is; None when there is none.
    Rank 0 decides which. Collective over the world.

    verify: compare its files with their checksums.

    Raises:
        ValueError: it is damaged: names the file, and the newest earlier checkpoint that is intact; or see
        find_checkpoint.
    """
    answer: list[Any] = [None, None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find_checkpoint(folder, option)
        except DamagedCheckpointError as error:
            answer[1:] = str(error), error.directory
        except (OSError, ValueError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    saved: SavedCheckpoint | None
    saved, problem, directory = answer
    if saved is not None and verify:
        problem, directory = damage(saved.directory), saved.directory
        if not (directory / CHECKSUMS_FILE).is_file() and dist.get_rank() == 0:
            print(f"{option} {directory}: without {CHECKSUMS_FILE}, so its files could not be verified", flush=True)
    if problem is None:
        return saved
    if directory is not None:
        problem = f"{problem}; {_earlier(directory, option)}"
    raise ValueError(problem if problem.startswith(option) else f"{option} {folder}: {problem}")


def check_export(folder: str | Path, option: str) -> None:
    """Compare the files of a Hugging Face folder with their checksums, where it has some: those that this project
    wrote do. Collective over the world.

    Raises:
        ValueError: one is damaged or missing.
    """
    problem = damage(Path(folder))
    if problem is not None:
        raise ValueError(f"{option}: {problem}; where it was changed on purpose, remove {CHECKSUMS_FILE}")


def _earlier(damaged: Path, option: str) -> str:
    """The newest intact checkpoint before a damaged one, in words. Collective over the world."""
    candidates: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        candidates = [earlier_checkpoints(damaged)]
    dist.broadcast_object_list(candidates, src=0)
    for path in candidates[0]:
        if damage(path) is None:
            return f"the newest intact checkpoint before it is {path}: take it with {option} {path}"
    return "there is no intact checkpoint before it"
