"""Stages: a run that starts from the weights of an earlier one (--pretrained-checkpoint), and the staged recipe."""

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_kills import started, steps_of, wait_for
from test_launch import ROOT, TIMEOUT_SECONDS, environment
from test_training import METRICS, metrics_of, options, run_all
from tiny import SEQ_LENGTH, TINY_LLAMA, Axes, make_folder, prepare_ready_rows, reference_rows

from megatron_tw.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
    check_config,
    parse_options,
)
from megatron_tw.config.options import flag

SCRIPT = ROOT / "examples" / "extend_llama3_128k_staged.sh"
FIRST_LENGTH = 128
DENSE, SPARSE = WeightingOptions(weighting="dense"), WeightingOptions(weighting="sparse", sparsification=0.4)
STEPS, STOP = 5, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[int, Path]:
    """The reference's rows, and their first halves, by their length."""
    folder = tmp_path_factory.mktemp("stages")
    return {
        length: prepare_ready_rows(reference_rows()[:, :length], folder / str(length))
        for length in (FIRST_LENGTH, SEQ_LENGTH)
    }


@pytest.fixture(scope="module")
def first(data, ranks, tmp_path_factory) -> Path:
    """A first stage of three steps, trained under TP 2."""
    save = tmp_path_factory.mktemp("stages") / "first"
    config = options(
        Axes(tp=2),
        data[FIRST_LENGTH],
        weighting=DENSE,
        windows=WindowsConfig(short_window=32),
        train=TrainConfig(train_iters=3, global_batch_size=2),
        model=ModelConfig(load_hf=str(TINY_LLAMA), rotary_base=20000.0),
        checkpoint=CheckpointConfig(save=str(save), save_hf=f"{save}-hf"),
    )
    rows = DataConfig(data_path=(str(data[FIRST_LENGTH]),), seq_length=FIRST_LENGTH, shuffle=False)
    ranks(2).run(run_all, [replace(config, data=rows)])
    return save


def second(
    data: dict[int, Path], *, load_hf: str | None = None, stop: int | None = None, **checkpoint: str
) -> RunConfig:
    """A second stage: longer rows, another rope and weighting; its windows are the first stage's rows."""
    return options(
        Axes(cp=2),
        data[SEQ_LENGTH],
        weighting=SPARSE,
        windows=WindowsConfig(short_window=FIRST_LENGTH if load_hf is not None else None),
        train=TrainConfig(train_iters=STEPS, global_batch_size=2, exit_interval=stop),
        model=ModelConfig(load_hf=load_hf, rotary_base=80000.0),
        checkpoint=replace(CheckpointConfig(), **checkpoint),  # type: ignore[arg-type]
    )


def test_a_stage_starts_from_weights_alone_and_goes_on_where_it_stopped(first, data, ranks, tmp_path):
    pool = ranks(2)
    # The export of the first stage holds its weights and nothing else.
    pool.run(run_all, [second(data, load_hf=f"{first}-hf", save=str(tmp_path / "exported"))])
    pool.run(run_all, [second(data, pretrained_checkpoint=str(first), save=str(tmp_path / "straight"))])
    expected, straight = metrics_of(tmp_path / "exported"), metrics_of(tmp_path / "straight")
    for key in METRICS:
        assert straight[key].tolist() == expected[key].tolist(), key

    earlier, run = tmp_path / "earlier", tmp_path / "run"
    shutil.copytree(first, earlier)
    folders: dict[str, Any] = {"pretrained_checkpoint": str(earlier), "save": str(run), "load": str(run)}
    pool.run(run_all, [second(data, stop=STOP, **folders)])
    shutil.rmtree(earlier)  # a checkpoint of the stage itself is all that it needs now
    pool.run(run_all, [second(data, **folders)])
    resumed = metrics_of(run)
    for key in METRICS:
        assert resumed[key].tolist() == straight[key].tolist(), key

    header = json.loads((run / f"iter_{STEPS:07d}" / "run.json").read_text())
    assert (header["state"]["old_context"], header["state"]["seq_length"]) == (FIRST_LENGTH, SEQ_LENGTH)
    assert header["hf_config"]["rope_theta"] == 80000.0
    saved = parse_options(["--config", str(run / f"iter_{STEPS:07d}" / "config.yaml")], RunConfig)
    assert (saved.windows.short_window, saved.windows.short_stride) == (FIRST_LENGTH, 64)
    assert saved.checkpoint.pretrained_checkpoint == str(earlier)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["consumed_samples"] == 2 * STEPS


