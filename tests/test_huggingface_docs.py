"""docs/integrations/huggingface.md: its worked example runs, its other blocks are sound; the benchmark at toy size."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

import yaml

from megatron_tw.integrations.huggingface import TokenWeightingConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "integrations" / "huggingface.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def run(folder: Path, *command: str) -> str:
    """What Python prints there, without the launcher's variables of whoever runs the tests."""
    environment = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_worked_example(tmp_path):
    example = tmp_path / "example.py"
    example.write_text(blocks("python")[0])
    metrics = ast.literal_eval(run(tmp_path, str(example)).splitlines()[-1])
    assert set(metrics) == {"loss", "lm_loss", "weight_std", "zero_weight_share"}
    assert metrics["weight_std"] > 0
    assert metrics["loss"] != metrics["lm_loss"]


def test_the_blocks_for_trl_and_axolotl():
    """The class attribute that axolotl's page sets is one that the mixin takes; YAML names the class that is there."""
    trl, axolotl = (ast.parse(block) for block in blocks("python")[1:])
    (names,) = ([node.name for node in page.body if isinstance(node, ast.ClassDef)] for page in (axolotl,))
    (yaml_block,) = blocks("yaml")
    assert yaml.safe_load(yaml_block)["trainer_cls"].split(".")[1:] == names
    (call,) = [node for node in ast.walk(axolotl) if isinstance(node, ast.Call)]
    TokenWeightingConfig(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg})
    assert [node.bases[0].id for node in trl.body if isinstance(node, ast.ClassDef)] == ["TokenWeightingMixin"]  # type: ignore[attr-defined]


def test_every_setting_is_on_the_page():
    table = PAGE.split("## Settings")[1].split("**Rows.**")[0]
    for name in TokenWeightingConfig.__dataclass_fields__:
        assert f"`{name}`" in table, name


@pytest.mark.full
def test_the_benchmark(tmp_path):
    sizes = "--hidden-size 32 --layers 1 --vocab-size 8192 --seq-length 1024 --short-window 256 --repetitions 1"
    printed = run(tmp_path, str(ROOT / "tools" / "benchmarks" / "hf_trainer.py"), *sizes.split())
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if line.count("|") > 2}
    assert float(rows["stock"][1]) == float(rows["stock"][3]) == 1.0
    assert float(rows["dense"][3]) < 0.8, "logits are most of what the stock Trainer holds here"
