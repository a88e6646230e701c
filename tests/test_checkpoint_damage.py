"""What is damaged, lost or cannot be written is named in one line, with what is still good; nothing is overwritten."""

import contextlib
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from damage import NOT_ALWAYS
from safetensors import SafetensorError
from test_bad_input import arguments, run_tool, world
from tiny import SEQ_LENGTH

from megatron_tw.runtime.checkpoint import UnfinishedCheckpoint
from megatron_tw.runtime.checksums import CHECKSUMS_FILE, deal_out
from megatron_tw.runtime.intact import open_checkpoint
from megatron_tw.runtime.lock import LOCK_FILE, FolderLock
from megatron_tw.runtime.run_folder import TRACKER, remove_partial_checkpoints

__all__ = ["world"]  # a fixture of test_bad_input
STEPS = 3


@pytest.fixture(scope="module")
def three(world, ranks) -> Path:
    """A run with a checkpoint after each of 3 steps."""
    run = world["folder"] / "three"
    options = ["--save", str(run), "--save-interval", "1", "--train-iters", str(STEPS), "--global-batch-size", "2"]
    for status, stderr in ranks(2).run(run_tool, "train", arguments(world, *options)):
        assert (status, stderr) == (0, "")
    return run


@pytest.fixture
def run(three, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(three, tmp_path / "run"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 100)


def empty(file: Path) -> None:
    os.truncate(file, 0)


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("__0_1.distcp", flip, "is damaged: its content is not what was written"),
    ("__0_0.distcp", cut, "bytes were written"),
    ("__0_0.distcp", Path.unlink, "is missing"),
    (".metadata", empty, "0 are there"),
    (".metadata", Path.unlink, "is missing"),
    ("common.pt", flip, "is damaged"),
    ("metadata.json", empty, "0 are there"),
    ("run.json", cut, "is damaged"),
    ("run.json", Path.unlink, "No such file"),
    ("config.yaml", flip, "is damaged"),
    (CHECKSUMS_FILE, cut, "is damaged"),
]


def opening_error(folder: Path) -> str:
    """On a rank: what is said of the checkpoint of a run's folder."""
    try:
        open_checkpoint(folder, verify=True)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_the_damaged_file_and_the_newest_intact_checkpoint_are_named(run, ranks):
    newest = run / f"iter_{STEPS:07d}"
    for name, change, problem in DAMAGE:
        if name in NOT_ALWAYS and not (newest / name).exists():
            continue
        shutil.copytree(newest, run / "kept")
        change(newest / name)
        ours, theirs = ranks(2).run(opening_error, run)
        assert ours == theirs
        assert str(newest / name) in ours, (name, change)
        assert problem in ours, (name, change)
        assert ours.startswith(f"--load {run}: ")
        good = run / "iter_0000002"
        assert ours.endswith(f"the newest intact checkpoint before it is {good}: take it with --load {good}")
        shutil.rmtree(newest)
        (run / "kept").rename(newest)
    for iteration in (3, 2):
        flip(run / f"iter_{iteration:07d}" / ".metadata")
    assert f"before it is {run}/iter_0000001:" in ranks(2).run(opening_error, run)[0]
    flip(run / "iter_0000001" / "__0_0.distcp")
    assert ranks(2).run(opening_error, run)[0].endswith("there is no intact checkpoint before it")


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_new_one(tmp_path, monkeypatch):
    """A run that was taken back saves the same step again."""
    folder = tmp_path / "iter_0000002"
    partial = folder.with_name("iter_0000002.1a2b3c4d.partial")
    for path in (folder, partial):
        path.mkdir()
        (path / "file").write_text(path.name)

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    checkpoint = UnfinishedCheckpoint(directory=folder, partial=partial, option="--save", iteration=2, lock=None)
    with pytest.raises(KeyboardInterrupt):
        checkpoint._give_its_name()
    assert (folder / "file").read_text() == partial.name
    assert (tmp_path / TRACKER).read_text() == "2\n"
    monkeypatch.undo()
    remove_partial_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, TRACKER]


def test_every_program_refuses_a_damaged_checkpoint(run, world, ranks, tmp_path):
    flip(run / "iter_0000003" / "__0_0.distcp")
    evaluation = ["--load", str(run), "--data-path", str(world["data"]), "--seq-length", str(SEQ_LENGTH)]
    programs = {
        "train": arguments(world, "--load", str(run), "--save", str(run), "--train-iters", "5"),
        "evaluate": [*evaluation, "--output", str(tmp_path / "out")],
        "convert": ["--load", str(run), "--save-hf", str(tmp_path / "hf")],
    }
    for tool, argv in programs.items():
        status, stderr = ranks(1).run(run_tool, tool, argv)[0]
        assert status == 2, tool
        assert "__0_0.distcp is damaged" in stderr
        assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "hf").exists()
    status, stderr = ranks(1).run(run_tool, "convert", [*programs["convert"], "--no-verify-checkpoint"])[0]
    assert (status, stderr) == (0, "")  # a flipped bit of a weight: only the checksum knows


