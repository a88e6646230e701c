"""Every line of tests/wrong_inputs.txt: what a user gets wrong or a disk damages ends in exit status 2 and one line,
which names the option or the file; and nothing is written or changed but what was asked for."""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from damage import BASE, NOT_ALWAYS, damage, make_world
from programs import Programs, lines_of

TABLE = Path(__file__).with_name("wrong_inputs.txt")
TARGETS = ("--save", "--save-hf", "--output", "--tensorboard-dir")


@dataclass(frozen=True)
class Case:
    """A line of the table. late: what is asked for may have been begun. disk: bytes that a file can have at most."""

    program: str
    given: str
    damage: str
    options: tuple[str, ...]
    said: str
    late: bool
    disk: int | None

    @property
    def name(self) -> str:
        return f"{self.program}: {self.given}"


def read_table() -> Iterator[Case]:
    program, base = "", []
    for line in TABLE.read_text().splitlines():
        if line.startswith("# "):
            program, *more = line[2:].split()
            base = _with(BASE[program].split(), more)
        elif line.strip() and not line.startswith("#"):
            given, _, said = (part.strip() for part in line.rpartition(" | "))
            steps = [] if given == "nothing else" else given.split(" ; ")
            last = steps.pop() if steps and steps[-1].startswith(("--", "without ", "positional")) else ""
            late = said.startswith("* ")
            said = said.removeprefix("* ")
            disk = int(steps.pop().split()[1]) if steps and steps[-1].startswith("disk ") else None
            yield Case(program, given, ";".join(steps), tuple(_with(base, shlex.split(last))), said, late, disk)


def _with(base: list[str], options: list[str]) -> list[str]:
    """`base` and `options`; "without --option" takes an option and its value from the base."""
    base = list(base)
    while options[:1] == ["without"]:
        place = base.index(options[1])
        del base[place : place + 2]
        options = options[2:]
    return base + options


CASES = list(read_table())


@pytest.fixture(scope="module")
def world(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; never changed."""
    folder = tmp_path_factory.mktemp("wrong") / "world"
    make_world(folder, programs)
    return folder


@pytest.fixture
def own_world(world: Path) -> Iterator[Callable[[], Path]]:
    """A copy of it, to be damaged."""
    copy = world.with_name("own")
    yield lambda: Path(shutil.copytree(world, copy))
    shutil.rmtree(copy, ignore_errors=True)


def state(folder: Path) -> dict[str, tuple[int, int, int] | None]:
    """Every file's size, time and number, and every folder."""
    found: dict[str, tuple[int, int, int] | None] = {}
    for place, folders, files in os.walk(folder):
        below = os.path.relpath(place, folder)
        found |= {os.path.normpath(f"{below}/{name}"): None for name in folders}
        for name in files:
            stat = os.lstat(f"{place}/{name}")
            found[os.path.normpath(f"{below}/{name}")] = stat.st_size, stat.st_mtime_ns, stat.st_ino
    return found


def test_the_table_is_whole() -> None:
    assert len(CASES) >= 150
    assert {case.program for case in CASES} == set(BASE)
    assert len({case.name + str(case.options) for case in CASES}) == len(CASES)
    for case in CASES:
        assert re.search(r"--[a-z]|[\w/]+\.\w+|^[\w/]+: |^\w+ and \w+ were|^unrecognized arguments: \w", case.said), (
            case
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_wrong_is_said(case: Case, programs: Programs, world: Path, own_world: Callable[[], Path]) -> None:
    for name in NOT_ALWAYS:
        if name in case.damage and not (world / "run" / "iter_0000002" / name).exists():
            pytest.skip(f"this version of Megatron-Core writes no {name}")
    folder = own_world() if case.damage or case.late or case.disk else world
    damage(folder, case.damage)
    before = state(folder)
    answer = programs.run(case.program, case.options, folder, file_bytes=case.disk)
    assert answer.status == 2, answer
    assert len(lines_of(answer)) == 1, answer.stderr
    assert lines_of(answer)[0].startswith("error: "), answer.stderr
    assert case.said in answer.stderr
    after = state(folder)
    changed = {path for path in {*before, *after} if path not in before or before[path] != after.get(path, ())}
    changed -= {".tmp"}
    if case.late:
        targets = [value for name, value in zip(case.options, case.options[1:], strict=False) if name in TARGETS]
        changed = {path for path in changed if path.split("/")[0].removesuffix(".partial") not in targets}
    assert changed == set()
