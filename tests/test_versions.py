"""Megatron-Core's versions: which are taken, and that a fault of theirs is mended where it is, and once; and the
environment of a version of Python."""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tw.parallel.devices import BROKEN_MEGATRON_CORE, check_megatron_version
from megatron_tw.parallel.mends import mend_bucket_padding, saves_padded_buckets_shifted

ROOT = Path(__file__).resolve().parents[1]
METHOD = "sharded_param_state_fully_reshardable"


pytestmark = pytest.mark.core


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.19.2+d98e8a6", None])
def test_a_known_version_is_taken_silently(version: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.20.0rc0+d98e8a6", "0.20.0", "1.0"])
def test_a_newer_version_is_warned_of_by_one_rank(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(UserWarning, match=r"megatron-core .* is newer than 0\.19\.2"):
        check_megatron_version(version)
    monkeypatch.setenv("RANK", "1")
    test_a_known_version_is_taken_silently(version)


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.16.1rc0", "0.18.0+d98e8a6"])
def test_an_old_or_broken_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BROKEN_MEGATRON_CORE, "0.18.0", "it loses a step")
    why = r" \(it loses a step\)" if "0.18" in version else ""
    with pytest.raises(
        RuntimeError, match=rf"expected version 0\.16\.1 to 0\.19\.2, found {version[:6]}.*{why}\. Inst"
    ):
        check_megatron_version(version)


def test_shifted_parameters_are_found_and_mended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = inspect.unwrap(getattr(DistributedOptimizer, METHOD))
    monkeypatch.setattr(DistributedOptimizer, METHOD, installed)
    faulty = saves_padded_buckets_shifted(DistributedOptimizer)
    mend_bucket_padding()
    mended = getattr(DistributedOptimizer, METHOD)
    assert (mended is not installed) == faulty
    assert not saves_padded_buckets_shifted(DistributedOptimizer)
    mend_bucket_padding()
    assert getattr(DistributedOptimizer, METHOD) is mended


def test_an_optimizer_that_saves_otherwise_is_refused() -> None:
    class Other:
        def sharded_param_state_fully_reshardable(self, *args, **kwargs):
            state = inspect.unwrap(getattr(DistributedOptimizer, METHOD))(self, *args, **kwargs)
            state[0]["param"].data = state[0]["param"].data - 3
            return state

    with pytest.raises(RuntimeError, match=r"saves elements \[\d\.0, \d\.0\] of a buffer"):
        saves_padded_buckets_shifted(Other)


def interpreter(path: Path, version: str) -> Path:
    """What setup_env.sh asks of a Python, answered as one of `version`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    script = f"import sys; sys.version_info = {(*map(int, version.split('.')), 1)}; exec(sys.argv[2])"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{script}' \"$@\"\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("active", "existing", "asked", "expected"),
    [
        (None, None, None, ".venv"),
        (None, None, "3.12", ".venv"),
        (None, "3.11", None, ".venv"),
        (None, "3.11", "3.11", ".venv"),
        (None, "3.11", "3.12", ".venv-3.12"),
        (None, "3.12", "3.11", ".venv-3.11"),
        ("3.11", None, None, "active"),
        ("3.12", "3.11", "3.12", "active"),
        ("3.11", "3.11", "3.13", ".venv-3.13"),
        (None, "3.11", "3.9", ".venv"),  # too old: the error comes when it is to be used
    ],
)
def test_another_interpreter_gets_an_environment_of_its_own(tmp_path: Path, active, existing, asked, expected) -> None:
    environment = {"PATH": os.environ["PATH"]}
    for name, version in ((".venv", existing), ("active", active)):
        if version is not None:
            interpreter(tmp_path / name / "bin" / "python", version)
    if active is not None:
        environment["VIRTUAL_ENV"] = str(tmp_path / "active")
    if asked is not None:
        environment["PYTHON"] = str(interpreter(tmp_path / "asked", asked))
    functions = (ROOT / "tools" / "setup_env.sh").read_text().removesuffix("_tw_setup\n")
    script = f'{functions}\n_tw_is_installed() {{ return 1; }}\n_tw_root="{tmp_path}"\n_tw_environment'
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / expected), done.stderr


def test_what_a_removed_environment_leaves_is_no_installation(tmp_path: Path) -> None:
    """`pip install -e` writes an egg-info into the clone, which Python finds from there."""
    (tmp_path / "megatron_tw.egg-info").mkdir()
    (tmp_path / "megatron_tw.egg-info" / "PKG-INFO").write_text("Name: megatron-tw\nVersion: 1\n")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without installed packages
    python.chmod(0o755)
    functions = (ROOT / "tools" / "setup_env.sh").read_text().removesuffix("_tw_setup\n")
    done = subprocess.run(
        ["bash", "-c", f'{functions}\n_tw_root="{tmp_path}"\n_tw_environment'],
        env={"PATH": f"{python.parent}:{os.environ['PATH']}"}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / ".venv"), done.stderr
