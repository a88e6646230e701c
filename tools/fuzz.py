"""Damages a file at random and runs the program that reads it: it must refuse the file in one line, or do as if nothing
had been changed (spaces in JSON, a file that it does not read). A traceback, a hang or another result is a fault.

    tools/fuzz.py --cases 1000                 # seeds 0 .. 999
    tools/fuzz.py --seed 417 --cases 1 --keep  # the one of seed 417 again; its folder is kept

A case's seed decides all of it: what is read, by which program, and the damage. Exit status 1 where there is a fault.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from damage import BASE, make_world  # noqa: E402
from programs import Answer, Programs, lines_of  # noqa: E402

TIMEOUT_SECONDS = 60.0
RUN = "run/iter_0000002"
SCORES = "--weighting dense --short-window 64 --short-stride 48 --scorer frozen --scores scores"
RECIPE = """\
# What a training takes from a file.
weighting: dense
interpolation: 0.75
short_window: 64
short_stride: 48
lr: 1.0e-3
lr_decay_style: cosine
adam_beta2: 0.95
seed: 5
shuffle: false
transforms: [absolute]
load_hf: model
data_path: rows
"""
OUTPUTS = ("out", "hf")
TIMES = re.compile(r"(seconds|tokens_per_second|memory|time)")


@dataclass(frozen=True)
class Reading:
    """A program and the files that it reads, as globs in the world of tests/damage.py. sealed: they have checksums, so
    that whatever is changed in them must be seen; what has none (a recipe, a tokenizer, metrics) may say something
    else, and the program then does what it says."""

    program: str
    options: str
    files: tuple[str, ...]
    sealed: bool = True


TRAIN, SMALL = BASE["train"] + " --save-hf hf", "--seq-length 256 --train-iters 2 --save out --save-hf hf"
READINGS = {
    "rows": (
        Reading("train", TRAIN, ("rows/*",)),
        Reading("train", TRAIN.replace("rows", "rows_of_words"), ("rows_of_words/**/*",)),
        Reading("evaluate", BASE["evaluate"], ("rows/*",)),
        Reading("score", BASE["score"], ("rows/*",)),
        Reading("verify", "--verify rows_of_words", ("rows_of_words/**/*",)),
    ),
    "scores": (
        Reading("train", f"{TRAIN} {SCORES}", ("scores/*",)),
        Reading("score", BASE["score"].replace("output out", "output scores"), ("scores/*",)),
        Reading("verify", "--verify scores", ("scores/*",)),
    ),
    "checkpoint": (
        Reading("train", f"{TRAIN} --load run --train-iters 3", (f"{RUN}/**/*", "run/latest*")),
        Reading("evaluate", BASE["evaluate"] + " --load run", (f"{RUN}/**/*", "run/latest*")),
        Reading("convert", "--load run --save-hf hf", (f"{RUN}/**/*", "run/latest*")),
    ),
    "export": (
        Reading("train", TRAIN.replace("load-hf model", "load-hf export"), ("export/*",)),
        Reading("evaluate", BASE["evaluate"].replace("load-hf model", "load-hf export"), ("export/*",)),
        Reading("score", BASE["score"].replace("load-hf model", "load-hf export"), ("export/*",)),
        Reading("convert", "--load-hf export --save out", ("export/*",)),
    ),
    "headers": (
        Reading("train", TRAIN, ("rows/dataset.json",)),
        Reading("train", f"{TRAIN} {SCORES}", ("scores/scores.json",)),
        Reading("evaluate", f"{BASE['evaluate']} --load run", (f"{RUN}/run.json", f"{RUN}/checksums.json")),
        Reading("report", BASE["report"], ("eval/evaluation.json",)),
    ),
    "evaluations": (
        Reading("report", BASE["report"] + " --runs base=run", ("eval/*", f"{RUN}/config.yaml")),
        Reading("report", BASE["report"] + " --runs base=run", ("run/metrics.jsonl",), sealed=False),
        Reading("evaluate", BASE["evaluate"] + " --key-tokens eval", ("eval/*",)),
    ),
    "options": (Reading("train", f"--config recipe.yaml {SMALL}", ("recipe.yaml",), sealed=False),),
    "documents": (
        Reading("preprocess", BASE["preprocess"], ("words/*",), sealed=False),
        Reading(
            "preprocess", "--tokenizer none --input ids.jsonl --seq-length 8 --output out", ("ids.jsonl",), sealed=False
        ),
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a case. fault: what is wrong, None where nothing is."""

    seed: int
    kind: str
    what: str
    outcome: str
    fault: str | None = None


def flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.choice((0, chance.randrange(len(content)), len(content) - 1))]


def insert(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.randbytes(chance.choice((1, 1, 7, 4096))) + content[place:]


def delete(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.choice((1, 1, 8, 500)) :]


def zero(content: bytes, chance: random.Random) -> bytes:
    place, size = chance.randrange(len(content)), chance.choice((1, 16, 4096))
    return content[:place] + bytes(len(content[place : place + size])) + content[place + size :]


def swap_value(content: bytes, chance: random.Random) -> bytes:
    """Another value somewhere in JSON."""
    whole = [json.loads(line) for line in content.splitlines()] if content.count(b"}\n{") else json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(whole)
    place, key = chance.choice(places)
    old = place[key]
    others = [None, True, -1, 0, 1, 2**70, 0.5, math.inf, "", "x", [], {}, [old], {"a": old}]
    if isinstance(old, int | float) and not isinstance(old, bool):
        others += [old + 1, -old, old * 2, float(old)]
    new = chance.choice([other for other in others if repr(other) != repr(old)])
    if chance.random() < 0.15 and isinstance(place, dict):
        del place[key]
    else:
        place[key] = new
    lines = whole if content.count(b"}\n{") else [whole]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


WAYS = (flip, flip, cut, insert, delete, zero)


def damage(file: Path, chance: random.Random) -> str:
    """Change a file, and what was done in words."""
    content = file.read_bytes()
    if chance.random() < 0.08:
        file.unlink()
        return "missing"
    ways: tuple[Callable[[bytes, random.Random], bytes], ...] = WAYS
    if file.suffix in (".json", ".jsonl"):
        ways = (*WAYS, swap_value, swap_value, swap_value, swap_value)
    way = chance.choice(ways) if content else insert
    new = way(content, chance)
    file.write_bytes(new)
    at = next((i for i, (a, b) in enumerate(zip(content, new, strict=False)) if a != b), min(len(content), len(new)))
    return f"{way.__name__} at {at} of {len(content)}" if new != content else "nothing"


def result_of(folder: Path, answer: Answer) -> dict[str, str]:
    """What a program made, without what differs from run to run: digests by file, and its last words."""
    found = {"status": str(answer.status)}
    for path in sorted(folder.rglob("*")):
        top, *below = path.relative_to(folder).parts
        if top not in OUTPUTS or "tensorboard" in below or not path.is_file():
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            steps = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in step.items() if not TIMES.search(k)} for step in steps]).encode()
        elif path.name in (".metadata", "checksums.json"):  # of the checkpoint's containers, which hold times and names
            content = b""
        found[str(path.relative_to(folder))] = sha256(content).hexdigest()
    return found


