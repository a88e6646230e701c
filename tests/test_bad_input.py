"""What a user gets wrong ends in one line that names the option or the file, with exit status 2, and nothing is
lost."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_scores import word_tokenizer
from tiny import BOS, SEQ_LENGTH, TINY_LLAMA, prepare_ready_rows, reference_rows

from megatron_tw.data.prepare import prepare_rows
from megatron_tw.parallel.layout import destroy_layout
from tools import convert_checkpoint, evaluate, score_tokens, train

DENSE = ["--weighting", "dense", "--short-window", "64"]
TOOLS = {"score": score_tokens, "train": train, "evaluate": evaluate, "convert": convert_checkpoint}


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
        (["--weighting-schedule", "0: dense", "--short-window", "64", "--scorer", "frozen"], "--scorer frozen"),
        (["--weighting-schedule", "0: uniform; 3: dense"], "--short-window"),
        (["--weighting", "exact", "--tau", "256"], "--tau"),
        (["--weighting", "sparse", "--short-window", "64", "--sparsification", "0"], "--sparsification"),
        (["--weighting", "ppmi", "--short-window", "64", "--shift", "0"], "--shift"),
        (["--valid-data-path", "{short}", "--eval-interval", "5"], "--valid-data-path: {short}: dataset rows of 64"),
        (
            [*["--weighting", "dense", "--short-window", "64", "--scorer", "frozen", "--scorer-hf"], "{folder}"],
            "--scorer-hf {folder}",
        ),
        (["--bos-id", "320"], "--bos-id: expected an id of the vocabulary, 0 to 319, got 320"),
        (["--weighting", "dens", "--short-window", "64"], "got 'dens'"),
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
    assert message.format(**world) in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr


@pytest.mark.parametrize(
    ("tool", "changes", "message"),
    [
        ("evaluate", ["--load", "{folder}"], "--load {folder}: holds no checkpoint"),
        ("evaluate", ["--short-window", "256"], "--short-window: expected less than 256"),
        (
            "evaluate",
            ["--scorer-ema-decay", "0.9"],
            "unknown option --scorer-ema-decay: it does nothing here; tools/train.py has it",
        ),
        ("evaluate", ["--micro-batch-size", "0"], "--micro-batch-size: expected 1 or more, got 0"),
        ("evaluate", ["--eval-rows", "0"], "--eval-rows: expected 1 or more, got 0"),
        ("evaluate", ["--key-tokens", "{folder}"], "evaluation.json is missing"),
        ("evaluate", ["--bos-id", "-7"], "--bos-id"),
        ("evaluate", ["--rotary-base", "-5"], "--rotary-base"),
        ("score", ["--overlap-grad-reduce"], "unknown option --overlap-grad-reduce: it does nothing here"),
        ("score", ["--short-window", "null"], "--short-window: expected the tokens of a window, got none"),
        ("score", ["--make-vocab-size-divisible-by", "0"], "--make-vocab-size-divisible-by"),
        ("score", ["--load-hf", "null"], "--load-hf: expected the Hugging Face folder of the scorer"),
        ("score", ["--short-window", "300"], "--short-window: expected 2 to 256"),
    ],
)
def test_evaluation_and_scoring(tool, changes, message, world, ranks, tmp_path):
    own = ["--seq-length", "256"] if tool == "evaluate" else []
    argv = ["--load-hf", str(TINY_LLAMA), "--data-path", str(world["data"]), "--short-window", "64", *own]
    argv += ["--output", str(tmp_path / "out"), *(change.format(**world) for change in changes)]
    status, stderr = ranks(1).run(run_tool, tool, argv)[0]
    assert status == 2
    assert message.format(**world) in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_tokenizer(world, ranks, tmp_path):
    """As the model in training, the second model of a live scorer, the evaluated model, and the held-out rows."""
    words = ["<s>", "a", "b", "c"]
    ours, theirs = (word_tokenizer(tmp_path / name, order, "<s>") for name, order in (("a", words), ("b", words[::-1])))
    (tmp_path / "text.txt").write_text("a b c " * 400)
    for name, folder in (("ours", ours), ("theirs", theirs)):
        rows = tmp_path / f"rows_of_{name}"
        prepare_rows([tmp_path / "text.txt"], rows, seq_length=SEQ_LENGTH, tokenizer=folder)
    model = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, model)
    for file in theirs.iterdir():
        shutil.copy(file, model)
    rows, other = str(tmp_path / "rows_of_ours"), str(tmp_path / "rows_of_theirs")
    common = ["--data-path", rows, "--seq-length", str(SEQ_LENGTH)]
    tiny = ["--load-hf", str(TINY_LLAMA), "--train-iters", "1"]
    for tool, argv, message in (
        ("train", ["--load-hf", str(model), "--train-iters", "1"], "a model with another vocabulary"),
        (
            "train",
            [*tiny, *DENSE, "--scorer", "frozen", "--scorer-hf", str(model)],
            "a scorer with",
        ),
        (
            "train",
            [*tiny, "--valid-data-path", other, "--eval-interval", "1"],
            "another tokenizer",
        ),
        ("evaluate", ["--load-hf", str(model), "--output", str(tmp_path / "out")], "a model with another vocabulary"),
    ):
        status, stderr = ranks(1).run(run_tool, tool, [*argv, *common])[0]
        assert status == 2, argv
        assert message in stderr


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
        "imported": ["--load", str(tmp_path / "run" / "iter_0000000")],  # a checkpoint of a run
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
