"""The requirements that the Dockerfile makes resolve: an actual resolution, in a virtual environment that holds
metadata-only wheels in place of the image's GPU stack, and of packages that are older there than constraints.txt's."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OLDER_IMAGE = {
    "torch": ("2.10.0a0+b4e4ee81d3.nv25.12", ["filelock", "typing-extensions>=4.10.0", "sympy>=1.13.3", "networkx"]),
    "triton": ("3.5.1", []),
    "transformer_engine": ("2.10.0", ["pydantic", "packaging", "importlib-metadata>=1.0"]),
    "flash_attn": ("2.7.4.post1", ["torch", "einops"]),
    "apex": ("0.1", ["packaging>20.6"]),
    "nvidia_modelopt": ("0.39.0", ["numpy"]),
    "numpy": ("2.1.0", []),
    # Not its GPU stack: older than what constraints.txt names, and free to be replaced.
    "idna": ("3.10", []),
    "click": ("8.1.8", []),
    "packaging": ("25.0", []),
    "protobuf": ("6.31.1", []),
    "typing_extensions": ("4.14.1", []),
    "importlib_metadata": ("8.7.0", []),
    "einops": ("0.8.1", []),
}
"""Name: version and requirements. The GPU stack's versions are NGC PyTorch 25.12's; numpy's is a guess."""
IMAGE = OLDER_IMAGE | {
    "torch": ("2.11.0a0+eb65b36914.nv26.02", OLDER_IMAGE["torch"][1]),
    "triton": ("3.6.0", []),
    "transformer_engine": ("2.12.0", OLDER_IMAGE["transformer_engine"][1]),
    "nvidia_modelopt": ("0.41.0", ["numpy"]),
}
"""Of NGC PyTorch 26.02 torch's version alone is published (docs/versions.md); the others are guesses."""
IMAGES = {"26.02": (IMAGE, "0.19.2"), "25.12": (OLDER_IMAGE, "0.16.1")}
"""Image: its packages, and the Megatron-Core that goes with it; the Dockerfile's first."""


def stub_wheel(folder: Path, name: str, version: str, requirements: list[str]) -> Path:
    """A wheel that holds nothing but its metadata."""
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = [
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {requirement}" for requirement in requirements),
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_the_dockerfile_is_the_first_of_the_images() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    release, (_, megatron_core) = next(iter(IMAGES.items()))
    assert f"\nARG BASE=nvcr.io/nvidia/pytorch:{release}-py3\n" in dockerfile
    assert f"\nARG MEGATRON_CORE={megatron_core}\n" in dockerfile


def test_the_dockerfile_checks_what_it_installed() -> None:
    """In the command that installs, after it: a requirement that is not met, or a module that does not open, ends the
    build."""
    commands = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    (run,) = (command for command in commands if command.startswith("RUN "))
    steps = [step.strip() for step in run.split("&&")]
    install = next(index for index, step in enumerate(steps) if "pip install" in step)
    assert steps[install + 1] == "pip check"
    imported = steps[install + 2].removeprefix('python -c "import ').removesuffix('"').split(", ")
    assert {"torch", "transformer_engine.pytorch", "apex", "megatron.core", "megatron_tw.training.loop"} <= {*imported}


@pytest.mark.full  # asks the package index about every dependency
@pytest.mark.parametrize("release", IMAGES)
def test_what_the_dockerfile_asks_for_resolves(release, tmp_path):
    """On Python 3.12, which both images have."""
    packages, megatron_core = IMAGES[release]
    finder = ["bash", str(ROOT / "tools" / "find_python.sh"), "3.12"]
    found = subprocess.run(finder, check=False, capture_output=True, text=True).stdout.strip()
    if not found:
        pytest.skip("no Python 3.12")
    environment = tmp_path / "image"
    subprocess.run([found, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    wheels = [str(stub_wheel(tmp_path, name, *what)) for name, what in packages.items()]
    subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", *wheels], check=True)

    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    script = ["bash", str(ROOT / "tools" / "image_constraints.sh")]
    environ = {**os.environ, "PATH": path, "MEGATRON_CORE": megatron_core}
    constraints = subprocess.run(script, env=environ, check=True, capture_output=True, text=True)
    names = constraints.stdout.splitlines()
    for name in ("torch", "transformer_engine", "numpy"):
        version = Version(packages[name][0])  # pip prints nv26.02 as nv26.2
        assert f"{name.replace('_', '-')}=={version}" in names
    assert not any(line.startswith(("torch==2.13", "idna==3.10", "click==8.1")) for line in names)
    (tmp_path / "constraints.txt").write_text(constraints.stdout)

    command = [python, "-m", "pip", "install", "--dry-run", "-c", str(tmp_path / "constraints.txt"), f"{ROOT}[all,dev]"]
    resolved = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert resolved.returncode == 0, resolved.stderr
    would_install = resolved.stdout.rpartition("Would install")[2].lower().split()
    assert any(name.startswith(f"megatron-core-{megatron_core}") for name in would_install), resolved.stdout
    assert not any(name.startswith(("torch-", "triton-", "numpy-", "nvidia-")) for name in would_install)