def test_the_first_model_of_all_stages_is_what_a_scaling_starts_from(data, ranks, tmp_path):
    """64 tokens to 128 to 256 by ntk: each stage's base comes from the first one's 10000 and 64 tokens."""
    model = make_folder("llama", tmp_path / "model", max_position_embeddings=64)
    thetas, before = [], {"load_hf": str(model)}
    for length in (FIRST_LENGTH, SEQ_LENGTH):
        save = str(tmp_path / str(length))
        argv = {"data_path": data[length], "seq_length": length, "train_iters": 1, "save": save, **before}
        argv |= {"weighting": "uniform", "rope_scaling_type": "ntk"}
        flags = [part for name, value in argv.items() for part in (flag(name), str(value))]
        ranks(1).run(run_all, [parse_options(flags, RunConfig)])
        checkpoint = tmp_path / str(length) / "iter_0000001"
        thetas.append(json.loads((checkpoint / "run.json").read_text())["hf_config"]["rope_theta"])
        before = {"pretrained_checkpoint": save}
    np.testing.assert_allclose(thetas, [10000 * factor ** (32 / 30) for factor in (2, 4)])


def flip_a_byte(run: Path) -> None:
    file = next((run / "iter_0000003").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def narrower(run: Path) -> None:
    """A Hugging Face folder of another model beside it."""
    shutil.copytree(TINY_LLAMA, run.parent / "other")
    config = run.parent / "other" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 80}))


@pytest.mark.parametrize(
    ("change", "options_of", "message"),
    [
        (flip_a_byte, {}, r"--pretrained-checkpoint .*distcp is damaged: .*checksums differ"),
        (
            without_checkpoints,
            {},
            "--pretrained-checkpoint .*: expected the folder of a run, found no checkpoint in it",
        ),
        (narrower, {"load_hf": "other"}, "--pretrained-checkpoint .*a checkpoint of another model: .*--load-hf has"),
        (
            lambda run: None,
            {"windows": WindowsConfig(), "length": FIRST_LENGTH},
            r"--short-window: expected less than 128, .* got 128 \(the old context, without --short-window\)",
        ),
    ],
)
def test_what_cannot_be_started_from_is_named(change, options_of, message, first, data, ranks, tmp_path):
    earlier = tmp_path / "earlier"
    shutil.copytree(first, earlier)
    change(earlier)
    config = second(data, pretrained_checkpoint=str(earlier), save=str(tmp_path / "run"))
    if "load_hf" in options_of:
        config = replace(config, model=ModelConfig(load_hf=str(tmp_path / options_of["load_hf"])))
    if "length" in options_of:
        length = options_of["length"]
        config = replace(config, data=DataConfig(data_path=(str(data[length]),), seq_length=length))
    with pytest.raises(ValueError, match=message):
        ranks(2).run(run_all, [config])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("earlier", ["runs/stage", "runs/stage/iter_0000003", "runs/../runs/stage/"])
def test_a_stage_is_not_written_over_the_one_before(earlier, data):
    config = second(data, pretrained_checkpoint=earlier, save="runs/stage")
    with pytest.raises(ValueError, match="--save: expected another folder than the run of --pretrained-checkpoint"):
        check_config(config)
    check_config(second(data, pretrained_checkpoint=earlier, save="runs/stage2"))


def staged(data: dict[int, Path], save: Path, steps: int) -> list[str]:
    """The staged recipe cut down to the tiny checkpoint, 2 ranks and a few steps."""
    return [
        *("bash", str(SCRIPT), "--load-hf", str(TINY_LLAMA), "--save", str(save), "--no-bf16"),
        *("--global-batch-size", "2", "--save-interval", "1", "--tensor-model-parallel-size", "1"),
        *("--context-parallel-size", "2", "--lr-warmup-iters", "0"),
        *("32k:", "--data-path", str(data[FIRST_LENGTH]), "--seq-length", str(FIRST_LENGTH), "--train-iters", "1"),
        *("--short-window", "32", "--short-stride", "24"),
        *("128k:", "--data-path", str(data[SEQ_LENGTH]), "--seq-length", str(SEQ_LENGTH), "--train-iters", str(steps)),
        *("--short-window", "128", "--short-stride", "96"),
    ]


