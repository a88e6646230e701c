"""Options: parsing, the one-line errors, writing and reading back. Their checks: test_config_checks.py."""

import ast
import dataclasses
import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import megatron_tw.config.errors as errors
from megatron_tw.config import (
    ParallelConfig,
    RunConfig,
    differences,
    load_config,
    load_options,
    parse_options,
    save_config,
    user_errors,
)
from megatron_tw.config.conversion import ConversionConfig
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.config.options import groups_of
from megatron_tw.config.scoring import ScoringConfig
from megatron_tw.weighting import parse_schedule

REQUIRED = ["--data-path", "rows", "--seq-length", "256", "--train-iters", "3", "--load-hf", "model"]


def parse(*arguments: str) -> RunConfig:
    return parse_options([*REQUIRED, *arguments], RunConfig)


def write(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- parsing ----


def test_flags_set_fields_of_every_type() -> None:
    config = parse(
        *("--lr", "2e-5", "--bf16", "--no-shuffle", "--no-sequence-parallel", "--lr-decay-style", "cosine"),
        *("--rotary-base", "15300000", "--hierarchical-context-parallel-sizes", "2", "4", "--save", "a b"),
    )
    assert config.optimizer.lr == 2e-5
    assert config.compute.bf16 is True
    assert config.data.shuffle is False
    assert config.parallel.sequence_parallel is False
    assert config.optimizer.lr_decay_style == "cosine"
    assert config.model.rotary_base == 15300000.0
    assert config.parallel.hierarchical_context_parallel_sizes == (2, 4)
    assert config.checkpoint.save == "a b"
    assert config.train.global_batch_size is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--transforms", "minus", "shift 2.0", "max"],
        ["--transforms", "minus,shift 2.0,max"],
        ["--transforms=minus,shift 2.0,max"],
        ["--transforms", '["minus", "shift 2.0", "max"]'],
    ],
)
def test_lists_take_spaces_commas_and_brackets(arguments: list[str]) -> None:
    assert parse(*arguments, "--bf16").weighting.transforms == ("minus", "shift 2.0", "max")


def test_flags_win_over_the_file_in_any_position(tmp_path: Path) -> None:
    file = write(tmp_path, "seq_length: 512\nlr: 3e-4\nbf16: true\nsave_interval: 7\ntransforms: [minus, shift 2.0]\n")
    for arguments in (["--config", file, "--lr", "1e-3"], ["--lr", "1e-3", f"--config={file}"]):
        config = parse_options(
            ["--data-path", "d", "--train-iters", "1", *arguments, "--no-bf16", "--save-interval", "null"], RunConfig
        )
        assert (config.data.seq_length, config.optimizer.lr) == (512, 1e-3)
        assert config.compute.bf16 is False
        assert config.checkpoint.save_interval is None
        assert config.weighting.transforms == ("minus", "shift 2.0")


def test_the_later_of_two_files_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 1.0\nseed: 5\n")
    second.write_text("lr: 2.0\n")
    config = parse("--config", str(first), "--config", str(second))
    assert (config.optimizer.lr, config.train.seed) == (2.0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-lenght", "3"], "unknown option --seq-lenght; did you mean --seq-length?"),
        (["--seq", "3"], "unknown option --seq"),  # no abbreviations: they would change meaning with a new option
        (["--zzz"], "unknown option --zzz; --help lists them"),
        (["positional"], "positional"),
        (["--train-iters", "1.5"], "--train-iters: expected an integer, got 1.5"),
        (["--train-iters", "true"], "--train-iters: expected an integer, got True"),
        (["--lr", "high"], "--lr: expected a number, got high"),
        (["--save-interval", "x"], "--save-interval: expected an integer or null, got x"),
        (["--lr-decay-style", "step"], "--lr-decay-style: expected one of constant, linear, cosine, got step"),
        (["--hierarchical-context-parallel-sizes", "2,x"], "--hierarchical-context-parallel-sizes: expected a list"),
        (["--transforms"], "--transforms: expected values, got none"),
        (["--lr"], "--lr: expected one argument"),
        (["--bf16=maybe"], "--bf16"),
        (["--config", "missing.yaml"], "--config: expected a YAML file, got 'missing.yaml'"),
        (["--config"], "--config: expected a YAML file"),
        (["--save", ""], "--save: expected a string or null, got an empty text"),
        (["--data-path", " "], "--data-path: expected one path or more, got an empty text"),
        (["--transforms", '["minus", ""]'], "--transforms: expected a list of strings or null, got an empty text"),
        (["--seed", str(2**63)], "--seed: expected an integer of 64 bits, got 9223372036854775808"),
    ],
)
def test_wrong_flags_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1.0\nseq_lenght: 3\n", "line 2: unknown option seq_lenght; did you mean seq_length?"),
        ("config: other.yaml\n", "unknown option config"),
        ("lr: 1.0\nlr: 2.0\n", "line 2: lr is set twice"),
        ("train_iters: 3.0\n", "--train-iters: expected an integer, got 3.0"),
        ("train_iters: null\n", "line 1: train_iters: expected an integer, got null"),
        ("bf16: 1\n", "line 1: bf16: expected true or false, got 1"),
        ("bf16: 'true'\n", "line 1: bf16: expected true or false, got true"),
        ("bf16: null\n", "bf16: expected true or false, got null"),
        ("save: 3\n", "--save: expected a string or null, got 3"),
        ("transforms: minus\n", "--transforms: expected a list of strings or null, got minus"),
        ("- lr\n", "expected lines `option: value`, got sequence"),
        ("", "expected lines `option: value`, got nothing"),
        ("lr: [\n", "not a YAML file"),
        ("lr: " + "[" * 3000, "not a YAML file"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse("--config", write(tmp_path, text))
    assert message in str(caught.value)


def test_a_binary_file_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a YAML file"):
        parse("--config", str(tmp_path / "f.yaml"))


def test_missing_required_options_are_all_named() -> None:
    with pytest.raises(ValueError, match="missing --data-path, --seq-length, --train-iters"):
        parse_options([], RunConfig)


def test_a_mistake_ends_a_program_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--lr", "x"], prog="train.py", description="")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --lr: expected a number, got x\n"


def test_only_own_mistakes_lose_their_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit), user_errors():
        int("x")  # raised in a line of this project
    with pytest.raises(ValueError, match="malformed node"), user_errors():
        ast.literal_eval("f()")  # raised inside the standard library
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(errors, "GRACE_SECONDS", 0.0)
    with pytest.raises(SystemExit), user_errors():
        raise OSError("no such\nfile")
    assert capsys.readouterr().err.splitlines()[1:] == ["error (rank 3): no such file"]


