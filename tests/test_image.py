"""The requirements that the Dockerfile makes resolve: an actual resolution, in a virtual environment that holds
metadata-only wheels in place of the image's GPU stack, and of packages that are older there than constraints.txt's."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGE = {
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


@pytest.mark.full  # asks the package index about every dependency
def test_what_the_dockerfile_asks_for_resolves(tmp_path):
    environment = tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    wheels = [str(stub_wheel(tmp_path, name, *what)) for name, what in IMAGE.items()]
    subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", *wheels], check=True)

    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    script = ["bash", str(ROOT / "tools" / "image_constraints.sh")]
    environ = {**os.environ, "PATH": path, "MEGATRON_CORE": "0.16.1"}
    constraints = subprocess.run(script, env=environ, check=True, capture_output=True, text=True)
    names = constraints.stdout.splitlines()
    assert "torch==2.10.0a0+b4e4ee81d3.nv25.12" in names
    assert "transformer-engine==2.10.0" in names
    assert "numpy==2.1.0" in names
    assert not any(line.startswith(("torch==2.13", "idna==3.10", "click==8.1")) for line in names)
    (tmp_path / "constraints.txt").write_text(constraints.stdout)

    command = [python, "-m", "pip", "install", "--dry-run", "-c", str(tmp_path / "constraints.txt"), f"{ROOT}[all,dev]"]
    resolved = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert resolved.returncode == 0, resolved.stderr
    would_install = resolved.stdout.rpartition("Would install")[2].lower().split()
    assert any(name.startswith("megatron-core-0.16") for name in would_install), resolved.stdout
    assert not any(name.startswith(("torch-", "triton-", "numpy-", "nvidia-")) for name in would_install)