@pytest.mark.full
def test_the_staged_recipe_killed_in_its_second_stage_goes_on(data, ranks, tmp_path):
    steps, log = 8, tmp_path / "log"
    command = staged(data, tmp_path / "runs", steps)
    command[4:4] = ["--distributed-timeout-minutes", "2"]
    run = tmp_path / "runs" / "128k"
    with started(command, log, NPROC_PER_NODE="2"):
        wait_for(lambda: (run / "iter_0000002").is_dir(), log)
    assert steps_of(run) < steps, "killed too late"
    killed = log.read_text()
    assert "stage 32k: is over" not in killed
    assert (
        f"weights of {tmp_path / 'runs' / '32k' / 'iter_0000001'}: 1 steps on rows of {FIRST_LENGTH} tokens" in killed
    )

    result = subprocess.run(
        command,
        env=environment(NPROC_PER_NODE="2"),
        cwd=tmp_path,
        timeout=TIMEOUT_SECONDS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"stage 32k: is over ({tmp_path / 'runs' / '32k'})" in result.stdout
    assert f"resumed from {run / 'iter_'}" in result.stdout
    again = subprocess.run(
        command, env=environment(), timeout=TIMEOUT_SECONDS, capture_output=True, text=True, check=True
    )
    assert [line for line in again.stdout.splitlines() if line.endswith(")")] == [
        f"stage {name}: is over ({tmp_path / 'runs' / name})" for name in ("32k", "128k")
    ]

    config = parse_options(["--config", str(run / f"iter_{steps:07d}" / "config.yaml")], RunConfig)
    assert (config.weighting.weighting, config.model.rotary_base, config.train.seed) == ("dense", 56300000.0, 1234)
    straight = CheckpointConfig(
        save=str(tmp_path / "straight"), pretrained_checkpoint=config.checkpoint.pretrained_checkpoint
    )
    ranks(2).run(run_all, [replace(config, checkpoint=straight)])
    expected, resumed = metrics_of(tmp_path / "straight"), metrics_of(run)
    for key in METRICS:
        assert resumed[key].tolist() == expected[key].tolist(), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["32k:"], "error: --save: expected a folder for the runs of the stages"),
        (["--save"], "error: --save: expected a folder"),
        (["--save", "runs", "128k:", "--load", "x"], "error: --load: this script says it to each stage itself"),
        (
            ["--pretrained-checkpoint=x"],
            "error: --pretrained-checkpoint: this script says it to each stage itself",
        ),
    ],
)
def test_what_the_staged_recipe_cannot_take_is_named(arguments, message):
    result = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, message + "\n")


def stand_in_python(folder: Path, body: str) -> dict[str, str]:
    """An environment in which `python` is a shell script."""
    (folder / "python").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "python").chmod(0o755)
    env = environment(NPROC_PER_NODE="2")
    return {**env, "PATH": f"{folder}:{env['PATH']}"}


def test_each_stage_gets_its_options_and_one_that_stops_early_is_the_last(tmp_path):
    command = ["bash", str(SCRIPT), "--lr", "1", "--save=a b", "32k:", "--seed", "2", "128k:", "--save-hf", "hf"]
    env = stand_in_python(tmp_path, 'printf "[%s]" "$@"; echo')
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    name, call, stopped = result.stdout.splitlines()
    assert name == "stage 32k: a b/32k"
    assert call.endswith("extend_llama3_32k.yaml][--lr][1][--seed][2][--load][a b/32k][--save][a b/32k]")
    assert stopped == "stage 32k: stopped before its last step; the same command goes on from there"

    for folder, step in (("a b/32k", 30), ("a b/128k", 15)):
        checkpoint = tmp_path / folder / f"iter_{step:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.yaml").write_text("train_iters: 30\n")
        (tmp_path / folder / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    over, name, call, _ = result.stdout.splitlines()
    assert (over, name) == ("stage 32k: is over (a b/32k)", "stage 128k: a b/128k")
    assert call.endswith(
        "extend_llama3_128k.yaml][--lr][1][--save-hf][hf]"
        "[--pretrained-checkpoint][a b/32k][--load][a b/128k][--save][a b/128k]"
    )

    # A run at its last step whose export is not there (it was killed on the way) is not over.
    (tmp_path / "a b" / "128k" / "iter_0000015" / "config.yaml").write_text("train_iters: 15\n")
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines()[1] == "stage 128k: a b/128k"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").touch()
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"stage {name}: is over (a b/{name})" for name in ("32k", "128k")]


def test_a_signal_ends_the_stage_that_runs_and_the_script(tmp_path):
    env = stand_in_python(tmp_path, "trap 'echo ended; exit 3' TERM\necho begun\nwhile true; do sleep 0.05; done")
    command = ["bash", str(SCRIPT), "--save", "runs"]
    with subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["stage 32k: runs/32k\n", "begun\n"]
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=TIMEOUT_SECONDS)[0] == "ended\n"
    assert process.returncode == 3


def test_the_stages_fit_each_other():
    needed = ["--data-path", "d", "--load-hf", "m", "--save", "s"]
    configs = [
        parse_options(["--config", str(SCRIPT.with_name(f"extend_llama3_{name}.yaml")), *needed], RunConfig)
        for name in ("32k", "128k")
    ]
    for config in configs:
        check_config(config, world_size=8)
        assert config.windows.short_window is not None
        assert config.data.seq_length == 4 * config.windows.short_window
    first, second = configs
    assert second.windows.short_window == first.data.seq_length
    assert (second.data.seq_length, second.windows.short_stride) == (131072, 24576)
    assert (first.model.rotary_base, second.model.rotary_base) == (1.53e7, 5.63e7)
    tokens = [config.data.seq_length * config.train.batch_size(1) for config in configs]
    assert tokens[0] == tokens[1]
    np.testing.assert_allclose(np.log(5.63e7), (np.log(1.53e7) + np.log(2.07e8)) / 2, rtol=1e-3)
