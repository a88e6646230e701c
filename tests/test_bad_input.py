"""What a user gets wrong ends in one line that names the option or the file, with exit status 2, and nothing is
lost."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import BOS, SEQ_LENGTH, TINY_LLAMA, prepare_ready_rows, reference_rows

from megatron_tw.parallel.layout import destroy_layout
from tools import convert_checkpoint, evaluate, train

TOOLS = {"train": train, "evaluate": evaluate, "convert": convert_checkpoint}


def run_tool(tool: str, argv: list[str]) -> tuple[int, str]:
    """On a rank: exit status and stderr of a tool."""
    stderr = io.StringIO()
    status = 0
    with contextlib.redirect_stderr(stderr):
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
    short = prepare_ready_rows(np.ascontiguousarray(reference_rows()[:, :64]), folder / "short_rows")
    return {"data": data, "short": short, "folder": folder, "run": folder / "run"}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seq-length", "128"], "rows of 256 tokens, --seq-length 128"),
        (["--data-path", "{short}"], "rows of 64 tokens, --seq-length 256"),
        (["--data-path", "{folder}"], "not a dataset folder"),
        (["--load-hf", "{folder}"], "config.json: not found"),
        (["--tensor-model-parallel-size", "2"], "expected a number of ranks that is a multiple of 2, got 1"),
        (["--weighting", "dense"], "--short-window"),
        (["--weighting", "dense", "--short-window", "64", "--short-stride", "65"], "--short-stride"),
        (["--weighting", "dense", "--short-window", "512"], "--short-window"),
        (["--weighting", "dense", "--short-window", "64", "--short-stride", "60"], "--min-short-context"),
        (["--weighting", "dense", "--short-window", "64", "--scorer", "frozen"], "--scorer frozen"),
        (["--weighting", "custom", "--short-window", "64", "--transforms", "sqrt"], "'sqrt'"),
        (["--weighting", "sparse", "--short-window", "64", "--sparsification", "0"], "--sparsification"),
        (["--weighting", "ppmi", "--short-window", "64", "--shift", "0"], "--shift"),
        (["--valid-data-path", "{short}", "--eval-interval", "5"], "rows of 64 tokens, --seq-length 256"),
        (["--weighting", "dens", "--short-window", "64"], "'dens'"),
        (["--weighting", "dense", "--short-window", "64", "--interpolation", "1.5"], "--interpolation"),
        (["--seq-lenght", "256"], "--seq-length"),
        (["--transformer-impl", "transformer_engine"], "--transformer-impl"),
        (["--save-hf", "{data}"], "--save-hf"),
        (["--save", "{data}/rows.bin"], "--save"),
    ],
)
def test_train(changes, message, world, ranks):
    argv = arguments(world, *(change.format(**world) for change in changes))
    status, stderr = ranks(1).run(run_tool, "train", argv)[0]
    assert status == 2
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr


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


def test_unknown_yaml_key(world, ranks, tmp_path):
    (tmp_path / "options.yaml").write_text("seq_lenght: 256\n")
    argv = arguments(world, "--config", str(tmp_path / "options.yaml"))
    status, stderr = ranks(1).run(run_tool, "train", argv)[0]
    assert status == 2
    assert "seq_lenght" in stderr
    assert "seq_length" in stderr


def test_vocabulary_of_the_rows_beyond_the_models(world, ranks, tmp_path):
    rows = reference_rows().copy()
    rows[0, 5] = 400
    source = tmp_path / "big.jsonl"
    source.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    from megatron_tw.data.prepare import prepare_rows

    prepare_rows([source], tmp_path / "big", seq_length=SEQ_LENGTH, tokenizer=None)
    status, stderr = ranks(1).run(run_tool, "train", arguments(world, "--data-path", str(tmp_path / "big")))[0]
    assert status == 2
    assert "vocabulary of 401" in stderr
    assert "320" in stderr


def test_a_folder_that_holds_a_run_is_not_written_over(finished_run, world, ranks):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    status, stderr = ranks(1).run(run_tool, "train", arguments(world, "--save", str(finished_run)))[0]
    assert status == 2
    assert f"--save {finished_run}: the folder already holds a run" in stderr
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}


def test_checkpoint_of_another_model(finished_run, world, ranks, tmp_path):
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    argv = arguments(world, "--load", str(finished_run), "--load-hf", str(tmp_path))
    status, stderr = ranks(1).run(run_tool, "train", argv)[0]
    assert status == 2
    assert "a checkpoint of another model" in stderr
    assert "mlp" in stderr


def test_a_resume_with_other_data(finished_run, world, ranks, tmp_path):
    other = prepare_ready_rows(np.ascontiguousarray(reference_rows()[::-1]), tmp_path / "other")
    argv = arguments(
        world, "--data-path", str(other), "--load", str(finished_run), "--save", str(finished_run), "--train-iters", "2"
    )
    status, stderr = ranks(1).run(run_tool, "train", argv)[0]
    assert status == 2
    assert "--data-path" in stderr


def test_convert_and_evaluate(finished_run, world, ranks, tmp_path):
    pool = ranks(1)
    status, stderr = pool.run(run_tool, "convert", ["--load", str(finished_run)])[0]
    assert status == 2
    assert "--save-hf" in stderr
    assert pool.run(run_tool, "convert", ["--load", str(finished_run), "--save-hf", str(tmp_path / "hf")])[0][0] == 0
    assert (
        pool.run(run_tool, "convert", ["--load-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "run")])[0][0] == 0
    )
    where = ["--data-path", str(world["data"]), "--seq-length", "256", "--short-window", "64", "--short-stride", "48"]
    for name, source in {
        "trained": ["--load", str(finished_run)],
        "exported": ["--load-hf", str(tmp_path / "hf")],
        "imported": ["--load", str(tmp_path / "run")],
    }.items():
        status, stderr = pool.run(run_tool, "evaluate", [*source, *where, "--output", str(tmp_path / name)])[0]
        assert status == 0, stderr
    nlls = [np.load(tmp_path / name / "nll.npz")["long_nll"] for name in ("trained", "exported", "imported")]
    np.testing.assert_array_equal(nlls[0], nlls[1])
    np.testing.assert_array_equal(nlls[0], nlls[2])
    argv = ["--load-hf", str(tmp_path / "hf"), *where, "--output", str(tmp_path / "hf")]
    status, stderr = pool.run(run_tool, "evaluate", argv)[0]
    assert status == 2
    assert "--output" in stderr
