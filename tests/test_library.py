"""The library by itself: what an import brings, which names there are, and errors that speak of arguments."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_tw
from megatron_tw import objective

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("weighting", "losses", "objective")


def after(statement: str) -> tuple[set[str], set[str]]:
    """Packages that a fresh process has imported after a statement, but for Python's own, and its warning filters."""
    code = f"""
import json, sys, warnings
{statement}
packages = {{name.split(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)
print(json.dumps([sorted(packages), sorted(map(repr, warnings.filters))]))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    packages, filters = json.loads(run.stdout)
    return set(packages), set(filters)


def test_an_import_brings_torch_and_no_more() -> None:
    """Neither Megatron-Core nor transformers, nor what programs read options with; and warnings are left alone."""
    nothing, torch = after("pass"), after("import torch, numpy")
    packages, filters = after("import megatron_tw; dir(megatron_tw); megatron_tw.__version__")
    assert packages - nothing[0] == {"megatron_tw"}
    assert filters == nothing[1]
    packages, filters = after(
        "from megatron_tw import *; from megatron_tw.weighting import *; from megatron_tw.losses import *; "
        "from megatron_tw.objective import *"
    )
    assert packages - torch[0] == {"megatron_tw"}
    assert filters == torch[1]


@pytest.mark.parametrize("module", [megatron_tw, objective])
def test_names_are_those_of_the_type_checker(module) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    checked = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    names = [name for name in checked if name not in ("import_module", "TYPE_CHECKING", "Any")]
    assert sorted(names) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        value = getattr(module, name)
        assert getattr(value, "__name__", name) == name
    with pytest.raises(AttributeError, match="has no attribute 'weighted_los'"):
        module.weighted_los  # noqa: B018


def test_errors_of_the_library_name_no_option() -> None:
    """Programs turn an `argument` into their option (weighting/options.py); nobody else has options."""
    files = [path for folder in LIBRARY for path in (ROOT / "megatron_tw" / folder).rglob("*.py")]
    assert len(files) > 20
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and path.name != "options.py":
                assert "--" not in ast.unparse(node), f"{path}:{node.lineno}"
