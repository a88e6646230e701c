"""Scores of a frozen scorer: right and reproducible under every layout, resumed byte for byte, refused where they do
not fit."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BOS, SEQ_LENGTH, STRIDE, TINY_LLAMA, WINDOW, Axes, edit_header, prepare_ready_rows, reference_rows

from megatron_tw.config import ModelConfig, WindowsConfig
from megatron_tw.config.scoring import ScoringConfig, ScoringOptions
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.scores import ScoreRows, check_scores
from megatron_tw.data.vocabulary import check_scorer_vocabulary
from megatron_tw.model.architecture import read_architecture
from megatron_tw.model.families.table import expected_tensors
from megatron_tw.model.forward import ShortWindowForward
from megatron_tw.parallel.layout import destroy_layout
from megatron_tw.programs.scoring import score_tokens
from megatron_tw.runtime.fingerprint import weights_fingerprint
from tools import score_tokens as tool

ABSOLUTE = 2e-5
"""Of an NLL of about 6, fp32: what the model may differ from the reference's by."""

LAYOUTS = [Axes(), Axes(tp=2), Axes(cp=2), Axes(pp=2), Axes(dp=2), Axes(cp=2, dp=2)]
FULL_LAYOUTS = [Axes(pp=2, vpp_layers=1), Axes(cp=4), Axes(tp=2, cp=2), Axes(tp=2, pp=2, cp=2)]
EVERY_LAYOUT = LAYOUTS + [pytest.param(axes, marks=pytest.mark.full) for axes in FULL_LAYOUTS]
NAMES = ["scores.bin", "scores.idx", "scores.json", "scores_digests.npy", "scores_keys.npy"]


def config(axes: Axes, data: Path, output: Path, *, load_hf: Path = TINY_LLAMA, **changes) -> ScoringConfig:
    bos_id = changes.pop("bos_id", BOS)
    return ScoringConfig(
        scoring=ScoringOptions(data_path=str(data), output=str(output), bos_id=bos_id),
        windows=WindowsConfig(**{"short_window": WINDOW, "short_stride": STRIDE, **changes}),
        parallel=axes.parallel(),
        model=ModelConfig(load_hf=str(load_hf)),
    )


def score(configs: list[ScoringConfig], stop_after: int | None = None) -> None:
    """On a rank: score; with stop_after, fail in the middle, when the rank has scored that many times."""
    real, calls = ShortWindowForward.short_nll, []

    def failing(self, model, rows_RN, documents_D3=None):
        calls.append(len(rows_RN))
        if stop_after is not None and len(calls) > stop_after:
            raise RuntimeError("killed")
        return real(self, model, rows_RN, documents_D3)

    ShortWindowForward.short_nll = failing  # type: ignore[method-assign]
    try:
        for one in configs:
            try:
                score_tokens(one)
            finally:
                destroy_layout()
    finally:
        ShortWindowForward.short_nll = real  # type: ignore[method-assign]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_ready_rows(reference_rows(), tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture(scope="module")
def scored(data, ranks) -> Path:
    output = data.parent / "scores"
    ranks(1).run(score, [config(Axes(), data, output)])
    return output


@pytest.mark.parametrize("axes", EVERY_LAYOUT, ids=lambda axes: axes.name)
def test_every_layout(axes, ranks, reference, data, tmp_path):
    outputs = [tmp_path / "a", tmp_path / "b"]
    ranks(axes.world_size).run(score, [config(axes, data, output) for output in outputs])
    expected = np.load(reference / "windows.npz")["short_nll_with_first"]
    scores = ScoreRows(outputs[0])
    check_scores(scores, TokenRows(data), short_window=WINDOW, short_stride=STRIDE, bos_id=BOS)
    nll = scores.nll(TokenRows(data).documents_R2)
    assert nll.dtype == torch.float32
    np.testing.assert_allclose(nll, expected, rtol=0, atol=ABSOLUTE)
    first, second = map(content, outputs)
    assert list(first) == NAMES
    assert first == second
    assert not list(tmp_path.glob("*.partial"))


def test_the_format_is_megatrons(scored, data, reference):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset, tokens = (IndexedDataset(str(path)) for path in (scored / "scores", data / "rows"))
    assert len(dataset) == 4
    assert dataset[0].dtype == np.float32
    np.testing.assert_array_equal(dataset.document_indices, tokens.document_indices)
    expected = np.load(reference / "windows.npz")["short_nll_with_first"]
    for row in range(4):
        np.testing.assert_allclose(np.array(dataset[row]), expected[row], rtol=0, atol=ABSOLUTE)