def test_what_came_from_a_file_is_told_with_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path, "short_window: 8192\nshort_stride: 6144\nseq_length: 512\n")
    parse("--config", file, "--seq-length", "256")
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("--short-stride 6144: expected at most 96, with --short-window; --seq-length 256")
    said = "error: --short-stride 6144 (options.yaml): expected at most 96, with --short-window (options.yaml); "
    assert capsys.readouterr().err == said + "--seq-length 256\n"
    with pytest.raises(ValueError, match="--lr: expected a number, got high"):
        parse("--config", write(tmp_path, "lr: high\n"))
    with pytest.raises(SystemExit), user_errors():
        parse("--config", file, "--config", write(tmp_path, "lr: high\n"))
    assert capsys.readouterr().err == "error: --lr (options.yaml): expected a number, got high\n"


def test_the_systems_errors_name_the_option_and_the_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parse("--data-path", str(tmp_path), "--save", str(tmp_path / "run"), "--save-hf", "hf")
    folder = tmp_path / "run" / "iter_0000001"
    for error in (
        OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)),
        OSError(errno.ENOENT, os.strerror(errno.ENOENT), "elsewhere"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
    ):
        with pytest.raises(SystemExit), user_errors():
            raise error
    assert capsys.readouterr().err.splitlines() == [
        f"error: --save: {folder}: file exists",
        "error: elsewhere: no such file or directory",
        f"error: --save {tmp_path / 'run'}, --save-hf hf: no space left on device",
        "error: input/output error",
    ]


def test_ctrl_c_and_faults_are_one_line_of_their_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as interrupted, user_errors():
        raise KeyboardInterrupt
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))  # torchrun makes its summary from it
    with pytest.raises(SystemExit) as fault, user_errors():
        raise errors.FaultError("rank 3 hangs")
    assert (interrupted.value.code, fault.value.code) == (errors.INTERRUPTED, 1)
    assert capsys.readouterr().err == "interrupted\n"
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "error: rank 3 hangs"


