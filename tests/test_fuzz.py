"""tools/fuzz.py: files damaged at random are refused in one line, or change nothing; and it sees where that fails."""

import random
import shutil
from pathlib import Path

import pytest
from damage import BASE, flip
from programs import Answer, Programs

from tools import fuzz


@pytest.mark.parametrize("cases", [range(30), pytest.param(range(30, 60), marks=pytest.mark.full)], ids=str)
def test_no_damage_goes_unseen(cases: range, programs: Programs, tmp_path: Path) -> None:
    verdicts = fuzz.fuzz(cases, programs, tmp_path)
    assert [verdict for verdict in verdicts if verdict.fault is not None] == []
    assert {verdict.kind for verdict in verdicts} == set(fuzz.READINGS)
    assert sum(verdict.outcome == "refused" for verdict in verdicts) > len(cases) / 2
    assert list(tmp_path.glob("case_*")) == []


def test_faults_are_seen(programs: Programs, tmp_path: Path) -> None:
    """Without checksums another weight is another model, and nobody says so."""
    fuzzer = fuzz.Fuzzer(tmp_path, programs)
    reading = fuzz.Reading("evaluate", BASE["evaluate"], ("model/model.safetensors",))
    copy = Path(shutil.copytree(fuzzer.world, tmp_path / "copy"))
    flip(copy / "model" / "model.safetensors")
    answer = programs.run(reading.program, reading.options.split(), copy)
    assert fuzzer.judge(reading, copy, answer, {"out/nll.npz"})[0] == "difference"
    for outcome, given, changed in (
        ("hang", Answer(None, "", "", 1.0), set()),
        ("stray", Answer(2, "", "error: x", 1.0), {"rows/rows.bin"}),
        ("traceback", Answer(1, "", "Traceback\nError", 1.0), set()),
        ("traceback", Answer(2, "", "usage:\nerror: x", 1.0), set()),
        ("refused", Answer(2, "", "error: x", 1.0), set()),
    ):
        assert fuzzer.judge(reading, copy, given, changed)[0] == outcome


@pytest.mark.parametrize("way", fuzz.WAYS, ids=lambda way: way.__name__)
def test_a_seed_decides_the_damage(way) -> None:
    content = bytes(range(200))
    ours, theirs = (way(content, random.Random(3)) for _ in range(2))
    assert ours == theirs
    assert ours != content