class Fuzzer:
    """The world, the programs, and what these make of the world as it is."""

    def __init__(self, folder: Path, programs: Programs, *, keep: bool = False) -> None:
        self.folder, self.programs, self.keep = folder, programs, keep
        self.world = folder / "world"
        make_world(self.world, programs)
        (self.world / "recipe.yaml").write_text(RECIPE)
        answer = programs.run("convert", ["--load", "run", "--save-hf", "export"], self.world)
        assert answer.status == 0, answer
        self.expected: dict[Reading, dict[str, str]] = {}

    def expect(self, reading: Reading) -> dict[str, str]:
        """Made when it is asked for first."""
        if reading not in self.expected:
            copy = Path(tempfile.mkdtemp(dir=self.folder)) / "world"
            shutil.copytree(self.world, copy)
            answer = self.programs.run(reading.program, reading.options.split(), copy)
            assert answer.status == 0, (reading, answer)
            self.expected[reading] = result_of(copy, answer)
            shutil.rmtree(copy.parent)
        return self.expected[reading]

    def run(self, seed: int) -> Verdict:
        """One case."""
        chance = random.Random(seed)
        kind = chance.choice(list(READINGS))
        reading = chance.choice(READINGS[kind])
        copy = self.folder / f"case_{seed}"
        shutil.copytree(self.world, copy)
        files = sorted(path for glob in reading.files for path in copy.glob(glob) if path.is_file())
        file = chance.choice(files)
        what = f"{reading.program}: {file.relative_to(copy)}: {damage(file, chance)}"
        before = state(copy)
        answer = self.programs.run(reading.program, reading.options.split(), copy, timeout=TIMEOUT_SECONDS)
        after = state(copy)
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        outcome, fault = self.judge(reading, copy, answer, changed)
        if not (self.keep and fault):
            shutil.rmtree(copy)
        return Verdict(seed, kind, what, outcome, fault)

    def judge(self, reading: Reading, copy: Path, answer: Answer, changed: set[str]) -> tuple[str, str | None]:
        lines = lines_of(answer)
        targets = (*OUTPUTS, *(["run"] if "--save run" in reading.options else []))
        strays = [path for path in changed if path.split("/")[0].removesuffix(".partial") not in targets]
        if answer.status is None:
            return "hang", f"still running after {TIMEOUT_SECONDS:g} s"
        if strays:
            return "stray", f"changed {', '.join(sorted(strays)[:3])}"
        if answer.status == 2 and len(lines) == 1 and lines[0].startswith("error: "):
            return "refused", None
        if answer.status != 0 or lines:
            return "traceback", f"status {answer.status}, {len(lines)} lines: {' '.join(lines[-1:])[:300]}"
        expected, found = self.expect(reading), result_of(copy, answer)
        if found == expected:
            return "same", None
        if not reading.sealed and ("recipe.yaml" not in reading.options or _as_it_says(copy)):
            return "as it says", None
        different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        return "difference", f"another {', '.join(different[:4])}"


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time."""
    stats = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats}


def _as_it_says(folder: Path) -> bool:
    """Whether a run had the options that are in its file now: a recipe has no checksum, it may be edited."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) or {}
    used = yaml.safe_load(next(folder.glob("out/iter_*/config.yaml")).read_text())
    return all(used.get(name) == value for name, value in recipe.items())


def fuzz(seeds: range, programs: Programs, folder: Path, *, jobs: int = 2, keep: bool = False) -> list[Verdict]:
    """The cases of these seeds, in an empty folder; faults are told as they are found."""
    fuzzer, verdicts = Fuzzer(folder, programs, keep=keep), []
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in tqdm(pool.map(fuzzer.run, seeds), desc="fuzzing", total=len(seeds), unit="case", disable=None):
            verdicts.append(verdict)
            if verdict.fault is not None:
                tqdm.write(f"seed {verdict.seed}: {verdict.what}\n    {verdict.outcome}: {verdict.fault}")
    return verdicts


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many ended how, by kind."""
    lines = [f"seeds {verdicts[0].seed} to {verdicts[-1].seed}: {len(verdicts)} cases"]
    for kind in (*READINGS, "all"):
        outcomes = Counter(verdict.outcome for verdict in verdicts if kind in (verdict.kind, "all"))
        lines.append(f"  {kind:<12} " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first; the others count on from it")
    parser.add_argument("--jobs", type=int, default=2, metavar="J", help="at a time (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases with a fault, and tell where")
    options = parser.parse_args(argv)
    if min(options.cases, options.jobs) < 1:
        parser.error("--cases, --jobs: expected 1 or more")
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    faults = False
    try:
        with Programs() as programs:
            seeds = range(options.seed, options.seed + options.cases)
            verdicts = fuzz(seeds, programs, folder, jobs=options.jobs, keep=options.keep)
        faults = any(verdict.fault is not None for verdict in verdicts)
        print(summary(verdicts) + (f"\nkept: {folder}/case_SEED" if faults and options.keep else ""))
    finally:
        if not (faults and options.keep):
            shutil.rmtree(folder, ignore_errors=True)
    return int(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