@pytest.mark.parametrize(
    ("name", "change"),
    [("__0_0.distcp", cut), ("__0_1.distcp", Path.unlink), (".metadata", empty), ("common.pt", cut)],
)
def test_damage_without_checksums_is_one_line_too(name, change, run, ranks, tmp_path):
    if name in NOT_ALWAYS and not (run / "iter_0000003" / name).exists():
        pytest.skip(f"this version of Megatron-Core writes no {name}")
    for checkpoint in run.glob("iter_*"):
        (checkpoint / CHECKSUMS_FILE).unlink()
    convert = ["--load", str(run), "--save-hf"]
    change(run / "iter_0000003" / name)
    status, stderr = ranks(1).run(run_tool, "convert", [*convert, str(tmp_path / "hf")])[0]
    assert status == 2
    assert f"{run}/iter_0000003: cannot be read; a file of it is damaged or missing" in stderr
    assert len(stderr.splitlines()) == 1
    convert[1] += "/iter_0000002"
    assert ranks(1).run(run_tool, "convert", [*convert, str(tmp_path / "hf")])[0] == (0, "")


def test_a_run_whose_tracker_is_lost_is_not_started_afresh(run, world, ranks):
    (run / TRACKER).unlink()
    before = content_of(run)
    again = arguments(world, "--save", str(run), "--train-iters", "4", "--global-batch-size", "2")
    status, stderr = ranks(1).run(run_tool, "train", [*again, "--load", str(run)])[0]
    assert status == 2
    assert f"--load {run}: {TRACKER} is missing, but there are checkpoints; take the newest with" in stderr
    assert f"--load {run}/iter_0000003" in stderr
    status, stderr = ranks(1).run(run_tool, "train", again)[0]
    assert (status, "already holds a run" in stderr) == (2, True)
    assert content_of(run) == before
    status, stderr = ranks(1).run(run_tool, "train", [*again, "--load", str(run / "iter_0000002")])[0]
    assert (status, stderr) == (0, "")
    assert [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").open()] == [1, 2, 3, 4]
    assert (run / TRACKER).read_text() == "4\n"


@pytest.mark.parametrize("killed", ["before the checkpoint has its name", "before the tracker has"])
def test_a_run_that_died_in_its_first_save_goes_on(killed, world, ranks, tmp_path):
    run = tmp_path / "run"
    again = arguments(world, "--save", str(run), "--load", str(run), "--train-iters", "2")
    assert ranks(1).run(run_tool, "train", [*again, "--exit-interval", "1"])[0] == (0, "")
    (run / TRACKER).rename(run / f"{TRACKER}.partial")
    if killed == "before the checkpoint has its name":
        (run / "iter_0000001").rename(run / "iter_0000001.1a2b3c4d.partial")
    assert ranks(1).run(run_tool, "train", again)[0] == (0, "")
    assert [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").open()] == [1, 2]
    assert (run / "metrics.jsonl.1").exists() == (killed == "before the checkpoint has its name")
    assert (run / TRACKER).read_text() == "2\n"
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize("load", [True, False])
def test_a_run_that_died_before_its_first_checkpoint_is_begun_again(load, world, ranks, tmp_path):
    run = tmp_path / "run"
    (run / "iter_0000005").mkdir(parents=True)
    (run / "iter_0000005.1a2b3c4d.partial").mkdir()
    (run / "metrics.jsonl").write_text('{"iteration": 1}\n')
    argv = arguments(world, "--save", str(run), *(["--load", str(run)] if load else []))
    status, stderr = ranks(1).run(run_tool, "train", argv)[0]
    assert (status, stderr) == (0, "")
    assert (run / "metrics.jsonl.1").read_text() == '{"iteration": 1}\n'
    assert {path.name for path in run.iterdir()} == {
        "iter_0000001", "iter_0000005", "metrics.jsonl", "metrics.jsonl.1", TRACKER, "tensorboard"
    }  # fmt: skip


def content_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """On a rank: what writes more than `size` bytes into a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_tool_on_a_full_disk(tool: str, argv: list[str]) -> tuple[int, str]:
    with files_of_at_most(200_000):
        return run_tool(tool, argv)


def test_a_disk_that_is_full(run, world, ranks, tmp_path):
    """In a save: what was there stays as it is; in an export: the weights are kept, and how to export them is said."""
    before = content_of(run)
    more = arguments(world, "--load", str(run), "--save", str(run), "--train-iters", "4", "--global-batch-size", "2")
    answers = ranks(2).run(run_tool_on_a_full_disk, "train", more)
    for status, stderr in answers:
        assert status == 2
        assert f"--save {run}: iter_0000004 could not be written" in stderr
        assert f"the newest checkpoint is {run}/iter_0000003" in stderr
        assert len(stderr.splitlines()) == 1
    after = content_of(run)
    events = [path for path in after if "tensorboard" in path.parts]
    changed = {path for path in after if after[path] != before.get(path)} - set(events)
    assert changed == {run / "metrics.jsonl"}
    assert not list(run.glob("*.partial"))
    assert not (run / LOCK_FILE).exists()
    convert = ["--load", str(run), "--save-hf", str(tmp_path / "hf")]
    status, stderr = ranks(1).run(run_tool_on_a_full_disk, "convert", convert)[0]
    assert status == 2
    assert f"--save-hf {tmp_path}/hf: could not be written" in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@contextlib.contextmanager
def export_that_fails() -> Iterator[None]:
    """On a rank: a write that fails in the export alone."""
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    with mock.patch("megatron_tw.model.build.save_file", side_effect=error):
        yield


def run_tool_that_cannot_export(tool: str, argv: list[str], current: Path) -> tuple[int, str]:
    with export_that_fails(), contextlib.chdir(current):
        return run_tool(tool, argv)


def test_an_export_that_fails_can_be_made_later(world, ranks, tmp_path):
    current = tmp_path / "current"
    current.mkdir()
    (tmp_path / "hf_elsewhere.checkpoint").touch()  # so that nothing can be kept there
    for name, save in (("with", ["--save", str(tmp_path / "run")]), ("without", []), ("elsewhere", [])):
        target = tmp_path / f"hf_{name}"
        argv = arguments(world, *save, "--save-hf", str(target))
        status, stderr = ranks(1).run(run_tool_that_cannot_export, "train", argv, current)[0]
        assert status == 2
        assert f"--save-hf {target}: could not be written" in stderr
        assert "No space left" in stderr
        command = stderr.split("export them with: ")[1].split()
        assert command[:2] == ["python", "tools/convert_checkpoint.py"]
        assert not target.exists()
        status, stderr = ranks(1).run(run_tool, "convert", command[2:])[0]
        assert (status, stderr) == (0, "")
        assert (target / "model.safetensors").is_file()
    assert (current / "hf_elsewhere.checkpoint").is_dir()


def test_an_export_that_cannot_be_written_is_refused_before_the_first_step(world, ranks, tmp_path):
    (tmp_path / "file").touch()
    save = ["--save", str(tmp_path / "run")]
    below_a_file = arguments(world, *save, "--save-hf", str(tmp_path / "file" / "hf"))
    status, stderr = ranks(1).run(run_tool, "train", below_a_file)[0]
    assert status == 2
    assert f"--save-hf {tmp_path}/file/hf: cannot be written to" in stderr
    elsewhere = arguments(world, *save, "--save-hf", str(tmp_path / "hf"))
    status, stderr = ranks(1).run(run_tool_without_space, "train", elsewhere)[0]
    assert status == 2
    assert "of free space for a checkpoint, got 0 GiB" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def run_tool_without_space(tool: str, argv: list[str]) -> tuple[int, str]:
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=0)):
        return run_tool(tool, argv)


def run_tool_with_umask(umask: int, tool: str, argv: list[str]) -> tuple[int, str]:
    before = os.umask(umask)
    try:
        return run_tool(tool, argv)
    finally:
        os.umask(before)


def test_an_exports_files_have_the_umasks_mode(three, ranks, tmp_path):
    for umask in (0o022, 0o007):
        folder = tmp_path / f"{umask:o}"
        argv = ["--load", str(three), "--save-hf", str(folder)]
        assert ranks(1).run(run_tool_with_umask, umask, "convert", argv)[0] == (0, "")
        for file in ("model.safetensors", "config.json"):
            assert stat.S_IMODE((folder / file).stat().st_mode) == 0o666 & ~umask, file


def test_two_runs_do_not_share_a_folder(world, ranks, tmp_path):
    for option, held in (("--save", tmp_path / "out"), ("--save-hf", tmp_path / "out.partial")):
        lock = FolderLock(held, option)
        lock.acquire()
        argv = arguments(world, option, str(tmp_path / "out"), "--global-batch-size", "2")
        for status, stderr in ranks(2).run(run_tool, "train", argv):
            assert status == 2
            assert f"{option} {tmp_path}/out: in use by another run, process {os.getpid()} on " in stderr
            assert len(stderr.splitlines()) == 1
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_files_are_dealt_out_by_their_sizes():
    assert deal_out({}, 2) == [[], []]
    sizes = {f"{i:02d}": 2**i for i in range(12)}
    sums = [sum(sizes[name] for name in share) for share in deal_out(sizes, 3)]
    assert sum(sums) == 2**12 - 1
    assert max(sums) == 2**11
