"""results.json and results.csv: what is written comes back; what is damaged is refused."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tw.config import parse_options
from megatron_tw.config.evaluation import RULER_TASKS, EvaluationConfig
from megatron_tw.evaluation.results import Record, Results, as_lines

RECORDS = (
    Record(suite="ruler", task="vt", length=4096, metric="exactness", value=0.75, stderr=0.02, samples=500),
    Record(suite="ruler", task="qa_1", length=4096, metric="exactness", not_run="no SQuAD file, see --ruler-squad"),
    Record(suite="longppl", task="all", metric="longppl", value=2.5, samples=12),
)
RESULTS = Results(
    model="models/x", layout="TP 2", tokenizer_fingerprint=None, settings={"seq_length": 4096}, records=RECORDS
)


def test_results_come_back(tmp_path: Path) -> None:
    RESULTS.write(tmp_path)
    assert Results.load(tmp_path) == RESULTS
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["format"], content["format_version"]) == ("megatron_tw results", 1)
    with (tmp_path / "results.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["task"] for line in lines] == ["vt", "qa_1", "all"]
    assert lines[0] == {
        "suite": "ruler", "task": "vt", "length": "4096", "metric": "exactness", "value": "0.75", "stderr": "0.02",
        "samples": "500", "not_run": "",
    }  # fmt: skip
    assert lines[1]["value"] == ""
    assert lines[1]["not_run"] == "no SQuAD file, see --ruler-squad"
    assert as_lines(RECORDS) == [
        "  ruler vt at 4,096 tokens: exactness 0.7500 ± 0.0200 (500 samples)",
        "  ruler qa_1 at 4,096 tokens: exactness not run: no SQuAD file, see --ruler-squad",
        "  longppl all: longppl 2.5000 (12 samples)",
    ]


def test_unknown_fields_are_left_out(tmp_path: Path) -> None:
    """A later version may write more."""
    RESULTS.write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    content.pop("checksum")
    content["later"] = 1
    content["records"][0]["later"] = 1
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert Results.load(tmp_path) == RESULTS


def test_bad_results_are_refused(tmp_path: Path) -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="ruler vt exactness is"):
            replace(RESULTS, records=(replace(RECORDS[0], value=bad),)).write(tmp_path)
    with pytest.raises(ValueError, match=r"results\.json is missing: expected a folder that tools/evaluate\.py wrote"):
        Results.load(tmp_path)
    RESULTS.write(tmp_path)
    file = tmp_path / "results.json"
    content = file.read_text()
    for damaged, match in (
        (content[:40], "truncated or no JSON"),
        (content.replace("0.75", "0.95"), "damaged or edited"),
        (content.replace('"format_version": 1', '"format_version": 2'), "format version 2, but this program reads"),
        (content.replace("megatron_tw results", "other"), 'not a file of "megatron_tw results"'),
    ):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=match):
            Results.load(tmp_path)


def test_tasks_are_grouped_by_suite() -> None:
    def suites(*tasks: str) -> dict[str, tuple[str, ...]]:
        return parse_options(["--output", "out", "--tasks", *tasks], EvaluationConfig).evaluation.by_suite()

    assert suites("mmlu", "vt", "loss", "niah_single_2") == {"loss": (), "ruler": ("niah_single_2", "vt"), "mmlu": ()}
    assert suites("ruler", "vt") == {"ruler": RULER_TASKS}
