"""Runs that are killed at random moments, and go on: are they the same runs?

A run's ranks are killed (SIGKILL: one of them, or all at once) at random moments from their start on, while they load,
step and save, and the same command is started again, until the run is at its end. Then its losses must be bitwise those
of a run that nobody killed, its rows the same in the same order; and after every kill, and at the end, all checkpoints
must be whole and none that the options keep may have gone. When one rank is killed after a step, the others must end by
themselves, which is timed. Each case has a layout of its own; the ranks are CPU processes (gloo), forked from a server
that has imported everything once.

    tools/benchmarks/faults.py --moments 100
    tools/benchmarks/faults.py --moments 3 --cases "sparse weights"
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = ["transformers.models.llama.modeling_llama", "megatron_tw.training.loop", "megatron_tw.programs.scoring"]
SEQ_LENGTH, WINDOW, VOCABULARY, ROWS = 128, 32, 256, 10
STEPS, BATCH, SAVE_INTERVAL = 12, 2, 2
SAME = ("weighted_loss", "lm_loss", "grad_norm", "weight_std", "learning_rate", "consumed_samples", "row_ids")
SECONDS_TO_END, SECONDS_OF_A_RUN = 60.0, 300.0


@dataclass(frozen=True)
class Case:
    """A run: its ranks, options and rows. {scores} stands for the folder of frozen scores."""

    name: str
    ranks: int
    options: str
    rows: str = "rows"

    @property
    def uses_scores(self) -> bool:
        return "{scores}" in self.options

    def kept(self, newest: int) -> set[int]:
        """The steps whose checkpoints must be there when the newest is that of step `newest`; others may be, too: the
        one that the run was resumed from, and what a kill left before it was removed."""
        steps = list(range(SAVE_INTERVAL, newest + 1, SAVE_INTERVAL))
        last, interval = (self._number_of(option) for option in ("--keep-last", "--save-retain-interval"))
        if last is None and interval is None:
            return set(steps)
        newest_ones = steps[-(last or 1) :]
        return {step for step in steps if step in newest_ones or (interval is not None and step % interval == 0)}

    def _number_of(self, option: str) -> int | None:
        words = self.options.split()
        return int(words[words.index(option) + 1]) if option in words else None


CASES = [
    Case("sparse weights", 2, "--tensor-model-parallel-size 2 --weighting sparse --sparsification 0.2 --async-save"),
    Case(
        "schedule",
        2,
        "--pipeline-model-parallel-size 2 --weighting-schedule '0: uniform; 4 linear: dense; 8: sparse "
        "sparsification=0.4' --on-bad-step skip --loss-spike-sigmas 8",
    ),
    Case(
        "moving average",
        2,
        "--context-parallel-size 2 --weighting dense --scorer ema --scorer-ema-decay 0.9 --async-save --keep-last 2",
    ),
    Case("cached scores", 2, "--weighting longce --scorer frozen --scores {scores} --async-save --keep-last 1"),
    Case(
        "four ranks",
        4,
        "--tensor-model-parallel-size 2 --context-parallel-size 2 --weighting dense --save-retain-interval 4",
    ),
    Case("packed rows", 2, "--context-parallel-size 2 --weighting longce --async-save", "packed"),
]
"""Add one for each thing that a run remembers."""


@dataclass
class Seen:
    """What the kills of a case met."""

    kills: int = 0
    while_saving: int = 0
    before_the_first_step: int = 0
    others_ended_seconds: list[float] = field(default_factory=list)


def rank_main(program: str, arguments: Sequence[str], rank: int, ranks: int, store: str, log: str) -> None:
    """In a forked process: one rank of a program."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    runpy.run_path(str(ROOT / "tools" / program))["main"](list(arguments))


