"""Import floors: a file imports its own folder and lower floors, never up or sideways. Read from the sources, nothing
is imported.

Also: only tools/, examples/ and what `python -m` starts read sys.argv, optional dependencies are imported inside
functions only, and in `objective` and below the floor of `parallel` nothing knows Megatron except for the indexed
dataset format.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_tw"
FLOORS = {
    "config": 0,
    "weighting": 1,
    "losses": 1,
    "data": 1,
    "objective": 2,
    "parallel": 2,
    "model": 3,
    "runtime": 4,
    "programs": 5,
    "evaluation": 5,
    "training": 6,
    "integrations": 7,
    "planning": 7,
}
OPTIONAL = {"transformer_engine", "apex", "wandb", "lm_eval", "datasets", "triton"}
INDEXED_DATASET = "megatron.core.datasets.indexed_dataset"


def violations(root: Path) -> list[str]:
    """`file:line: what is wrong` for each broken rule in the sources under `root`."""
    found = []
    for folder in (PACKAGE, "tools", "examples"):
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            relative = path.relative_to(root)
            for line, message in _broken_rules(relative.parts, tree):
                found.append(f"{relative}:{line}: {message}")
    return found


def _broken_rules(parts: tuple[str, ...], tree: ast.Module) -> Iterator[tuple[int, str]]:
    for statement in _at_import_time(tree):
        for name in _imported(statement, parts):
            if name.split(".")[0] in OPTIONAL:
                yield statement.lineno, f"optional {name} is imported at the top of a module"
    if parts[0] != PACKAGE:
        return
    own = parts[1] if len(parts) > 2 else None  # None: megatron_tw/__init__.py, below all floors
    if own is not None and own not in FLOORS:
        yield 1, f"folder {own} is on no floor"
        return
    floor = FLOORS[own] if own is not None else -1
    for node in _all_but_lazy_names(tree) if own is None else ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                for name in _imported(node, parts):
                    if complaint := _off_limits(name, own, floor):
                        yield node.lineno, f"{own or PACKAGE} imports {name}: {complaint}"
            case ast.Attribute(attr="argv") if parts[-1] != "__main__.py":
                yield node.lineno, "reads sys.argv"
            case ast.Call(func=ast.Attribute(attr="parse_args"), args=[], keywords=[]):
                yield node.lineno, "parse_args() without arguments reads sys.argv"


def _all_but_lazy_names(tree: ast.Module) -> Iterator[ast.AST]:
    """Without what megatron_tw/__init__.py imports for type checkers only: names that it imports when asked for."""
    for statement in tree.body:
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"):
            yield from ast.walk(statement)


def _off_limits(name: str, own: str | None, floor: int) -> str | None:
    """Why a file of folder `own` may not import `name`; None if it may."""
    top, _, rest = name.partition(".")
    below = floor < FLOORS["parallel"] or own == "objective"
    if top == "megatron" and below and not (own == "data" and name.startswith(INDEXED_DATASET)):
        return "nothing below parallel, nor objective, knows Megatron"
    other = rest.split(".")[0]
    if top == PACKAGE and other and other != own and not other.startswith("__"):
        return None if FLOORS.get(other, len(FLOORS)) < floor else "not a lower floor"
    return None


def _at_import_time(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported: not those of functions, nor those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from _at_import_time(child)


def _imported(node: ast.AST, parts: tuple[str, ...]) -> list[str]:
    """Full names that an import statement of the file at `parts` names; `from a import b` names a.b, which b may be a
    module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = list(parts[:-1])[: len(parts) - node.level] if node.level else []
    base = ".".join([*package, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def test_this_project_keeps_its_floors() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("weighting/a.py", "from megatron_tw.model import build", "weighting imports megatron_tw.model.build: not a"),
        ("weighting/a.py", "import megatron_tw.losses.nll", "weighting imports megatron_tw.losses.nll: not a lower"),
        ("weighting/a.py", "from megatron_tw import training", "weighting imports megatron_tw.training: not a lower"),
        ("model/a.py", "def f():\n    import megatron_tw.runtime", ":2: model imports megatron_tw.runtime: not a"),
        ("model/a.py", "from ..runtime.setup import x", "model imports megatron_tw.runtime.setup.x: not a lower floor"),
        ("model/a.py", "from .. import runtime", "model imports megatron_tw.runtime: not a lower floor"),
        ("model/deep/a.py", "from ...runtime import x", "model imports megatron_tw.runtime.x: not a lower floor"),
        ("model/a.py", "import megatron_tw.attic.x", "model imports megatron_tw.attic.x: not a lower floor"),
        (
            "__init__.py",
            "from megatron_tw.config import x",
            "megatron_tw imports megatron_tw.config.x: not a lower floor",
        ),
        ("attic/a.py", "", "folder attic is on no floor"),
        ("config/a.py", "import sys\nprint(sys.argv)", ":2: reads sys.argv"),
        ("config/a.py", "parser.parse_args()", "parse_args() without arguments reads sys.argv"),
        ("runtime/a.py", "import wandb", "optional wandb is imported at the top of a module"),
        ("model/a.py", "try:\n    import apex.x\nexcept E:\n    pass", ":2: optional apex.x is imported at the top"),
        ("model/a.py", "class A:\n    import triton", ":2: optional triton is imported at the top"),
        ("../tools/a.py", "from datasets import load", "tools/a.py:1: optional datasets.load is imported at the top"),
        ("losses/a.py", "from megatron.core import tensor_parallel", "losses imports megatron.core.tensor_parallel"),
        ("objective/a.py", "import megatron.core", "objective imports megatron.core: nothing below parallel, nor"),
        ("objective/a.py", "from megatron_tw.parallel import layout", "imports megatron_tw.parallel.layout: not a"),
        ("weighting/a.py", f"from {INDEXED_DATASET} import IndexedDataset", "weighting imports megatron.core.datasets"),
    ],
)
def test_each_rule_can_be_broken(tmp_path: Path, path: str, source: str, message: str) -> None:
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / PACKAGE).mkdir(exist_ok=True)
    file.resolve().write_text(source)
    (found,) = violations(tmp_path)
    assert message in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/a.py", "from megatron_tw.parallel.layout import x\nfrom megatron_tw.model import b\nfrom . import c"),
        ("model/a.py", "from megatron_tw import __version__"),
        ("model/a.py", "def f():\n    import transformer_engine"),
        ("model/a.py", "if TYPE_CHECKING:\n    import transformer_engine"),
        ("parallel/a.py", "from megatron.core import parallel_state"),
        ("data/a.py", f"from {INDEXED_DATASET} import IndexedDataset"),
        ("integrations/a/__main__.py", "import sys\nprint(sys.argv)"),
        ("../tools/a.py", "import sys\nfrom megatron_tw.training import loop\nprint(sys.argv)"),
        ("config/a.py", "parser.parse_args(argv)"),
        ("__init__.py", "if TYPE_CHECKING:\n    from megatron_tw.losses import x"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    file = (tmp_path / PACKAGE / path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert violations(tmp_path) == []