@pytest.mark.parametrize(
    ("restarts", "most", "nodes", "printed"),
    [("0", "0", "1", False), ("3", "3", "1", False), ("0", "3", "1", True), ("0", "0", "2", True)],
    ids=["one start", "the last start", "starts are left", "two nodes"],
)
def test_what_torchrun_may_not_summarize_is_printed_too(
    restarts: str,
    most: str,
    nodes: str,
    printed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", most)
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    errors.tell("error: rank 1 is gone")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "error: rank 1 is gone"
    assert capsys.readouterr().err == ("error: rank 1 is gone\n" if printed else "")


def test_help_shows_every_option_once_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"], prog="tools/train.py", description="Train.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    words = text.replace(",", " ").split()
    for group in groups_of(RunConfig).values():
        for field in dataclasses.fields(group):
            assert "--" + field.name.replace("_", "-") in words
    assert "--no-shuffle" in words
    assert "[2e-05]" in text
    assert max(map(len, text.splitlines())) <= 120


def test_any_dataclass_of_dataclasses_is_a_schema() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Evaluation:
        """Evaluation: of a model."""

        key_tokens: int = 3
        """How many."""

    Schema = dataclasses.make_dataclass(
        "Schema", [("parallel", ParallelConfig), ("evaluation", Evaluation)], frozen=True, kw_only=True
    )
    loaded: Any = load_options(
        ["--key-tokens", "5", "--context-parallel-size", "2"], Schema, prog="evaluate.py", description=""
    )
    assert loaded.evaluation == Evaluation(key_tokens=5)
    assert loaded.parallel.context_parallel_size == 2


@pytest.mark.parametrize(
    ("schema", "arguments", "message"),
    [
        (EvaluationConfig, ["--scorer", "ema"], "unknown option --scorer: it does nothing here; tools/train.py has it"),
        (EvaluationConfig, ["--recompute-method=block"], "unknown option --recompute-method: it does nothing here"),
        (ScoringConfig, ["--no-overlap-grad-reduce"], "unknown option --no-overlap-grad-reduce: it does nothing here"),
        (ScoringConfig, ["--loss-keep-logits-mib", "1"], "tools/train.py has it"),
        (ScoringConfig, ["--key-tokens", "x"], "it does nothing here; tools/evaluate.py has it"),
        (ConversionConfig, ["--bf16"], "tools/train.py, tools/evaluate.py and tools/score_tokens.py have it"),
        (ConversionConfig, ["--context-parallel-size", "2"], "unknown option --context-parallel-size"),
        (RunConfig, ["--eval-rows", "3"], "unknown option --eval-rows: it does nothing here; tools/evaluate.py has it"),
    ],
)
def test_an_option_of_another_program_is_told_from_a_typo(schema: type, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_options(arguments, schema)
    assert message in str(caught.value)


def test_a_trainings_file_is_not_an_evaluations(tmp_path: Path) -> None:
    file = write(tmp_path, "bf16: true\nlr: 1.0\n")
    with pytest.raises(ValueError, match=r"line 2: unknown option lr: it does nothing here; tools/train\.py has it"):
        parse_options(["--config", file], EvaluationConfig)


# ---- writing ----


def test_saved_options_read_back_equal(tmp_path: Path) -> None:
    config = parse("--transforms", "minus", "shift 2.0", "--lr", "1e-7", "--no-shuffle", "--save", "ü: # x", "--bf16")
    config = replace(config, parallel=ParallelConfig(hierarchical_context_parallel_sizes=(2, 4)))
    save_config(config, tmp_path / "options.yaml")
    assert parse_options(["--config", str(tmp_path / "options.yaml")], RunConfig) == config


def test_difference_names_what_differs(tmp_path: Path) -> None:
    save_config(parse(), tmp_path / "config.yaml")
    assert differences(tmp_path / "config.yaml", parse()) == []
    now = parse("--lr", "1e-3", "--bf16")
    assert differences(tmp_path / "config.yaml", now) == ["bf16: False -> True", "lr: 2e-05 -> 0.001"]


# ---- what follows from them ----


def test_run_folder_holds_tensorboard() -> None:
    assert parse().tensorboard_dir is None
    assert parse("--save", "run").tensorboard_dir == Path("run/tensorboard")
    assert parse("--save", "run", "--tensorboard-dir", "tb").tensorboard_dir == Path("tb")


def test_options_need_no_torch() -> None:
    """`--help` and a wrong option answer at once: nothing heavy is imported for them."""
    code = (
        "import sys, megatron_tw.config; sys.exit(any(m in sys.modules for m in ('torch', 'megatron.core', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "stages",
    [
        "\n  - 0: uniform\n  - 100 linear: dense interpolation=0.75  # all the way from 0\n  - 300: sparse\n",
        "\n  0: uniform\n  100 linear: dense interpolation=0.75\n  300: sparse\n",
        '\n  - "0: uniform"\n  - "100 linear: dense interpolation=0.75"\n  - "300: sparse"\n',
        " >-\n  0: uniform;\n  100 linear: dense interpolation=0.75;\n  300: sparse\n",
    ],
)
def test_a_schedule_in_yaml(stages: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"seq_length: 512\nweighting_schedule:{stages}lr: 3e-4\n")
    config = parse("--config", str(file))
    expected = parse_schedule("0: uniform; 100 linear: dense interpolation=0.75; 300: sparse")
    assert config.weighting.weighting_schedule is not None
    assert parse_schedule(config.weighting.weighting_schedule) == expected
    assert config.optimizer.lr == 3e-4
    assert parse("--config", str(file), "--weighting-schedule", "0: sparse").weighting.weighting_schedule == "0: sparse"