@contextmanager
def started(program: str, arguments: Sequence[str], ranks: int, log: Path) -> Iterator[list[BaseProcess]]:
    """The ranks of a program. None is left at the end."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        given = [(program, arguments, rank, ranks, f"{folder}/store", str(log)) for rank in range(ranks)]
        processes: list[BaseProcess] = [context.Process(target=rank_main, args=each) for each in given]
        for process in processes:
            process.start()
        try:
            yield processes
        finally:
            kill(processes)
            for process in processes:
                process.join()


def kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)


def finish(program: str, arguments: Sequence[str], ranks: int, log: Path) -> None:
    """Run a program to its end."""
    with started(program, arguments, ranks, log) as processes:
        wait(processes, SECONDS_OF_A_RUN)
        codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"{program}: expected exit status 0, got {codes}\n{log.read_text()}")


def wait(processes: Sequence[BaseProcess], seconds: float) -> float:
    """Wait for their end, and return how long that took; `seconds` at most."""
    begun = time.monotonic()
    for process in processes:
        process.join(max(0.0, begun + seconds - time.monotonic()))
    return time.monotonic() - begun


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def newest(case: Case, run: Path) -> tuple[int, str | None]:
    """The step of the newest checkpoint of a run, and what is wrong with the files of any, with those that are there,
    or with the tracker."""
    from megatron_tw.runtime.checksums import damage_of
    from megatron_tw.runtime.run_folder import TRACKER, complete_checkpoints, find_checkpoint

    complete = complete_checkpoints(run)
    if not complete:
        return 0, None
    files = [file for checkpoint in complete for file in checkpoint.rglob("*") if file.is_file()]
    problems = [f"{file} {problem}" for file in files if (problem := damage_of(file)) is not None]
    steps = [int(checkpoint.name.removeprefix("iter_")) for checkpoint in complete]
    gone = sorted(case.kept(steps[-1]) - set(steps))
    if gone:
        problems.append(f"the checkpoints of steps {gone} are gone, there are {steps}")
    found = find_checkpoint(run)
    behind = steps[-1] - SAVE_INTERVAL  # killed before the tracker has the new one's name
    if found is None or found.state.iteration not in (steps[-1], behind):
        problems.append(f"{TRACKER} names {found and found.directory.name}, the newest is {complete[-1].name}")
    return steps[-1], problems[0] if problems else None


def survive(case: Case, arguments: Sequence[str], run: Path, log: Path, moments: int, chance: random.Random) -> Seen:
    """Kill and start the run again, at so many moments, and then let it come to its end. Where it is there before, it
    begins anew.

    Raises:
        RuntimeError: a checkpoint is lost or damaged, the ranks that were not killed do not end, or the run fails.
    """
    seen, step = Seen(), 0
    while seen.kills < moments:
        before = steps_of(run)
        target = before + chance.randint(-1, 3)
        with started("train.py", arguments, case.ranks, log) as processes:
            begun = time.monotonic()
            first = chance.uniform(0, 4) if chance.random() < 0.25 else SECONDS_OF_A_RUN  # at its start, too
            while steps_of(run) < target and time.monotonic() - begun < first and processes[0].is_alive():
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.5))
            if all(process.exitcode == 0 for process in processes):  # is at its end already
                step = 0
                shutil.rmtree(run)
                continue
            if any(process.exitcode for process in processes):
                raise RuntimeError(f"a rank failed before it was killed\n{log.read_text()}")
            seen.kills += 1
            seen.while_saving += bool(list(run.glob("iter_*.partial")))
            seen.before_the_first_step += steps_of(run) == 0
            if chance.random() < 0.5:
                kill(processes)
            else:
                kill([chance.choice(processes)])
                if steps_of(run) > before:  # else a launcher ends the others, who may still wait for it to begin
                    seen.others_ended_seconds.append(wait(processes, SECONDS_TO_END))
                    if any(process.is_alive() for process in processes):
                        raise RuntimeError(
                            f"ranks live {SECONDS_TO_END:.0f} s after another was killed\n{log.read_text()}"
                        )
        now, problem = newest(case, run)
        if problem is not None or now < step:
            lost = f"checkpoint {step} is lost, the newest is {now}"
            raise RuntimeError(f"after kill {seen.kills}: {problem or lost}")
        step = now
    finish("train.py", arguments, case.ranks, log)
    now, problem = newest(case, run)
    if problem is not None or now != STEPS:
        raise RuntimeError(f"at the end: {problem or f'the newest checkpoint is that of step {now}'}")
    return seen


def differences(run: Path, expected: Path) -> list[str]:
    """What differs between the metrics of two runs, by step."""
    found = []
    ours, theirs = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, expected)
    )
    if [step["iteration"] for step in ours] != list(range(1, STEPS + 1)):
        found.append(f"steps {[step['iteration'] for step in ours]}")
    for mine, other in zip(ours, theirs, strict=False):
        found += [
            f"step {mine['iteration']}: {key} {mine[key]!r}, not {other[key]!r}"
            for key in SAME
            if mine[key] != other[key]
        ]
    taken = [row for step in ours for row in step["row_ids"]]
    for first in range(0, len(taken) - ROWS + 1, ROWS):
        if sorted(taken[first : first + ROWS]) != list(range(ROWS)):
            found.append(f"epoch {first // ROWS + 1} takes rows {taken[first : first + ROWS]}")
    return found


def arguments_of(case: Case, folder: Path, run: Path) -> list[str]:
    import shlex

    own = shlex.split(case.options.replace("{scores}", str(folder / "scores")))
    return [
        *("--load-hf", str(folder / "model"), "--data-path", str(folder / case.rows), "--seq-length", str(SEQ_LENGTH)),
        *("--short-window", str(WINDOW), "--bos-id", "1", "--train-iters", str(STEPS), "--lr", "1e-3"),
        *("--global-batch-size", str(BATCH), "--save-interval", str(SAVE_INTERVAL), "--log-row-ids"),
        *("--save", str(run), "--auto-resume", "--log-interval", str(STEPS), *own),
    ]


def write_inputs(folder: Path, log: Path, *, scores: bool) -> None:
    """A small random model, rows, the same as two documents in each, and frozen scores."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tw.data.prepare import prepare_rows

    model = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQ_LENGTH,
        bos_token_id=1,
    )
    LlamaForCausalLM(model).save_pretrained(folder / "model")
    rows_RN = np.random.default_rng(0).integers(2, VOCABULARY, (ROWS, SEQ_LENGTH))
    documents = [part for row in rows_RN for part in np.split(row, [48])]
    for name, ids, pack_multiple in (("rows", list(rows_RN), None), ("packed", documents, 16)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"input_ids": each.tolist()}) + "\n" for each in ids))
        prepare_rows(
            [file],
            folder / name,
            seq_length=SEQ_LENGTH,
            tokenizer=None,
            vocab_size=VOCABULARY,
            bos_id=1,
            pack_multiple=pack_multiple,
        )
    if scores:
        write_scores(folder, log)


