"""What can be known of a run without a training step: `tools/train.py --check`.

    options      with each other and with the ranks
    model        the checkpoint with its checksums, or the headers of the folder's weights
    data         the rows as the run opens them; rows: every row compared with its checksum
    tokenizer    one vocabulary of rows and model
    scorer       as the run opens it: --scores are of these rows, and compared with their checksums
    folders      --save and --save-hf can be written to, and have room
    memory       tools/plan.py in a process of its own
    groups       an all-reduce in each process group, timed

Every part is tried, whatever the one before it found; a part that another one needs is left out without it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from megatron_tw.config import ParallelConfig, RunConfig, check_parallel, save_config
from megatron_tw.config.plan import DOES_NOT_FIT
from megatron_tw.data.blend import Blend
from megatron_tw.data.progress import Progress
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.scores import ScoreRows
from megatron_tw.model.architecture import export_hf_config
from megatron_tw.parallel.agree import raise_together, share_of
from megatron_tw.parallel.contact import now_at
from megatron_tw.parallel.devices import Device, device_name, synchronize
from megatron_tw.parallel.gpus import gpu_of
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.opening import join_world, named, open_layout
from megatron_tw.runtime.outputs import hold_export, hold_run
from megatron_tw.runtime.source import ModelSource
from megatron_tw.training.inputs import (
    bytes_of_checkpoint,
    check_options,
    check_tokenizer,
    open_data,
    open_model_source,
    open_scoring,
    tokenizer_of,
)
from megatron_tw.training.ruler import open_ruler
from megatron_tw.training.scorers import ScorerMaker
from megatron_tw.training.scorers.frozen import check_intact
from megatron_tw.training.settings import Settings

MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Of the timed all-reduce: large enough for a link's bandwidth."""
REPETITIONS = 5

Result = TypeVar("Result")


@dataclass(frozen=True)
class Line:
    """One line of the table. ok: None where it was left out."""

    part: str
    ok: bool | None
    text: str


class Check:
    """The parts of the check, on every rank; the same lines on all of them."""

    def __init__(self, config: RunConfig, plan_program: Path) -> None:
        self._config = config
        self._plan_program = plan_program
        self.lines: list[Line] = []

    def run(self) -> None:
        """Make the lines. Collective over the world."""
        given = self._config
        config = replace(given, parallel=_usable(given.parallel))
        device = join_world(config.parallel)
        schedule = self._try("options", lambda: check_options(given), lambda _: "fit each other and the ranks")
        source = self._try("model", lambda: open_model_source(config), lambda found: found.name)
        data = self._try("data", lambda: open_data(config, source), _data_in_words)
        if source is None or data is None:
            self._left_out("tokenizer")
        else:
            self._try("tokenizer", lambda: self._check_tokenizer(*data, source), str)
        if source is None or data is None or schedule is None:
            self._try("scorer", self._check_scores_alone, str) if config.scorer.scores else self._left_out("scorer")
        else:
            self._try("scorer", lambda: open_scoring(config, data[0], source, schedule), _scoring_in_words)
        self._try("rows", lambda: verify_rows(*data), str) if data is not None else self._left_out("rows")
        if source is None or schedule is None:
            self._left_out("folders")
            self._left_out("memory")
            world = {"all ranks": dist.distributed_c10d._get_default_group()}
            self._try("groups", lambda: bandwidths(world, device), str)
        else:
            self._try("folders", lambda: check_folders(config, source), str)
            self._try("memory", lambda: self._memory(source, device), str)
            self._try("groups", lambda: bandwidths(groups_of(open_layout(config.parallel, source)), device), str)

    @property
    def failed(self) -> str:
        """The parts that failed."""
        return ", ".join(line.part for line in self.lines if line.ok is False)

    def table(self) -> str:
        """The lines, at most 120 columns wide where no message is longer."""
        words = {True: "ok", False: "FAILED", None: "-"}
        width = max(len(line.part) for line in self.lines)
        return "\n".join(f"{line.part:{width}}  {words[line.ok]:6}  {line.text}" for line in self.lines)

    def _try(self, part: str, work: Callable[[], Result], words: Callable[[Result], str]) -> Result | None:
        now_at(f"--check, {part}")
        error: OSError | ValueError | None = None
        result = None
        try:
            result = work()
        except (OSError, ValueError) as failed:
            error = failed
        try:
            raise_together(error)  # what one rank alone cannot open ends the part for all
        except (OSError, ValueError) as failed:
            self.lines.append(Line(part, False, " ".join(str(failed).split())))
            return None
        assert result is not None
        self.lines.append(Line(part, True, words(result)))
        return result

    def _left_out(self, part: str) -> None:
        self.lines.append(Line(part, None, "needs what failed above"))

    def _check_tokenizer(self, rows: Blend, valid_rows: TokenRows | None, source: ModelSource) -> str:
        check_tokenizer(self._config, rows, valid_rows, source)
        folder = tokenizer_of(rows, source)
        if self._config.train.eval_ruler:
            open_ruler(self._config, folder)
        return "none beside the rows or the model" if folder is None else str(folder)

    def _check_scores_alone(self) -> str:
        """What --scores holds, where the rows that it should be of are not known. Collective over the world."""
        with named("--scores"):
            scores = [ScoreRows(folder) for folder in self._config.scorer.scores or ()]
        check_intact(scores)
        return "--scores is as it was written; whether it fits the rows needs what failed above"

    def _memory(self, source: ModelSource, device: Device) -> str:
        """What tools/plan.py says, asked by rank 0."""
        answer: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                answer[0] = planned(self._config, source, device, self._plan_program)
            except ValueError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return str(answer[0])


