"""Evaluation against hand-checked numbers; results on disk; what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from tiny import edit_header

from megatron_tw.evaluation.compare import Difference, Measure, compare, paired_difference
from megatron_tw.evaluation.key_tokens import KeyTokens, choose_key_tokens, key_tokens, long_ppl
from megatron_tw.evaluation.loss import check_room
from megatron_tw.evaluation.position import beyond, mean_nll, nll_by_position, position_edges
from megatron_tw.evaluation.result import EvaluationHeader, EvaluationResult
from megatron_tw.evaluation.table import format_table, tables
from megatron_tw.evaluation.targets import RowTargets
from megatron_tw.evaluation.training import read_metrics


def result(
    long_nll: npt.ArrayLike,
    short_nll: npt.ArrayLike | None = None,
    *,
    valid: npt.ArrayLike | None = None,
    rows: list[int] | None = None,
    **header: Any,
) -> EvaluationResult:
    long_RT = np.asarray(long_nll, np.float32)
    return EvaluationResult(
        header=EvaluationHeader(
            **{
                "model": "models/x",
                "layout": "TP 1",
                "seq_length": long_RT.shape[1] + 1,
                "short_window": None if short_nll is None else 3,
                "short_stride": None if short_nll is None else 2,
                "rotary_base": 10000.0,
                "data_fingerprint": "d",
                "tokenizer_fingerprint": "t",
                **header,
            }
        ),
        row_index=np.asarray(rows if rows is not None else range(len(long_RT)), np.int64),
        long_nll=long_RT,
        short_nll=None if short_nll is None else np.asarray(short_nll, np.float32),
        valid=np.ones(long_RT.shape, bool) if valid is None else np.asarray(valid, bool),
    )


def test_packed_rows_that_would_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two documents of 4 and of 3 tokens: 2 x 3 targets, of 10 bytes with the short NLL and of 6 without."""
    targets = RowTargets(np.ones((1, 7), bool), np.array([[0, 0, 4], [0, 4, 3]]))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100))
    check_room(targets, with_short_nll=False)
    check_room(replace(targets, documents=None), with_short_nll=True)
    with pytest.raises(ValueError, match=r"packed rows of 2 documents, the longest of 4 tokens: .*\(--eval-rows\)"):
        check_room(targets, with_short_nll=True)


LONG = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
SHORT = [[1.0, 2.0, 5.5, 4.0], [5.0, 6.0, 9.0, 10.5]]  # gains: 2.5, exactly 2 (not more), 2.5