def write_scores(folder: Path, log: Path) -> None:
    """Frozen scores of the rows that `write_inputs` made."""
    options = [*("--load-hf", str(folder / "model"), "--data-path", str(folder / "rows")), *("--bos-id", "1")]
    finish("score_tokens.py", [*options, "--short-window", str(WINDOW), "--output", str(folder / "scores")], 1, log)


def examine(case: Case, folder: Path, moments: int, chance: random.Random) -> Seen:
    """The kills of one case.

    Raises:
        RuntimeError: something is not as in a run without kills.
    """
    log, straight, run = folder / f"{case.name}.log", folder / f"{case.name} straight", folder / case.name
    finish("train.py", arguments_of(case, folder, straight), case.ranks, log)
    seen = survive(case, arguments_of(case, folder, run), run, log, moments, chance)
    found = differences(run, straight)
    if found:
        raise RuntimeError(f"{case.name}: {len(found)} differences from a run without kills: {found[0]}")
    if "Traceback" in log.read_text():
        raise RuntimeError(f"{case.name}: a traceback in {log}\n{log.read_text()}")
    return seen


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--moments", type=int, default=100, help="kills, shared by the cases")
    parser.add_argument("--cases", help="some of them, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, help="of the moments (default: a new one)")
    parser.add_argument("--folder", help="where the runs are written (default: the system's for temporary files)")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    names = [case.name for case in CASES] if options.cases is None else options.cases.split(",")
    cases = [case for case in CASES if case.name in names]
    if len(cases) < len(names):
        sys.exit(f"error: --cases: expected some of {', '.join(case.name for case in CASES)}, got {options.cases}")
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    chance, ended = random.Random(seed), []
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = Path(own)
        write_inputs(folder, folder / "scores.log", scores=any(case.uses_scores for case in cases))
        for number, case in enumerate(cases):
            moments = options.moments * (number + 1) // len(cases) - options.moments * number // len(cases)
            seen = examine(case, folder, moments, chance)
            ended += seen.others_ended_seconds
            print(
                f"{case.name}, {case.ranks} ranks: {seen.kills} kills ({seen.while_saving} while a checkpoint was "
                f"being written, {seen.before_the_first_step} before the first step): losses and rows as without",
                flush=True,
            )
    slowest = f"; the other ranks ended within {max(ended):.1f} s" if ended else ""
    print(f"{options.moments} kills: no difference, no checkpoint lost or damaged{slowest}")


if __name__ == "__main__":
    main(sys.argv[1:])
