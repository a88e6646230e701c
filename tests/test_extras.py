"""Each extra of pyproject.toml brings what the modules that it is for import: nothing else can be imported here."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIBRARY = ["megatron_tw", "megatron_tw.weighting", "megatron_tw.losses", "megatron_tw.objective"]
PLUG_INS = ["megatron_lm.plug_in", "megatron_lm.spec", "megatron_bridge"]
PROGRAMS = ["megatron_tw.programs.scoring", "megatron_tw.programs.convert"]
MODULES = {
    "": LIBRARY,
    "hf": ["megatron_tw.integrations.huggingface"],
    "megatron": [f"megatron_tw.integrations.{name}" for name in PLUG_INS],
    "data": ["megatron_tw.data.prepare", "tools.preprocess_data"],
    "reports": ["tools.report", "megatron_tw.evaluation.report.drawing", "megatron_tw.evaluation.report.figures"],
    "training": ["tools.train", "megatron_tw.training.loop", *PROGRAMS],
    "eval": ["tools.evaluate", "megatron_tw.evaluation.program", "megatron_tw.evaluation.harness.suites"],
    "all": ["tools.plan", "megatron_tw.planning.run", "megatron_tw.planning.picture"],
}  # fmt: skip
"""By extra, what it is for; without a name, what is installed without one."""
FOLDERS = {
    "": ["weighting", "losses", "objective"],
    "hf": ["integrations/huggingface"],
    "megatron": ["integrations/megatron_lm", "integrations/megatron_bridge"],
    "data": ["data"],
    "reports": ["evaluation/report"],
    "training": ["training", "runtime", "model", "parallel", "programs"],
    "eval": ["evaluation/harness", "evaluation/ruler"],
    "all": ["planning"],
}
"""By extra, the folders all of whose imports it must bring, those inside of functions too."""
NOT_FOR_USERS = {"dev", "gpu"}
"""dev is for tools/test.sh; Transformer Engine, which is gpu, needs a GPU."""
OPTIONAL = {"apex", "fused_weight_gradient_mlp_cuda", "transformer_engine", "triton", "wandb", "longppl", "flash_attn"}
"""Used where they are installed, or asked for by an option that says so."""
OF_SETUPTOOLS = {"autocommand", "backports", "inflect", "jaraco", "more_itertools", "typeguard"}
"""It brings copies of its own, which stand last on the path. Torch may import setuptools."""
SLOW = ("", "megatron", "reports", "training", "eval", "all")
"""Tested with --full only. That nothing more than torch is imported without an extra, test_library.py tests always."""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> list[str]:
    """Of a distribution; this project's are those of pyproject.toml, however old its installation is."""
    if name != "megatron-tw":
        return metadata.requires(name) or []
    extras = PROJECT["optional-dependencies"]
    of_extras = [(extra, text) for extra in extras for text in extras[extra]]
    return [
        *PROJECT["dependencies"],
        *(f"{text}{' and' if ';' in text else ' ;'} extra == '{extra}'" for extra, text in of_extras),
    ]


def brought_by(extra: str) -> set[str]:
    """All distributions that an installation of this project with the extra brings."""
    found: set[tuple[str, str]] = set()
    to_do = [("megatron-tw", ""), ("megatron-tw", extra)]
    while to_do:
        asked = to_do.pop()
        if asked in found:
            continue
        found.add(asked)
        try:
            texts = requirements(asked[0])
        except metadata.PackageNotFoundError:
            continue  # of another system, or not installed here: then its import fails
        for requirement in map(Requirement, texts):
            if requirement.marker is None or requirement.marker.evaluate({"extra": asked[1]}):
                name = plain(requirement.name)
                to_do += [(name, extra_of_it) for extra_of_it in ("", *requirement.extras)]
    return {name for name, _ in found}


@functools.cache
def top_level_names() -> Mapping[str, list[str]]:
    """What can be imported here, and which distributions it is of."""
    return metadata.packages_distributions()


def refused_by(extra: str) -> set[str]:
    """Top-level names of what is installed here and not brought by the extra."""
    brought = brought_by(extra)
    owned = top_level_names().items()
    return {name for name, owners in owned if not brought & set(map(plain, owners))} - OF_SETUPTOOLS - {"megatron_tw"}


IMPORT = """
import importlib, json, sys

refused, modules = json.loads(sys.argv[1])


class Without:  # what is refused is not there, neither to import nor to look for
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


for name in [name for name in sys.modules if name.partition(".")[0] in refused]:
    del sys.modules[name]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
for module in modules:
    importlib.import_module(module)
"""


def test_every_extra_is_tested() -> None:
    assert {*MODULES} - {""} | NOT_FOR_USERS == {*PROJECT["optional-dependencies"]}
    assert MODULES.keys() == FOLDERS.keys()


def test_what_no_extra_brings_is_refused() -> None:
    """The other tests can fail: of the same modules without the extra, an import does."""
    assert {"pytest", "transformers", "jsonargparse", "megatron"} <= refused_by("")
    assert "transformers" not in refused_by("hf")
    assert {"jsonargparse", "megatron"} <= refused_by("hf")
    run = import_with("", ["transformers"])
    assert "No module named 'transformers'" in run.stderr


def import_with(extra: str, modules: list[str]) -> "subprocess.CompletedProcess[str]":
    argument = json.dumps([sorted(refused_by(extra)), modules])
    return subprocess.run(
        [sys.executable, "-c", IMPORT, argument], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "extra", [pytest.param(extra, marks=pytest.mark.full if extra in SLOW else ()) for extra in MODULES]
)
def test_an_extra_brings_what_its_modules_import(extra: str) -> None:
    run = import_with(extra, MODULES[extra])
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("extra", FOLDERS)
def test_an_extra_brings_what_is_imported_later(extra: str) -> None:
    """Imports inside of functions too, of what is installed here."""
    refused = refused_by(extra) - OPTIONAL
    for folder in FOLDERS[extra]:
        files = sorted((ROOT / "megatron_tw" / folder).rglob("*.py"))
        assert files
        for file in files:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names.append(node.module)
                for name in names:
                    assert name.partition(".")[0] not in refused, f"{file.relative_to(ROOT)}: {name}, not in {extra!r}"