def test_a_result_comes_back_from_disk(tmp_path: Path) -> None:
    saved = result(LONG, SHORT, valid=[[1, 1, 1, 0], [1, 1, 1, 1]], rows=[4, 9])
    saved = replace(saved, top1=np.asarray([[1, 0, 0, 1], [0, 1, 0, 0]], bool))
    saved.save(tmp_path / "a")
    loaded = EvaluationResult.load(tmp_path / "a")
    assert loaded.header == saved.header
    for name in ("row_index", "long_nll", "short_nll", "valid", "top1"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
        assert getattr(loaded, name).dtype == getattr(saved, name).dtype

    header = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert header["targets"] == 7
    assert header["mean_nll"] == pytest.approx(32 / 7)  # the masked 4.0 does not count
    assert header["perplexity"] == pytest.approx(math.exp(32 / 7))
    assert header["nll_by_position"] == [  # n = 3 is an edge
        {"first": 1, "last": 2, "targets": 4, "nll": 3.5},
        {"first": 3, "last": 4, "targets": 3, "nll": 6.0},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # no temporary folder is left


def test_a_result_without_short_nll_comes_back(tmp_path: Path) -> None:
    result(LONG).save(tmp_path / "a")
    loaded = EvaluationResult.load(tmp_path / "a")
    assert loaded.short_nll is None
    assert loaded.top1 is None


def test_saving_refuses_a_filled_folder_and_nan(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        result(LONG).save(tmp_path / "a")
    with pytest.raises(ValueError, match="row 9, position 2 is nan"):
        result([[1.0, 2.0], [1.0, math.nan]], rows=[4, 9]).save(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    result([[1.0, 2.0], [1.0, math.nan]], valid=[[1, 1], [1, 0]]).save(tmp_path / "c")  # masked: means nothing


def test_bad_results_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(
        ValueError, match=r"evaluation\.json is missing: expected a folder that tools/evaluate\.py wrote"
    ):
        EvaluationResult.load(folder)
    result(LONG, SHORT).save(folder)
    header, arrays = (folder / "evaluation.json").read_text(), (folder / "nll.npz").read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            EvaluationResult.load(folder)
        (folder / "evaluation.json").write_text(header)
        (folder / "nll.npz").write_bytes(arrays)

    for cut in (0, 100, len(arrays) - 10):
        (folder / "nll.npz").write_bytes(arrays[:cut])
        refused(r"nll\.npz is truncated or no numpy file")
    (folder / "nll.npz").write_bytes(arrays[:200] + bytes(20) + arrays[220:])
    refused(r"nll\.npz is truncated or no numpy file")
    (folder / "nll.npz").unlink()
    refused(r"nll\.npz is missing")
    (folder / "evaluation.json").write_text(header[:50])
    refused(r"evaluation\.json is truncated or no JSON")
    for change, match in (
        ({"format_version": 99}, "format version 99, but this program reads version 1 and 2"),
        ({"format": "score rows"}, 'not a header of "megatron_tw evaluation"'),
        ({"seq_length": 9}, r"long_nll: expected float32 \[2, 8\], got float32 \[2, 4\]"),
        ({"short_window": None}, "short_nll is there, short_window is None"),
    ):
        edit_header(folder / "evaluation.json", **change)
        refused(match)
    edit_header(folder / "evaluation.json", rotary_base=...)
    refused("missing fields: rotary_base")
    (folder / "evaluation.json").write_text(header.replace('"model": "', '"model": "another '))
    refused("not those that were written with its checksum")


def test_position_edges_are_powers_of_two_and_the_old_context() -> None:
    assert position_edges(1024, old_context=256) == (1, 32, 64, 128, 256, 512, 1024)
    assert position_edges(1000, old_context=300) == (1, 32, 64, 128, 256, 300, 512, 1000)
    assert position_edges(16) == (1, 16)


def test_nll_by_position_sums_tokens_not_rows() -> None:
    nll = np.asarray([[1, 2, 4, 8], [10, 20, 40, 80]], np.float32)
    mask = np.asarray([[1, 1, 1, 0], [0, 0, 1, 0]], bool)
    first, second, empty = nll_by_position(nll, mask, (1, 3, 4, 5))
    assert (first.first, first.last, first.targets, first.nll) == (1, 2, 2, 1.5)
    assert (second.first, second.last, second.targets, second.nll) == (3, 3, 2, 22.0)
    assert (empty.first, empty.last, empty.targets, empty.nll) == (4, 4, 0, None)
    assert mean_nll(nll, mask) == 47 / 4  # not the mean of the rows' means, (7/3 + 40) / 2
    assert beyond(mask, 3).tolist() == [[False, False, True, False], [False, False, True, False]]


def test_sums_are_double_precision() -> None:
    nll = np.full((1, 2**20), 16.001, np.float32)
    assert mean_nll(nll, np.ones(nll.shape, bool)) == pytest.approx(float(np.float32(16.001)), abs=1e-12)


def test_key_tokens_gain_more_than_the_threshold() -> None:
    long, short = np.asarray(LONG, np.float32), np.asarray(SHORT, np.float32)
    assert np.argwhere(key_tokens(long, short)).tolist() == [[0, 2], [1, 3]]
    assert np.argwhere(key_tokens(long, short, gain=1.5)).tolist() == [[0, 2], [1, 2], [1, 3]]
    assert np.argwhere(key_tokens(long, short, max_long_nll=4.0)).tolist() == [[0, 2]]
    valid = np.asarray([[1, 1, 0, 1], [1, 1, 1, 1]], bool)
    assert np.argwhere(key_tokens(long, short, valid_RT=valid)).tolist() == [[1, 3]]
    assert long_ppl(long, key_tokens(long, short)) == pytest.approx(math.exp((3 + 8) / 2))
    assert long_ppl(long, key_tokens(long, short, gain=3.0)) is None
    with pytest.raises(ValueError, match="--gain: expected a positive number"):
        key_tokens(long, short, gain=0.0)
    with pytest.raises(ValueError, match="no short NLL"):
        choose_key_tokens(result(LONG), "uniform")


def test_paired_difference_is_a_ratio_over_rows() -> None:
    reference = np.zeros((3, 2), np.float32)
    nll = np.asarray([[1, 3], [2, 9], [6, 9]], np.float32)
    mask = np.asarray([[1, 1], [1, 0], [1, 0]], bool)
    found = paired_difference(nll, reference, mask)
    assert found is not None
    assert found.mean == 12 / 4
    # d = 4, 2, 6; m = 2, 1, 1; residuals 4 - 6, 2 - 3, 6 - 3: sqrt(3/2 * 14) / 4
    assert found.standard_error == pytest.approx(math.sqrt(21) / 4)
    assert found.rows == 3
    assert paired_difference(nll, reference, np.zeros_like(mask)) is None
    one_row = paired_difference(nll, reference, np.asarray([[1, 1], [0, 0], [0, 0]], bool))
    assert one_row is not None
    assert (one_row.mean, one_row.standard_error, one_row.is_clear) == (2.0, None, False)


def test_a_difference_is_clear_beyond_two_standard_errors_in_enough_rows() -> None:
    assert Difference(mean=-0.21, standard_error=0.1, rows=30).is_clear
    assert not Difference(mean=-0.19, standard_error=0.1, rows=30).is_clear
    assert not Difference(mean=-0.21, standard_error=0.1, rows=29).is_clear


def nll(measure: Measure | None) -> float | None:
    assert measure is not None
    return measure.nll


def three_models(copies: int = 1) -> tuple[dict[str, EvaluationResult], KeyTokens]:
    uniform = result(LONG * copies, SHORT * copies)
    better = result([[1.0, 2.0, 2.0, 4.0], [5.0, 6.0, 7.0, 7.0]] * copies)
    worse = result([[2.0, 3.0, 3.5, 5.0], [6.0, 7.0, 8.0, 8.5]] * copies)
    return {"base": worse, "uniform": uniform, "sparse": better}, choose_key_tokens(uniform, "uniform")


def test_models_are_compared_on_the_same_targets() -> None:
    results, key = three_models()
    comparison = compare(results, key)
    assert comparison.reference == "uniform"
    assert (comparison.old_context, comparison.rows, comparison.targets) == (3, 2, 8)
    sparse, uniform = comparison.model("sparse"), comparison.model("uniform")
    assert (uniform.all.nll, nll(uniform.within), nll(uniform.beyond), nll(uniform.key)) == (4.5, 3.5, 5.5, 5.5)
    assert uniform.all.difference is None
    assert (sparse.all.nll, nll(sparse.within), nll(sparse.beyond), nll(sparse.key)) == (4.25, 3.5, 5.0, 4.5)
    assert sparse.long_ppl == pytest.approx(math.exp(4.5))
    assert sparse.key is not None
    assert sparse.key.difference is not None
    assert (sparse.key.difference.mean, sparse.key.difference.standard_error) == (-1.0, 0.0)
    assert [bucket.nll for bucket in sparse.buckets] == [3.5, 5.0]
    assert [difference and difference.mean for difference in sparse.bucket_differences] == [0.0, -0.5]


def test_the_old_context_is_the_models(tmp_path: Path) -> None:
    """The shortest that a model had before its extension; where none says so, or none is shorter, the window."""
    results, key = three_models()
    for contexts, expected in (((2, None, 2), 2), ((5, 4, None), 4), ((5, 5, 5), 3), ((None, None, None), 3)):
        named = {
            name: replace(result, header=replace(result.header, old_context=context))
            for (name, result), context in zip(results.items(), contexts, strict=True)
        }
        assert compare(named, key).old_context == expected
    known = [replace(key.source.header, old_context=context).known_context for context in (2, 5, None)]
    assert known == [2, 3, 3]


def test_tables_hold_the_figures() -> None:
    first, differences, _ = tables(compare(*three_models(copies=15)))
    assert first.rows[2] == ("sparse", "4.2500", "3.5000", "5.0000", "4.5000", "90.02")
    assert differences.rows[1] == (
        "sparse",
        "-0.2500 ± 0.0000",
        "+0.0000 ± 0.0000",
        "-0.5000 ± 0.0000",
        "-1.0000 ± 0.0000",
    )
    assert "4.2500" in format_table(first)


def test_an_empty_key_set_has_no_figures() -> None:
    results, _ = three_models()
    comparison = compare(results, choose_key_tokens(results["uniform"], "uniform", gain=50.0))
    assert comparison.key is not None
    assert comparison.key.count == 0
    assert [(nll(row.key), row.long_ppl) for row in comparison.models] == [(None, None)] * 3


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (result([[1.0, 2.0, 3.0]] * 2), "--seq-length 4 and 5"),
        (result(LONG, data_fingerprint="e"), "data fingerprint e and d"),
        (result(LONG, tokenizer_fingerprint="u"), "tokenizer fingerprint u and t"),
        (result(LONG[:1]), "number of rows 1 and 2"),
        (result(LONG, rows=[0, 2]), "the rows chosen differ"),
        (result(LONG, valid=[[1, 1, 1, 1], [1, 1, 1, 0]]), "the masks of valid targets differ"),
    ],
)
def test_other_targets_are_refused(other: EvaluationResult, match: str) -> None:
    results, key = three_models()
    with pytest.raises(ValueError, match=f"dense and uniform were not evaluated on the same targets: {match}"):
        compare({**results, "dense": other}, key)


def test_bad_options_are_refused() -> None:
    results, key = three_models()
    with pytest.raises(ValueError, match="--reference dense: expected one of base, uniform, sparse"):
        compare(results, key, reference="dense")
    with pytest.raises(ValueError, match="--old-context: expected 2 to 4"):
        compare(results, key, old_context=5)
    with pytest.raises(ValueError, match="--evaluations"):
        compare({}, key)


def test_metrics_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match="is missing: expected the --save folder"):
        read_metrics(tmp_path)
    file.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_metrics(tmp_path)
    file.write_text('{"iteration": 1, "weighted_loss": 2.25, "lm_loss": 2.5}\n{"iteration": 2, "lm')
    with pytest.raises(ValueError, match="line 2: no JSON"):
        read_metrics(tmp_path)
    file.write_text('{"iteration": 1, "weighted_loss": 2.25, "lm_loss": 2.5}\n')
    assert read_metrics(tmp_path) == [{"iteration": 1, "weighted_loss": 2.25, "lm_loss": 2.5}]
