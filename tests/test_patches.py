"""The tables of what the integrations rebind: complete, and all of it is given back. (The first table, of modules'
names, is applied and removed in test_megatron_lm.py.)"""

import ast
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_tw.integrations import patches

FOLDER = Path(patches.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


def root_of(node: ast.expr) -> str:
    """The name that an expression such as `a.b[0].c` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def rebound_in(code: str) -> set[str]:
    """What a file sets or deletes on objects that are not its own: attributes, entries of them, hooks, modes."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            of_an_attribute = isinstance(node, ast.Attribute) or isinstance(node.value, ast.Attribute)
            if of_an_attribute and root_of(node) != "self":
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"(^|\.)(__)?(set|del)attr(__)?$|\.register_\w*hook$|^\w+\.eval$", called):
                found.add(called)
    return found


def test_what_is_looked_for_is_found() -> None:
    code = "a.b = 1\ndel a.c\na.d[0] = 2\nfor e.f in g: pass\nsetattr(h, 'i', 3)\nj.register_forward_hook(k)\nl.eval()"
    assert rebound_in(code) == {"a.b", "a.c", "a.d[0]", "e.f", "setattr", "j.register_forward_hook", "l.eval"}
    assert rebound_in("self.a = 1\nself.b[0] = 2\nc['d'] = 3\ne = 4\nf: int = 5") == set()


def test_the_tables_are_complete() -> None:
    """All that any file of the integrations rebinds. patches.py itself does so for the table PATCHES alone."""
    assert len(FILES) > 20
    found = {(str(file.relative_to(FOLDER)), name) for file in FILES for name in rebound_in(file.read_text())}
    assert {name for file, name in found if file == "patches.py"} == {"setattr"}
    found = {pair for pair in found if pair[0] != "patches.py"}
    assert found == {(row.file, row.name) for row in patches.WITHIN_A_CALL}


# ---- given back


def state_of(*objects: Any) -> list[dict[str, Any]]:
    """What stands in objects by name: hooks, parameters and submodules of a module too."""
    return [{name: dict(x) if isinstance(x, dict) else x for name, x in vars(item).items()} for item in objects]


class Chunk(nn.Module):
    """A piece of a model as Megatron has them, of what is touched."""

    def __init__(self) -> None:
        super().__init__()
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        self.post_process = True
        self.output_layer = nn.Linear(8, 16)
        self.rotary_pos_emb = RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
        self.config = SimpleNamespace(timers="the long pass's")

    def compute_language_model_loss(self, labels: Any, logits: Any) -> None: ...


def cases() -> dict[str, tuple[Callable[[], AbstractContextManager[Any]], list[Any]]]:
    """By file: what rebinds there, and the objects that it touches."""
    from megatron_tw.integrations.huggingface.head import _answers_with_nll
    from megatron_tw.integrations.huggingface.scoring import _all_weights_loaded
    from megatron_tw.integrations.megatron_lm.hidden_loss import loss_from_hidden_states
    from megatron_tw.integrations.megatron_lm.own_attention import own_attention_of_rows
    from megatron_tw.integrations.megatron_lm.window_pass import _evaluating

    head, chunk = nn.Linear(8, 16), Chunk()
    touched = [chunk, chunk.output_layer, chunk.rotary_pos_emb, chunk.config]
    return {
        "huggingface/head.py": (lambda: _answers_with_nll(head, torch.zeros(1, 4, dtype=torch.int64)), [head]),
        "huggingface/scoring.py": (_all_weights_loaded, [os.environ]),
        "megatron_lm/hidden_loss.py": (lambda: loss_from_hidden_states([chunk]), touched),
        "megatron_lm/own_attention.py": (lambda: own_attention_of_rows([chunk], None, 4), touched),
        "megatron_lm/window_pass.py": (lambda: _evaluating([chunk]), touched),
    }


@pytest.mark.core
@pytest.mark.parametrize("file", ["huggingface/head.py", "huggingface/scoring.py", "megatron_lm/hidden_loss.py",
                                  "megatron_lm/own_attention.py", "megatron_lm/window_pass.py"])  # fmt: skip
def test_everything_is_given_back(file: str) -> None:
    """After the call and after an exception in it, twice."""
    call, touched = cases()[file]
    before = state_of(*touched)
    for raising in (False, True, False, True):
        try:
            with call():
                assert state_of(*touched) != before
                if raising:
                    raise KeyError("somewhere in the middle")
        except KeyError:
            assert raising
        assert state_of(*touched) == before


def test_the_launcher_gives_back_what_is_pythons(tmp_path: Path) -> None:
    from megatron_tw.integrations.megatron_lm.__main__ import launch

    before = list(sys.argv), list(sys.path)
    for code in ("argv = sys.argv, sys.path[0]", "raise KeyError") * 2:
        script = tmp_path / "script.py"
        script.write_text(f"import sys\n{code}\n")
        if "raise" in code:
            with pytest.raises(KeyError):
                launch([str(script), "--lr", "1"])
        else:
            assert launch([str(script), "--lr", "1"])["argv"] == ([str(script), "--lr", "1"], str(tmp_path))
        assert (sys.argv, sys.path) == before


def test_every_file_of_the_table_is_tried() -> None:
    tried = {*cases(), "megatron_lm/__main__.py"}
    # The Trainer's own step turns training on again: its tests train after every scoring.
    assert {row.file for row in patches.WITHIN_A_CALL} == {*tried, "huggingface/trainer.py"}
