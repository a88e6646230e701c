"""Score rows as training reads them: found by document and offset, refused where they are not of the rows."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scores import NAMES, data, scored
from tiny import BOS, STRIDE, WINDOW, edit_header, prepare_ready_rows, reference_rows

from megatron_tw.data.rows import TokenRows
from megatron_tw.data.rows_format import digest_of_all
from megatron_tw.data.scores import ScoreRows, check_scores

__all__ = ["data", "scored"]  # fixtures of test_scores


def test_scores_are_found_by_document_and_offset(scored, data, tmp_path):
    scores, rows = ScoreRows(scored), TokenRows(data)
    every = scores.nll(rows.documents_R2)
    order = [2, 0, 3, 2]
    assert torch.equal(scores.nll(rows.documents_R2[order]), every[order])
    with pytest.raises(ValueError, match="no scores of the row at document 1, offset 7"):
        scores.nll(np.array([[0, 0], [1, 7]]))


def test_scores_of_rows_in_any_order_are_found(scored, tmp_path):
    folder = tmp_path / "scores"
    shutil.copytree(scored, folder)
    keys = np.load(folder / "scores_keys.npy")
    keys = np.ascontiguousarray(keys[[2, 0, 3, 1]])
    np.save(folder / "scores_keys.npy", keys)
    digests = np.load(folder / "scores_digests.npy")
    edit_header(folder / "scores.json", digests=digest_of_all(keys, digests))
    places = np.array([[row, 0] for row in range(4)])
    assert ScoreRows(folder).find(places).tolist() == [1, 3, 0, 2]


def dataset_of(rows: np.ndarray, documents: list[list[int]], folder: Path) -> TokenRows:
    """A dataset of ready rows whose places in the documents are said to be these."""
    prepare_ready_rows(rows, folder)
    np.save(folder / "rows_documents.npy", np.array(documents))
    digests = digest_of_all(np.array(documents), np.load(folder / "rows_digests.npy"))
    edit_header(folder / "dataset.json", fingerprint=folder.name, digests=digests)
    return TokenRows(folder)


FITTING = {"short_window": WINDOW, "short_stride": STRIDE, "bos_id": BOS}


def test_a_selection_of_the_scored_rows_fits(scored, tmp_path):
    selection = np.ascontiguousarray(reference_rows()[[3, 1]])
    rows = dataset_of(selection, [[3, 0], [1, 0]], tmp_path / "selection")
    scores = ScoreRows(scored)
    check_scores(scores, rows, **FITTING)
    np.testing.assert_array_equal(scores.find(rows.documents_R2), [3, 1])


def test_scores_that_do_not_fit(scored, data, tmp_path):
    scores, rows = ScoreRows(scored), TokenRows(data)
    check_scores(scores, rows, **FITTING)
    with pytest.raises(ValueError) as everything:
        check_scores(scores, rows, short_window=32, short_stride=24, bos_id=None)
    for message in (
        f"--scores {scored} does not fit this run",
        "--short-window: scored with 64, now 32",
        "--short-stride: scored with 48, now 24",
        "--bos-id: scored with 1, now None",
    ):
        assert message in str(everything.value)

    other = reference_rows().copy()
    other[2, 100] += 1
    missing = dataset_of(reference_rows(), [[0, 0], [1, 0], [2, 255], [3, 0]], tmp_path / "missing")
    shorter = prepare_ready_rows(np.ascontiguousarray(other[:, :128]), tmp_path / "shorter")
    for dataset, message in (
        (TokenRows(prepare_ready_rows(other, tmp_path / "other")), r"row 2 \(document 2, offset 0\) had other ids"),
        (missing, r"row 2 \(document 2, offset 255\) was not scored"),
        (TokenRows(shorter), "tokens of a row .*: scored with 256, now 128"),
    ):
        with pytest.raises(ValueError, match=message):
            check_scores(scores, dataset, **FITTING)


def test_broken_folders_are_refused(scored, data, tmp_path):
    with pytest.raises(ValueError, match=r"rows: not a folder of scores \(no scores\.json\)"):
        ScoreRows(data)
    folder = tmp_path / "scores"

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            ScoreRows(folder)

    for name in NAMES:
        for cut, keep in (("truncated", 0.5), ("missing", None)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(scored, folder)
            if keep is None:
                (folder / name).unlink()
                refused("not a folder of scores" if name == "scores.json" else f"{name} is {cut}")
            else:
                os.truncate(folder / name, int((folder / name).stat().st_size * keep))
                refused(f"{name} is {cut}")
    shutil.rmtree(folder)
    shutil.copytree(scored, folder)
    header = json.loads((folder / "scores.json").read_text())
    for change, message in (
        ({"format_version": 99}, "format version 99, but this program reads version 1 and 2"),
        ({"format": "megatron_tw token rows"}, 'not a header of "megatron_tw score rows"'),
        ({"color": "red"}, "unknown fields: color"),
        ({"rows": 5}, r"scores_keys\.npy: expected int64 \[5, 3\]"),
        ({"rows": "four"}, 'rows: expected an integer, got "four"'),
        ({"short_window": 0}, "in windows of 0"),
        ({"computation": [1]}, r"computation: expected a JSON object, got \[1\]"),
    ):
        edit_header(folder / "scores.json", **change)
        refused(message)
        (folder / "scores.json").write_text(json.dumps(header))
    (folder / "scores.json").write_text(json.dumps({**header, "short_stride": 40}))
    refused("not those that were written with its checksum")
    (folder / "scores.json").write_text(json.dumps(header))
    index = bytearray((folder / "scores.idx").read_bytes())
    index[34] ^= 1  # the first row's length
    (folder / "scores.idx").write_bytes(index)
    refused(r"scores\.idx does not fit the header")


def test_changed_nlls_are_refused_when_they_are_read(scored, tmp_path):
    folder = tmp_path / "scores"
    shutil.copytree(scored, folder)
    nll = np.memmap(folder / "scores.bin", dtype="<f4", mode="r+")
    nll[300] += 0.5  # row 1, finite
    nll.flush()
    scores = ScoreRows(folder)
    scores.nll(np.array([[0, 0], [2, 0]]))
    with pytest.raises(ValueError, match=r"scores\.bin: the NLLs of score row 1 are not those that were written"):
        scores.nll(np.array([[2, 0], [1, 0]]))


def test_nlls_without_digests_are_read(scored, tmp_path):
    """As a program of version 1 wrote them."""
    folder = tmp_path / "scores"
    shutil.copytree(scored, folder)
    (folder / "scores_digests.npy").unlink()
    edit_header(folder / "scores.json", format_version=1, digests=...)
    places = np.array([[1, 0]])
    assert torch.equal(ScoreRows(folder).nll(places), ScoreRows(scored).nll(places))