def test_windows_without_bos_and_a_row_of_one_window(ranks, reference, data, tmp_path):
    whole = config(Axes(cp=2), data, tmp_path / "whole", short_window=SEQ_LENGTH, short_stride=100)
    # No row begins with this id, so no window gets a BOS. (Where the rows say what their BOS is, another is refused.)
    silent = tmp_path / "silent"
    shutil.copytree(data, silent)
    edit_header(silent / "dataset.json", bos_id=None)
    bare = config(Axes(cp=2), silent, tmp_path / "bare", bos_id=319, scoring_micro_batch=2)
    ranks(2).run(score, [whole, bare])
    windows, places = np.load(reference / "windows.npz"), TokenRows(data).documents_R2
    for name, expected in (("whole", "long_nll"), ("bare", "short_nll_no_bos")):
        nll = ScoreRows(tmp_path / name).nll(places)
        np.testing.assert_allclose(nll, windows[expected], rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("axes", [Axes(), Axes(cp=2), Axes(dp=2)], ids=lambda axes: axes.name)
def test_a_killed_run_goes_on(axes, ranks, data, tmp_path):
    pool = ranks(axes.world_size)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    pool.run(score, [config(axes, data, straight)])
    with pytest.raises(RuntimeError, match="killed"):
        pool.run(score, [config(axes, data, resumed)], stop_after=1)
    with pytest.raises(ValueError, match="scoring was not finished; run the same command again"):
        ScoreRows(resumed)
    partial = tmp_path / "resumed.partial"
    parts = sorted(partial.glob("*.part"))
    assert len(parts) == axes.dp
    # What else a kill leaves behind: half of a file, and half of the final folder.
    (partial / f"{partial.name}.4711.tmp").write_bytes(b"half")
    (partial / "000000003-000000004.part").write_bytes(parts[0].read_bytes()[:100])
    (partial / "complete").mkdir()
    (partial / "complete" / "scores.bin").write_bytes(b"half")
    # It would be killed again if it made a finished part once more.
    pool.run(score, [config(axes, data, resumed)], stop_after=4 // axes.dp - 1)
    assert content(resumed) == content(straight)
    assert not partial.exists()


def test_more_replicas_may_go_on(ranks, scored, data, tmp_path):
    output = tmp_path / "scores"
    with pytest.raises(RuntimeError, match="killed"):
        ranks(1).run(score, [config(Axes(), data, output)], stop_after=1)
    ranks(2).run(score, [config(Axes(dp=2), data, output)])
    assert content(output) == content(scored)


def test_finished_scores_are_left_alone(ranks, scored, data):
    before = {file: file.stat().st_mtime_ns for file in scored.iterdir()}
    ranks(1).run(score, [config(Axes(), data, scored)], stop_after=0)
    assert before == {file: file.stat().st_mtime_ns for file in scored.iterdir()}


@pytest.fixture(scope="module")
def other_scorer(tmp_path_factory) -> Path:
    """The tiny Llama with one number changed."""
    folder = tmp_path_factory.mktemp("other") / "llama"
    shutil.copytree(TINY_LLAMA, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][5] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_going_on_otherwise_is_refused(ranks, other_scorer, data, tmp_path):
    """Once with an unfinished run, once with finished scores; and everything that differs is named."""
    pool, output = ranks(1), tmp_path / "scores"
    run = config(Axes(), data, output)
    with pytest.raises(RuntimeError, match="killed"):
        pool.run(score, [run], stop_after=2)
    rope = replace(run, model=replace(run.model, rotary_base=5e5))
    other_data = prepare_ready_rows(np.ascontiguousarray(reference_rows()[::-1]), tmp_path / "other")
    cases = [
        (rope, r"scorer's rope_theta: scored with 10000\.0, now 500000\.0"),
        (config(Axes(), data, output, load_hf=other_scorer), "weights of the scorer"),
        (
            config(Axes(), data, output, short_window=32, short_stride=20),
            "--short-window: scored with 64, now 32; --sh",
        ),
        (config(Axes(), data, output, bos_id=2), "--bos-id: expected 1, the BOS of the rows"),
        (config(Axes(), other_data, output), "dataset"),
        (config(Axes(), data, output, scoring_micro_batch=2), "--scoring-micro-batch: scored with None, now 2"),
    ]
    for _ in ("unfinished", "finished"):
        for other, message in cases:
            with pytest.raises(ValueError, match=message):
                pool.run(score, [other])
        pool.run(score, [run])
    assert (tmp_path / "scores" / "scores.json").is_file()


def fingerprints(folders: list[Path]) -> list[str]:
    """On a rank: of these folders."""
    return [weights_fingerprint(folder, read_architecture(folder)) for folder in folders]


def test_the_fingerprint_is_of_the_weights_alone(ranks, other_scorer, tmp_path):
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(TINY_LLAMA / "config.json", sharded)
    tensors = load_file(TINY_LLAMA / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, sharded / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    folders = [TINY_LLAMA, sharded, other_scorer]
    same, also, other = ranks(1).run(fingerprints, folders)[0]
    assert same == also
    assert same != other
    assert ranks(2).run(fingerprints, folders) == [[same, also, other]] * 2


def run_tool(argv: list[str]) -> tuple[int, str]:
    """On a rank: exit status and stderr of the tool."""
    stderr, status = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr):
        try:
            tool.main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            destroy_layout()
    return status, stderr.getvalue()


def test_the_tool(ranks, scored, data, tmp_path):
    pool = ranks(1)
    argv = ["--load-hf", str(TINY_LLAMA), "--data-path", str(data), "--short-window", "64", "--short-stride", "48"]
    status, stderr = pool.run(run_tool, [*argv, "--output", str(tmp_path / "scores")])[0]
    assert status == 0, stderr
    assert content(tmp_path / "scores") == content(scored)
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "thesis.tex").write_text("")
    for changes, message in (
        (["--short-window", "512"], "--short-window"),
        (["--short-stride", "60"], "--min-short-context"),
        (["--data-path", str(scored)], "not a dataset folder"),
        (["--load-hf", str(data)], "config.json: not found"),
        (["--output", str(filled)], "neither empty nor a folder of scores"),
        (["--context-parallel-size", "2"], "--context-parallel-size"),
    ):
        status, stderr = pool.run(run_tool, [*argv, "--output", str(tmp_path / "new"), *changes])[0]
        assert status == 2
        assert message in stderr
        assert len(stderr.strip().splitlines()) == 1, stderr
    assert not list(tmp_path.glob("new*"))


def test_nan_is_refused(ranks, data, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(TINY_LLAMA, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # so that logits overflow; a NaN in the weights is told before
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the scorer's NLL of row 0, position 1 is (nan|inf)"):
        ranks(1).run(score, [config(Axes(), data, tmp_path / "scores", load_hf=folder)])
    assert not (tmp_path / "scores").exists()


def word_tokenizer(folder: Path, words: list[str], special: str) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special, "unk_token": words[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_scorer_with_another_vocabulary(data, tmp_path):
    ready = TokenRows(data)  # of a vocabulary of 320
    check_scorer_vocabulary(ready, TINY_LLAMA, 320)
    for size in (300, 384):
        with pytest.raises(ValueError, match=f"vocabulary.* {size}"):
            check_scorer_vocabulary(ready, TINY_LLAMA, size)

    words = ["the", "cat", "sat", "on", "a", "mat"]
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 20)
    own = word_tokenizer(tmp_path / "own", words, "<s>")
    prepare_rows([tmp_path / "text.txt"], tmp_path / "rows", seq_length=16, tokenizer=own)
    rows = TokenRows(tmp_path / "rows")
    check_scorer_vocabulary(rows, own, 64)  # a padded vocabulary
    check_scorer_vocabulary(rows, word_tokenizer(tmp_path / "cousin", words, "<|begin|>"), 7)
    with pytest.raises(ValueError, match="another vocabulary than the rows"):
        check_scorer_vocabulary(rows, word_tokenizer(tmp_path / "stranger", words[::-1], "<s>"), 7)
    with pytest.raises(ValueError, match="no two tokenizers to compare"):
        check_scorer_vocabulary(rows, TINY_LLAMA, 320)


def test_expected_tensors_are_all_hashed():
    """The fingerprint goes over the names that the model is filled from."""
    names = expected_tensors(read_architecture(TINY_LLAMA))
    assert set(names) == set(load_file(TINY_LLAMA / "model.safetensors"))