def _usable(parallel: ParallelConfig) -> ParallelConfig:
    """The default in place of numbers that are none, which the options' line will say."""
    try:
        check_parallel(parallel)
    except ValueError:
        return ParallelConfig()
    return parallel


def _data_in_words(data: tuple[Blend, TokenRows | None]) -> str:
    rows, valid_rows = data
    held_out = "" if valid_rows is None else f", {len(valid_rows):,} held-out rows"
    return f"{len(rows):,} rows{held_out}"


def _scoring_in_words(scoring: tuple[Settings, ScorerMaker | None]) -> str:
    return "the weighting needs none" if scoring[1] is None else "as the run opens it"


def verify_rows(rows: Blend, valid_rows: TokenRows | None) -> str:
    """Compare every row of --data-path and --valid-data-path with its checksum; the ranks share the work. Collective
    over the world."""
    checked = 0
    error: OSError | ValueError | None = None
    folders: list[TokenRows | Blend] = [rows, *([] if valid_rows is None else [valid_rows])]
    for folder in folders:
        mine = share_of(len(folder))
        with Progress(
            "comparing rows with their checksums", len(mine), "rows", show=dist.get_rank() == 0, keep=False
        ) as bar:
            for row in mine:
                try:
                    folder[row]
                except (OSError, ValueError) as damaged:
                    error = error or damaged
                bar.update()
        checked += len(folder)
    raise_together(error)
    return f"{checked:,} rows compared with their checksums"


def check_folders(config: RunConfig, source: ModelSource) -> str:
    """That --save and --save-hf can be written to and have room for a checkpoint and an export. Leaves no folder behind
    that was not there. Collective over the world."""
    architecture, checkpoint = source.architecture, config.checkpoint
    dtype = torch.bfloat16 if config.compute.bf16 else torch.float32
    with (
        hold_run(checkpoint.save, size := bytes_of_checkpoint(config, source)),
        hold_export(checkpoint.save_hf, architecture, dtype),
    ):
        pass
    if checkpoint.save is None:
        return "no --save"
    save = Path(checkpoint.save)
    there = next(path for path in (save, *save.absolute().parents) if path.exists())
    free = psutil.disk_usage(str(there)).free
    return f"--save can be written to: room for {free // size:,} checkpoints of {size / 1e9:,.1f} GB"


def planned(config: RunConfig, source: ModelSource, device: Device, program: Path) -> str:
    """What `program`, tools/plan.py, says of the memory of this run, against that of this rank's device.

    Raises:
        ValueError: it does not fit, or was not planned.
    """
    gpu = gpu_of(device_name())
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = psutil.virtual_memory().total // dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        model = config.model.load_hf
        if model is None:  # a resumed run may do without; its checkpoint holds the shape
            length, dtype = config.data.seq_length, source.architecture.dtype
            shape = export_hf_config(source.architecture, max_position_embeddings=length, dtype=dtype)
            (Path(folder) / "config.json").write_text(json.dumps(shape))
            model = folder
        run = replace(config, model=replace(config.model, load_hf=model), train=replace(config.train, check=False))
        save_config(run, Path(folder) / "run.yaml")
        command = [
            *(sys.executable, str(program), f"--config={Path(folder) / 'run.yaml'}", f"--output={folder}/plan"),
            *(f"--world-size={dist.get_world_size()}", f"--gpu={gpu.kind if gpu is not None else 'h100'}"),
            f"--gpu-memory-gib={memory / 2**30}",
        ]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode not in (0, DOES_NOT_FIT):
            said = ended.stderr.strip().splitlines() or ["no word"]
            raise ValueError(f"tools/plan.py: {said[-1].removeprefix('error: ')}")
        plan = json.loads((Path(folder) / "plan" / "plan.json").read_text())
    text = f"{plan['needed_bytes'] / 1e9:.1f} GB of {memory / 1e9:.1f} GB a rank, simulated"
    if not plan["fits"]:
        raise ValueError(f"{text}; too large: {plan['too_large']}")
    return text


def groups_of(layout: Layout) -> dict[str, dist.ProcessGroup]:
    """The groups of this layout by what they share."""
    named = {"TP": layout.tp_group, "PP": layout.pp_group, "CP": layout.cp_group, "DP": layout.dp_group}
    if layout.cp_size > 1 and layout.dp_size > 1:
        named["DP x CP"] = layout.dp_cp_group
    return named


def bandwidths(groups: dict[str, dist.ProcessGroup], device: Device) -> str:
    """Bus bandwidth of an all-reduce in each group, of the slowest group of its kind. Collective over the world.

    Of n ranks and S bytes it is 2 (n - 1) / n * S / seconds, as in NVIDIA's nccl-tests.
    """
    message = torch.ones(MESSAGE_BYTES[device.type] // 4, device=device.device)
    said = []
    for name, group in groups.items():
        if group.size() == 1:
            continue
        dist.all_reduce(message, group=group)  # connections are made
        dist.barrier()
        synchronize()
        started = time.perf_counter()
        for _ in range(REPETITIONS):
            dist.all_reduce(message, group=group)
        synchronize()
        seconds = (time.perf_counter() - started) / REPETITIONS
        size = group.size()
        rate = 2 * (size - 1) / size * message.nbytes / seconds
        mine = (rate, dist.get_process_group_ranks(group))
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        slowest, ranks = min(everywhere)
        members = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        said.append(f"{name} {slowest / 1e9:.2f} GB/s (ranks {members})")
    return "slowest all-reduce: " + ("; ".join(said) or "one rank, nothing to send")
