"""The commands in README.md and docs/: those for two CPU ranks are run, the options of the others are read and
checked."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_data_tokenizer import TEXT
from test_launch import ROOT, environment
from tiny import TINY_LLAMA, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_tw.config import RunConfig, check_config, parse_options
from megatron_tw.config.evaluation import EvaluationConfig, check_evaluation
from megatron_tw.config.scoring import ScoringConfig, check_scoring
from tools import preprocess_data

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]
(TWO_RANKS,) = [block for block in BLOCKS if "--nproc-per-node 2 tools/train.py" in block]
RECIPE = "examples/extend_llama3_32k.sh"


def add_tokenizer(model: Path) -> None:
    """One with the model's number of tokens, and its BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(model)


@pytest.mark.full
def test_from_documents_to_the_report_on_two_ranks(tmp_path: Path) -> None:
    shutil.copytree(TINY_LLAMA, tmp_path / "small")
    add_tokenizer(tmp_path / "small")
    for folder, text in (("books", TEXT[:15_000]), ("other_books", TEXT[15_000:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text(text)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    run = subprocess.run(
        ["bash", "-ec", TWO_RANKS],
        env=environment(PET_STANDALONE="1"),  # a port of its own
        cwd=tmp_path,
        timeout=500,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Traceback" not in run.stderr
    assert "Warning" not in run.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    nlls = {model["name"]: model["all"]["nll"] for model in report["models"]}
    assert list(nlls) == ["base", "dense"]
    assert nlls["dense"] < nlls["base"] - 0.1  # it has seen such text
    assert f"{nlls['dense']:.4f}" in run.stdout
    evaluated = np.load(tmp_path / "dense" / "nll.npz")["long_nll"]
    assert np.isclose(evaluated.mean(dtype=np.float64), nlls["dense"])
    assert {"config.json", "model.safetensors", "tokenizer.json", "checksums.json"} <= set(
        os.listdir(tmp_path / "extended")
    )
    assert '<svg class="figure"' in (tmp_path / "report" / "report.html").read_text()


def commands() -> list[tuple[int, str, list[str]]]:
    """Ranks, script and options of every command of this project, but for those that only stand for options."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        scripts = [place for place, word in enumerate(words) if re.match(r"(tools|examples)/.*\.(py|sh)$", word)]
        if scripts and words[-1] != "OPTIONS" and words[0] in ("python", "torchrun"):
            ranks = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
            found.append((ranks, words[scripts[0]], words[scripts[0] + 1 :]))
    return found


def without_made_files(options: list[str]) -> list[str]:
    """Options without the `--config FILE` that an earlier command of the pages writes into its --output."""
    outputs = {made[made.index("--output") + 1] for _, _, made in commands() if "--output" in made}
    kept: list[str] = []
    for option in options:
        if kept and kept[-1] == "--config" and not (ROOT / option).exists():
            assert str(Path(option).parent) in outputs, option
            kept.pop()
        else:
            kept.append(option)
    return kept


SCHEMAS: dict[str, tuple[type, Callable]] = {
    "tools/train.py": (RunConfig, check_config),
    "tools/evaluate.py": (EvaluationConfig, check_evaluation),
    "tools/score_tokens.py": (ScoringConfig, check_scoring),
}


@pytest.mark.parametrize(("ranks", "script", "options"), commands(), ids=lambda value: str(value)[:60])
def test_the_options_of_every_command_are_right(ranks: int, script: str, options: list[str]) -> None:
    assert (ROOT / script).is_file()
    if script == RECIPE:
        script, options = "tools/train.py", ["--config", str((ROOT / RECIPE).with_suffix(".yaml")), *options]
    if script in SCHEMAS:
        schema, check = SCHEMAS[script]
        check(parse_options(without_made_files(options), schema), ranks)
    elif script == "tools/preprocess_data.py":
        preprocess_data.build_parser().parse(options)


def test_the_commands_are_found() -> None:
    scripts = [script for _, script, _ in commands()]
    assert len(scripts) >= 12
    assert scripts.count(RECIPE) >= 2
    assert {*SCHEMAS, "tools/preprocess_data.py", "tools/convert_checkpoint.py", "tools/report.py"} <= set(scripts)
