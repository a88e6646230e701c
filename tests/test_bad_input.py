"""The tools on the ranks of the tests: what a layout does not admit, and a model through all of them. (What is wrong
on any layout: test_wrong_inputs.py.)"""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from damage import flip
from tiny import BOS, SEQ_LENGTH, TINY_LLAMA, prepare_ready_rows, reference_rows

from megatron_tw.parallel.layout import destroy_layout
from tools import convert_checkpoint, evaluate, score_tokens, train

TOOLS = {"score": score_tokens, "train": train, "evaluate": evaluate, "convert": convert_checkpoint}


def run_tool(tool: str, argv: list[str]) -> tuple[int, str]:
    """On a rank: exit status and stderr of a tool. No launcher ends the others, so they need not wait for one."""
    stderr = io.StringIO()
    status = 0
    at_once = mock.patch("megatron_tw.config.errors.GRACE_SECONDS", 0.1)
    with contextlib.redirect_stderr(stderr), at_once:
        try:
            TOOLS[tool].main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            with contextlib.suppress(Exception):
                destroy_layout()
    return status, stderr.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders that a run takes, and a run that has been made."""
    folder = tmp_path_factory.mktemp("world")
    data = prepare_ready_rows(reference_rows(), folder / "rows")
    return {"data": data, "folder": folder, "run": folder / "run"}


def arguments(world: dict[str, Path], *changes: str) -> list[str]:
    return [
        "--load-hf", str(TINY_LLAMA), "--data-path", str(world["data"]), "--seq-length", str(SEQ_LENGTH),
        "--train-iters", "1", "--bos-id", str(BOS), *changes,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(world, ranks) -> Path:
    status, stderr = ranks(1).run(run_tool, "train", arguments(world, "--save", str(world["run"])))[0]
    assert status == 0, stderr
    return world["run"]


def test_heads_and_layers_that_do_not_divide(world, ranks, tmp_path):
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    for changes, option in (
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "--tensor-model-parallel-size"),
        ({"num_hidden_layers": 5}, "--pipeline-model-parallel-size"),
    ):
        folder = tmp_path / option
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        argv = arguments(world, "--load-hf", str(folder), option, "2")
        for status, stderr in ranks(2).run(run_tool, "train", argv):
            assert status == 2
            assert option in stderr


def test_convert_and_evaluate(finished_run, world, ranks, tmp_path):
    pool = ranks(1)
    assert pool.run(run_tool, "convert", ["--load", str(finished_run), "--save-hf", str(tmp_path / "hf")])[0][0] == 0
    assert (
        pool.run(run_tool, "convert", ["--load-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "run")])[0][0] == 0
    )
    where = ["--data-path", str(world["data"]), "--seq-length", "256", "--short-window", "64", "--short-stride", "48"]
    for name, source in {
        "trained": ["--load", str(finished_run)],
        "exported": ["--load-hf", str(tmp_path / "hf")],
        "imported": ["--load", str(tmp_path / "run" / "iter_0000000")],  # a checkpoint of a run
    }.items():
        status, stderr = pool.run(run_tool, "evaluate", [*source, *where, "--output", str(tmp_path / name)])[0]
        assert status == 0, stderr
    nlls = [np.load(tmp_path / name / "nll.npz")["long_nll"] for name in ("trained", "exported", "imported")]
    np.testing.assert_array_equal(nlls[0], nlls[1])
    np.testing.assert_array_equal(nlls[0], nlls[2])


def test_damaged_files_are_told_alike_by_every_rank(world, ranks, tmp_path):
    """Ranks share the reading of scores and of exports; what one of them finds, all of them say."""
    windows, model = ["--short-window", "64", "--short-stride", "48"], tmp_path / "hf"
    score = ["--load-hf", str(TINY_LLAMA), "--data-path", str(world["data"]), *windows, "--output", str(tmp_path / "s")]
    assert ranks(2).run(run_tool, "score", score)[0][0] == 0
    trained = arguments(world, "--save-hf", str(model), "--global-batch-size", "2")
    assert ranks(2).run(run_tool, "train", trained)[0][0] == 0
    cached = ["--weighting", "dense", *windows, "--scorer", "frozen", "--scores", str(tmp_path / "s")]
    cases = [(tmp_path / "s" / "scores.bin", cached), (model / "model.safetensors", ["--load-hf", str(model)])]
    for file, options in cases:
        for where in (0.1, 0.9):
            content = file.read_bytes()
            flip(file, str(int(where * len(content))))
            ours, theirs = ranks(2).run(run_tool, "train", arguments(world, *options, "--global-batch-size", "2"))
            assert ours[0] == theirs[0] == 2, ours
            assert str(file) in ours[1]
            assert ours[1] == theirs[1].replace("error (rank 1)", "error")
            file.write_bytes(content)
