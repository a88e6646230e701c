"""What a long evaluation has finished, beside its output, so that one that was cut off goes on where it stopped.

    OUTPUT.partial/plan.json            what the parts were made with: options, fingerprints of model and data, layout
    OUTPUT.partial/NAME-FIRST-END.npz   arrays of some passes of one task; there once they are complete

Parts are made anew only where they are missing, and every figure is made from what is read back, so a result does not
depend on how often the evaluation was cut off. The folder is removed when the output is there. It lies on storage that
all ranks share: rank 0 sees which parts there are, the writing rank reads and writes them.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from megatron_tw.data.files import numpy_file, partial_folder, write_synced
from megatron_tw.data.progress import Progress
from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.layout import Layout

Arrays = dict[str, npt.NDArray[Any]]
MAX_PARTS = 1000
"""Of one task: a part is one pass, or as many as keep it below."""
PLAN_FILE = "plan.json"


class Kept:
    """The finished parts of one evaluation. `plan` says what they are made with; values of plain JSON.

    Nothing is written before `begin`.
    """

    def __init__(self, output: str | Path, plan: Mapping[str, Any]) -> None:
        self.folder = partial_folder(Path(output))
        self._plan: dict[str, Any] = json.loads(json.dumps(plan))
        self._there: set[str] | None = None

    def check(self) -> None:
        """That what is there was made with this plan. Only reads.

        Raises:
            ValueError: it was made otherwise; tells every difference.
        """
        file = self.folder / PLAN_FILE
        if not file.is_file():
            return
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            assert isinstance(before, dict)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{file} is damaged; remove {self.folder} to begin anew") from error
        changed = [
            f"{name}: {before[name]} -> {value}"
            for name, value in self._plan.items()
            if name in before and before[name] != value
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds the parts of another evaluation that was cut off: {'; '.join(changed)}. Ask for "
                "the same again, choose another --output, or remove that folder"
            )
        self._plan = {**before, **self._plan}  # what only other tasks than today's depend on stays as it was

    def begin(self) -> None:
        """Make the folder, or go on in it; once. Collective over the world."""
        if self._there is not None:
            return
        answer: list[Any] = [None]
        error: OSError | None = None
        if dist.get_rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_synced(self.folder / PLAN_FILE, json.dumps(self._plan, indent=1).encode())
                answer = [{file.stem for file in self.folder.glob("*.npz")}]
            except OSError as failed:
                error = failed
        raise_together(error)
        dist.broadcast_object_list(answer, src=0)  # over the world: all ranks must agree on what is left to do
        self._there = answer[0]
        if dist.get_rank() == 0 and self._there:
            print(f"going on with {self.folder}: {len(self._there)} parts are there", flush=True)

    def discard(self) -> None:
        """Remove the parts. One process does this, when the output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, part: str) -> bool:
        """Whether a part was there when this evaluation began. The same on every rank."""
        assert self._there is not None
        return part in self._there

    def write(self, part: str, arrays: Arrays) -> None:
        """Keep a part: all of it or nothing. The writing rank does this."""
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        write_synced(self.folder / f"{part}.npz", stream.getvalue())

    def read(self, part: str) -> Arrays:
        """A part, as it was written. One that is damaged is removed, so that the next run makes it again.

        Raises:
            ValueError: it is damaged.
        """
        file = self.folder / f"{part}.npz"
        try:
            arrays: Arrays = numpy_file(file.read_bytes(), file)
        except ValueError as error:
            file.unlink()
            raise ValueError(f"{error}; removed: run the same command again to make it anew") from error
        return arrays


def in_passes(
    one_pass: Callable[[int], Arrays | None],
    costs: Sequence[int],
    layout: Layout,
    *,
    what: str,
    unit: str = "passes",
    kept: Kept | None = None,
    name: str = "",
    keep_bar: bool = True,
) -> Arrays | None:
    """Go through len(costs) passes, and put what they give together along the first axis, in order. Collective over
    the world.

    Args:
        one_pass: of the pass's number; None on ranks that hold nothing of it. Collective.
        costs: what each pass counts in the progress, of `unit`.
        what, keep_bar: see `Progress`.
        kept: where finished passes are kept, under `name`, and are taken from. None: nothing is kept.

    Returns:
        the arrays of all passes on the ranks where `one_pass` gives some; with `kept`, on the writing rank alone (see
        `is_writer`). None elsewhere.
    """
    if kept is not None:
        kept.begin()
    per_part = max(1, -(-len(costs) // MAX_PARTS))
    parts = [range(first, min(first + per_part, len(costs))) for first in range(0, len(costs), per_part)]
    writes, made = is_writer(layout), []
    missing = [part for part in parts if kept is None or not kept.has(_name(name, part))]
    total = sum(costs[index] for part in missing for index in part)
    with Progress(what, total, unit, show=layout.reports, keep=keep_bar, scale=unit != "passes") as progress:
        for part in missing:
            found = []
            for index in part:
                arrays = one_pass(index)
                if arrays is not None:
                    found.append(arrays)
                progress.update(costs[index])
            if found and kept is None:
                made += found
            elif found and kept is not None and writes:
                kept.write(_name(name, part), _joined(found))
    if kept is not None:
        error = None
        try:
            made = [kept.read(_name(name, part)) for part in parts] if writes else []
        except (OSError, ValueError) as failed:
            error = failed
        raise_together(error)
    return _joined(made) if made else None


def is_writer(layout: Layout) -> bool:
    """Whether this rank holds the results in the end: the first of the last pipeline stage."""
    return layout.is_last_stage and not (layout.tp_rank or layout.cp_rank or layout.dp_rank)


def _name(name: str, part: range) -> str:
    return f"{name}-{part.start:06d}-{part.stop:06d}"


def _joined(arrays: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
