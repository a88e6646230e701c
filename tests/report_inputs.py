"""Made-up evaluations of three models on real rows, in the files that tools/evaluate.py writes."""

import json
import os
from pathlib import Path

import numpy as np
from test_data_tokenizer import train_hugging_face

from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows
from megatron_tw.evaluation.result import EvaluationHeader, EvaluationResult
from megatron_tw.evaluation.results import Record, Results

MODELS = ("base", "uniform", "dense")
SEQ_LENGTH, WINDOW, ROWS = 512, 128, 32
LENGTHS = (1024, 4096)
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "vt", "cwe", "fwe")
EXAMPLES = 20
WORD = "日本語 naïve 🙂"
"""Characters of several tokens each."""


def make_inputs(folder: Path, *, seed: int = 0) -> None:
    """rows, eval_MODEL, answers.npz and run in an empty folder."""
    rng = np.random.default_rng(seed)
    tokenizer = train_hugging_face(folder / "tokenizer")
    text = Path(os.__file__).read_text(encoding="utf-8").replace("environ", f"environ {WORD}")
    (folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    prepare_rows([folder / "text.jsonl"], folder / "rows", seq_length=SEQ_LENGTH, tokenizer=tokenizer)
    header = TokenRows(folder / "rows").header
    assert header.tokenizer is not None
    num_rows = min(ROWS, header.counts.rows)

    shape = (num_rows, SEQ_LENGTH - 1)
    easy_RT = rng.gamma(2.0, 0.9, shape).astype(np.float32)
    needs_RT = (rng.random(shape) < 0.03) & (np.arange(1, SEQ_LENGTH) >= WINDOW)
    row, position, distance = _answers(rng, num_rows)
    np.savez(folder / "answers.npz", row=row, position=position, distance=distance, tokens=np.full_like(row, 2))
    for skill, model in enumerate(MODELS):
        long_RT = easy_RT + rng.normal(0, 0.05, shape).astype(np.float32).clip(-0.1, 0.1) + 0.1
        long_RT = long_RT + np.where(needs_RT, 1.5 - 0.3 * skill, 0).astype(np.float32)
        short_RT = long_RT + np.where(needs_RT, rng.gamma(4.0, 1.2, shape), rng.normal(0, 0.02, shape))
        top1_RT = long_RT < 1.0
        for r, p, d in zip(row, position, distance, strict=True):
            known = rng.random() < 0.95 - 0.2 * (2 - skill) * (d >= WINDOW)
            top1_RT[r, p - 1 : p + 1] = known
        result = EvaluationResult(
            header=EvaluationHeader(
                model=f"runs/{model}", layout="TP 2 x CP 2", seq_length=SEQ_LENGTH, short_window=WINDOW,
                short_stride=96, rotary_base=1e5, data_fingerprint=header.fingerprint,
                tokenizer_fingerprint=header.tokenizer.fingerprint, old_context=WINDOW,
            ),
            row_index=np.arange(num_rows),
            long_nll=long_RT,
            short_nll=np.where(np.arange(1, SEQ_LENGTH) <= WINDOW, long_RT, short_RT).clip(0).astype(np.float32),
            valid=np.ones(shape, bool),
            top1=top1_RT,
        )  # fmt: skip
        result.save(folder / f"eval_{model}")
        _benchmarks(folder / f"eval_{model}", model, skill, rng)
    (folder / "run").mkdir()
    steps = [
        {"iteration": i, "lm_loss": 2 + 3 / i, "weighted_loss": 2 + 2.5 / i, "grad_norm": 1 / i} for i in range(1, 60)
    ]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "commands.txt").write_text("python tools/train.py --seq-length 512 < rows && echo done\n")


def _answers(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row, position, distance = [], [], []
    for number in range(num_rows):
        for place in range(60, SEQ_LENGTH - 2, 50):
            row.append(number)
            position.append(place)
            distance.append(int(rng.integers(8, place)))
    return np.array(row), np.array(position), np.array(distance)


def _benchmarks(folder: Path, model: str, skill: int, rng: np.random.Generator) -> None:
    """Two RULER examples in three go by the model's skill, less the longer they are."""
    records, samples = [], []
    for task in TASKS:
        for place, length in enumerate(LENGTHS):
            scores = []
            for index in range(EXAMPLES):
                depth = float(np.random.default_rng([place, index]).random())
                score = float(rng.random() < 0.75 + 0.08 * skill - 0.15 * place)
                scores.append(score)
                depths = [depth] if "niah" in task else []
                samples.append(
                    {"task": task, "length": length, "index": index, "depths": depths, "scores": [score],
                     "metric": "exactness"}
                )  # fmt: skip
            records.append(
                Record(suite="ruler", task=task, length=length, metric="exactness", value=float(np.mean(scores)),
                       samples=EXAMPLES)
            )  # fmt: skip
    records.append(
        Record(suite="ruler", task="average of 6 tasks", length=1024, metric="exactness", value=0.0, samples=1)
    )
    records.append(
        Record(suite="ruler", task="qa_1", length=1024, metric="exactness", not_run="--ruler-squad is not given")
    )
    records += [
        Record(suite="longppl", task="all", length=512, metric="longppl", value=9.0 - skill, samples=400),
        Record(suite="mmlu", task="law", metric="acc", value=0.41, stderr=0.01, samples=900),
        Record(
            suite="mmlu",
            task="all",
            metric="acc",
            value=0.30 - 0.01 * skill * (skill > 1),
            stderr=0.004,
            samples=14_042,
        ),
        Record(suite="bbh", task="all", metric="exact_match", value=0.25, stderr=0.006, samples=6_511),
    ]
    results = Results(
        model=f"runs/{model}", layout="TP 2 x CP 2", tokenizer_fingerprint="t", settings={}, records=tuple(records)
    )
    results.write(folder)
    (folder / "ruler_samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def report_options(folder: Path, *more: str) -> list[str]:
    """Of tools/report.py, for everything that is there."""
    return [
        "--evaluations", *(f"{model}={folder / f'eval_{model}'}" for model in MODELS),
        "--runs", f"dense={folder / 'run'}",
        "--key-tokens", "uniform", "--answers", str(folder / "answers.npz"), "--rows", str(folder / "rows"),
        "--commands", str(folder / "commands.txt"), *more,
    ]  # fmt: skip
