"""Every family's model equals transformers' under the layouts, and goes in and out bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model import read_tensors, whole_logits
from tiny import VOCAB, Axes, layout_of, load_tiny, make_folder, reference_rows

from megatron_tw.model import families
from megatron_tw.model.build import save_hf
from megatron_tw.model.families import known_families
from megatron_tw.model.forward import long_nll

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "phi-yarn": ("phi", {"rope_parameters": YARN}),
    "phi-tied": ("phi", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
}
# Which models a layout has in the ordinary suite; with --full every layout has all of them.
ORDINARY = {
    Axes(tp=2): ("qwen2", "qwen3", "phi"),
    Axes(pp=2, vpp_layers=1): ("mistral", "qwen3-yarn", "phi-tied"),
    Axes(cp=2): ("mistral", "qwen2-untied", "phi-yarn"),
}
FULL = [Axes(), Axes(tp=2), Axes(pp=2), Axes(cp=2), Axes(tp=2, cp=2), Axes(pp=2, vpp_layers=1), Axes(tp=4)]
LAYOUTS = [pytest.param(axes, names, id=axes.name) for axes, names in ORDINARY.items()] + [
    pytest.param(axes, tuple(MODELS), id=f"{axes.name}-all", marks=pytest.mark.full) for axes in FULL
]


def rows() -> torch.Tensor:
    return torch.from_numpy(reference_rows()[:2]).long()


def there_and_back(axes: Axes, folders: list[Path], target: Path, code: str = ""):
    """On a rank: logits and long NLL of each model, which is exported too, for a context of 1024. code: run before."""
    exec(compile(code, "docs/extending.md", "exec"), {"__name__": "own_family"})
    found = []
    with layout_of(axes) as layout:
        for folder in folders:
            architecture, chunks = load_tiny(axes, layout, folder)
            logits = whole_logits(chunks, rows(), layout)
            nll = long_nll(chunks, rows(), layout, micro_batch_size=1)
            save_hf(chunks, target / folder.name, architecture, layout, max_position_embeddings=1024)
            found.append((logits, nll))
    return found


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(rows()).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: make_folder(family, folder / name, **changes) for name, (family, changes) in MODELS.items()}


def check(name: str, folder: Path, export: Path, answers: list) -> None:
    """Logits and NLLs of all ranks that have some, and the exported folder, against transformers."""
    expected = transformers_logits(folder)
    nll = torch.nn.functional.cross_entropy(expected[:, :-1].transpose(1, 2), rows()[:, 1:], reduction="none")
    for logits, long in answers:
        np.testing.assert_allclose(logits[..., :VOCAB], expected, atol=5e-5, rtol=0, err_msg=name)
        np.testing.assert_allclose(long, nll, atol=5e-5, rtol=0, err_msg=name)
    before, after = read_tensors(folder), read_tensors(export)
    assert before.keys() == after.keys(), name
    for tensor, values in before.items():
        assert torch.equal(values, after[tensor]), f"{name}: {tensor}"
    torch.testing.assert_close(transformers_logits(export), expected, atol=0, rtol=0)
    config = json.loads((export / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert [config[key] for key in ("model_type", "architectures")] == [
        original[key] for key in ("model_type", "architectures")
    ]


@pytest.mark.parametrize(("axes", "names"), LAYOUTS)
def test_logits_equal_transformers_and_exports_are_bit_exact(axes, names, folders, ranks, tmp_path):
    by_rank = ranks(axes.world_size).run(there_and_back, axes, [folders[name] for name in names], tmp_path)
    for number, name in enumerate(names):
        answers = [found[number] for found in by_rank if found[number][0] is not None]
        assert len(answers) == axes.world_size // axes.pp
        check(name, folders[name], tmp_path / name, answers)


def test_a_family_in_a_few_lines(ranks, tmp_path):
    """As docs/extending.md adds it."""
    section = (Path(__file__).parents[1] / "docs" / "extending.md").read_text().split("## A model family")[1]
    code = section.split("```python")[1].split("```")[0]
    folder = make_folder("arcee", tmp_path / "arcee")
    pool = ranks(2)
    try:
        by_rank = pool.run(there_and_back, Axes(tp=2), [folder], tmp_path / "out", code)
    finally:
        pool.run(forget, "arcee")
    check("arcee", folder, tmp_path / "out" / "arcee", [found[0] for found in by_rank])


def forget(model_type: str) -> None:
    """On a rank: as if the family had not been registered."""
    families._FAMILIES.pop(model_type, None)


def test_these_are_all_families():
    assert known_families() == tuple(sorted(FAMILIES))
