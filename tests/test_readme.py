"""The commands in README.md and docs/: those for two CPU ranks are run (with --full), the options of all
are read by the program's own parser, and checked."""

import argparse
import importlib
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
from megatron_tw.config.arguments import ToolParser
from megatron_tw.config.conversion import ConversionConfig, check_conversion
from megatron_tw.config.evaluation import EvaluationConfig, check_evaluation
from megatron_tw.config.plan import PlanConfig, check_plan
from megatron_tw.config.scoring import ScoringConfig, check_scoring
from megatron_tw.integrations.megatron_lm.options import add_arguments, options_from

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


PROGRAM = re.compile(r"(tools|examples)/.*\.(py|sh)$")
PLUG_IN = "megatron_tw.integrations.megatron_lm"
FOR_READERS = {"N": "32768", "n": "8192", "s": "6144", "W": "2"}
"""Letters that stand for numbers in the pages."""


def lines_of(page: Path) -> list[str]:
    """What may be a command: lines of blocks of bash or without a language, of indented ones, and code in the text."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fence.findall(text) if language in ("", "bash")]
    text = fence.sub("", text)
    blocks += ["".join(re.findall(r"^    .*\n", text, re.MULTILINE))]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", text)]


def commands() -> list[tuple[int | None, str, list[str]]]:
    """Ranks, program and options of every command of this project in the pages. Where they leave out options
    (`OPTIONS`, `...`) there are three points. Ranks are None where the machine decides."""
    found = []
    for line in (line for page in PAGES for line in lines_of(page)):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # no command
            continue
        words = words[: words.index(">")] if ">" in words else words
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if not words or not (words[0] in ("python", "torchrun", "bash", "sbatch", "srun") or PROGRAM.match(words[0])):
            continue
        places = [place for place, word in enumerate(words) if PROGRAM.match(word)]
        if "-m" in words:
            places = [words.index("-m") + 1]
        if not places or words == [words[places[0]]]:  # a script's name in the text
            continue
        ranks: int | None = 1
        if "--nproc-per-node" in words:
            ranks = int(words[words.index("--nproc-per-node") + 1])
            ranks *= int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        elif words[0] in ("bash", "sbatch", "srun"):
            ranks = None
        for place in places[:-1]:  # that start another: examples/slurm.sh
            assert (ROOT / words[place]).is_file(), line
        options = [re.sub(r"^\[|\]$", "", word) for word in words[places[-1] + 1 :]]
        options = ["..." if word == "OPTIONS" else FOR_READERS.get(word, word) for word in options]
        if (ranks, words[places[-1]], options) not in found:
            found.append((ranks, words[places[-1]], options))
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
    "tools/convert_checkpoint.py": (ConversionConfig, check_conversion),
    "tools/plan.py": (PlanConfig, lambda config, ranks: check_plan(config)),
}
LEFT_OUT = {
    "tools/train.py": (
        "--load-hf MODEL",
        "--data-path ROWS",
        "--save RUN",
        "--seq-length 32768",
        "--train-iters 1",
        "--short-window 8192",
    ),
    "tools/evaluate.py": ("--load-hf MODEL", "--short-window 8192", "--output DIR"),
}
"""Options of commands that leave some out; of a recipe's the first three."""
STARTS = {"tools/gpu_check.sh": "tools/benchmarks/gpu_check.py"}
"""Scripts that hand all their options on."""
WITHOUT_PARSER = {
    "tools/list_options.py": r"",
    "tools/draw_method.py": r"docs",
    "tools/test_versions.sh": r"(--stacks|(\d+\.\d+\.\d+ ?)*)",
    "tools/test.sh": r"(--full|--core)?( ?tests/test_\w+\.py)?( -k .*)?",
    "examples/quickstart.sh": r"(--short)?",
}
"""What may follow them."""


class Parsed(Exception):  # noqa: N818
    """The options were right, and the program is to do no more."""


def parse_by_its_own_parser(program: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program's `main` as far as to its options."""

    def stop_after(own: Callable) -> Callable:
        def parse(parser: argparse.ArgumentParser, argv: list[str]) -> None:
            own(parser, argv)
            raise Parsed

        return parse

    folder, _, name = program.removesuffix(".py").rpartition("/")
    monkeypatch.syspath_prepend(ROOT / folder)
    module = importlib.import_module(f"tools.{name}" if folder == "tools" else name)  # as other tests name them
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(ToolParser, "parse", stop_after(ToolParser.parse))
    with pytest.raises(Parsed):
        module.main(options)


@pytest.mark.parametrize(("ranks", "program", "options"), commands(), ids=lambda value: str(value)[:60])
def test_the_options_of_every_command_are_right(
    ranks: int | None, program: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if program == "pytest":
        assert all((ROOT / word).is_file() for word in options if word.endswith(".py"))
        return
    if program == PLUG_IN:
        check_plug_in(options)
        return
    assert (ROOT / program).is_file()
    if program == "examples/launch.sh":  # RECIPE.yaml OPTIONS
        recipes = sorted(ROOT.glob(options[0].replace("NAME", "*")))
        assert recipes
        for recipe in recipes:
            check_config(parse_options(["--config", str(recipe), *options[1:]], RunConfig), ranks)
        return
    if (recipe := (ROOT / program).with_suffix(".yaml")).is_file():
        program, options = "tools/train.py", ["--config", str(recipe), *options]
    if program in SCHEMAS:
        schema, check = SCHEMAS[program]
        if "..." in options:
            left_out = map(str.split, LEFT_OUT[program][: 3 if "--config" in options else None])
            options = [option for option in options if option != "..."]
            options += [word for words in left_out if words[0] not in options for word in words]
        check(parse_options(without_made_files(options), schema), ranks)
    elif program in WITHOUT_PARSER:
        assert re.fullmatch(WITHOUT_PARSER[program], " ".join(options)), options
        assert all((ROOT / word).is_file() for word in options if word.endswith(".py"))
    else:
        parse_by_its_own_parser(STARTS.get(program, program), options, monkeypatch)


def check_plug_in(options: list[str]) -> None:
    """The launcher's line: a script and Megatron-LM's own arguments, among them this project's options."""
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known, others = parser.parse_known_args(options)
    weighting = options_from(known)
    assert weighting is not None
    weighting.check(32768)
    of_megatron = ["--calculate-per-token-loss", "--no-create-attention-mask-in-dataloader"]
    assert others in (["pretrain_gpt.py", "ARGUMENTS", *of_megatron], ["pretrain_gpt.py", "ARGUMENTS"])


def test_a_wrong_option_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parse_by_its_own_parser("tools/benchmarks/loss.py", ["--outputs", "DIR"], monkeypatch)
    with pytest.raises(ValueError, match="unknown option --no-such"):
        parse_options(["--no-such"], PlanConfig)


def test_the_commands_are_found() -> None:
    programs = [program for _, program, _ in commands()]
    assert len(programs) >= 50
    assert programs.count(RECIPE) >= 4
    tools = {"preprocess_data", "report", "draw_heat_map", "list_options", "draw_method"}
    assert {*SCHEMAS, *STARTS, *WITHOUT_PARSER, PLUG_IN, *(f"tools/{name}.py" for name in tools)} <= set(programs)
    benchmarks = {Path(program).stem for program in programs if program.startswith("tools/benchmarks/")}
    assert benchmarks >= {"bottom_right", "checkpoint", "faults", "first_extension", "hf_trainer", "layers",
                          "long_range_recall", "loss", "preprocess", "step"}  # fmt: skip
