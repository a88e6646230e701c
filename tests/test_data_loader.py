"""Prepared rows opened again, and the loader: the same rows in the same order under any layout, resumed by a number."""

import doctest
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import edit_header

from megatron_tw.data import loader as loader_module
from megatron_tw.data.loader import Loader
from megatron_tw.data.order import RowOrder, epoch_permutation
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows, check_rows
from megatron_tw.data.verify import verify_folder

NUM_ROWS, SEQ_LENGTH = 10, 4
SHUFFLE_0 = [1, 6, 2, 0, 3, 5, 7, 4]
SHUFFLE_1 = [3, 6, 7, 0, 5, 4, 1, 2]


def make_rows(folder: Path, num_rows: int = NUM_ROWS, shift: int = 0) -> TokenRows:
    """Row i is [1, i, i+1, i+2] (+ shift)."""
    source = folder / f"{num_rows}_{shift}.jsonl"
    source.write_text(
        "".join(json.dumps({"input_ids": [1, *(i + j + shift for j in range(3))]}) + "\n" for i in range(num_rows))
    )
    output = source.with_suffix(".rows")
    prepare_rows([source], output, seq_length=SEQ_LENGTH, tokenizer=None, vocab_size=100, bos_id=1)
    return TokenRows(output)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    return make_rows(tmp_path_factory.mktemp("rows"))


def make_loader(
    rows: TokenRows, *, dp_rank: int = 0, dp_size: int = 1, mbs: int = 1, gbs: int = 8, seed: int = 3, **options: Any
) -> Loader:
    order = RowOrder(len(rows), seed=seed, shuffle=options.pop("shuffle", True))
    return Loader(rows, order, global_batch_size=gbs, micro_batch_size=mbs, dp_rank=dp_rank, dp_size=dp_size, **options)


def global_steps(rows: TokenRows, num_steps: int, *, dp_size: int = 1, **options: Any) -> list[list[int]]:
    """The rows of each step in sample order, put together from all ranks: micro-batch by micro-batch, rank by rank."""
    ranks = [make_loader(rows, dp_rank=rank, dp_size=dp_size, **options) for rank in range(dp_size)]
    steps = []
    for _ in range(num_steps):
        micro_batches = zip(*(next(loader) for loader in ranks), strict=True)
        steps.append([row for batches in micro_batches for batch in batches for row in batch.row_index.tolist()])
    return steps


def test_docstring_example() -> None:
    assert doctest.testmod(loader_module) == (0, 1)


def test_rows_are_copies_that_outlive_the_dataset(rows: TokenRows) -> None:
    opened = TokenRows(rows.path)
    row = opened[7]
    del opened
    gc.collect()
    assert row.dtype == np.int64
    assert row.tolist() == [1, 7, 8, 9]
    row[0] = 5
    assert rows[7].tolist() == [1, 7, 8, 9]
    assert len(rows) == NUM_ROWS
    with pytest.raises(IndexError, match="row 10 of 10 rows"):
        rows[10]
    with pytest.raises(IndexError):
        rows[-1]


def replace_in_header(folder: Path, **fields: object) -> None:
    edit_header(folder / "dataset.json", **fields)


def flip_byte(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def cut_by_one_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no header": (
        lambda folder: (folder / "dataset.json").unlink(),
        r"not a dataset folder \(no dataset\.json\); make one with",
    ),
    "no JSON": (
        lambda folder: (folder / "dataset.json").write_text('{"format"'),
        "truncated or no JSON",
    ),
    "other kind": (lambda folder: replace_in_header(folder, format="scores"), r"dataset\.json: not a header of"),
    "other version": (
        lambda folder: replace_in_header(folder, format_version=99),
        r"dataset\.json: format version 99, but .* version 1 and 2",
    ),
    "unknown field": (
        lambda folder: replace_in_header(folder, more=1),
        r"dataset\.json: unknown fields: more",
    ),
    "wrong type": (lambda folder: replace_in_header(folder, bos_id="one"), r'bos_id: expected an integer, got "one"'),
    "true is no number": (lambda folder: replace_in_header(folder, largest_id=True), "largest_id: expected an integer"),
    "wrong type inside": (
        lambda folder: replace_in_header(folder, counts={"rows": []}),
        r"counts: missing fields: documents, tokens",
    ),
    "contradiction": (
        lambda folder: replace_in_header(folder, vocab_size=10, largest_id=319),
        "largest_id 319 is no id of a vocabulary of 10 tokens; the file is damaged",
    ),
    "BOS outside": (lambda folder: replace_in_header(folder, bos_id=-1), "bos_id -1 is no id"),
    "no tokens": (lambda folder: replace_in_header(folder, seq_length=0), "seq_length: expected 2 or more, got 0"),
    "unknown dtype": (
        lambda folder: replace_in_header(folder, dtype="complex"),
        "dtype: expected one of uint16",
    ),
    "edited": (
        lambda folder: (folder / "dataset.json").write_text(
            (folder / "dataset.json").read_text().replace('"bos_id": 1', '"bos_id": 2')
        ),
        "not those that were written with its checksum",
    ),
    "pointers": (
        lambda folder: flip_byte(folder / "rows.idx", 34 + 4 * NUM_ROWS),
        r"rows\.idx does not fit the header",
    ),
    "places": (
        lambda folder: flip_byte(folder / "rows_documents.npy", -1),
        "is not what was written with dataset.json",
    ),
    "no bin": (lambda folder: (folder / "rows.bin").unlink(), r"rows\.bin is missing"),
    "cut bin": (
        lambda folder: cut_by_one_byte(folder / "rows.bin"),
        r"rows\.bin is truncated .* 80 bytes expected, 79 there",
    ),
    "cut idx": (lambda folder: cut_by_one_byte(folder / "rows.idx"), r"rows\.idx is truncated"),
    "no documents": (lambda folder: (folder / "rows_documents.npy").unlink(), r"rows_documents\.npy is missing"),
    "cut documents": (
        lambda folder: cut_by_one_byte(folder / "rows_documents.npy"),
        r"rows_documents\.npy is truncated",
    ),
    "other documents": (
        lambda folder: np.save(folder / "rows_documents.npy", np.zeros((3, 2))),
        r"expected int64 \[10, 2\], got float64 \[3, 2\]",
    ),
}


def test_a_changed_id_is_found_when_its_row_is_read(rows: TokenRows, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(rows.path, folder)
    flip_byte(folder / "rows.bin", 5 * SEQ_LENGTH * np.dtype(rows.header.dtype).itemsize)
    opened = TokenRows(folder)
    assert opened[4].tolist() == rows[4].tolist()
    with pytest.raises(ValueError, match=r"rows\.bin: the ids of row 5 are not those that were written"):
        opened[5]
    with pytest.raises(ValueError, match=r"row 5 .* \(1 of 10 rows\)"):
        verify_folder(folder)
    assert "10 rows of 4 tokens are intact" in verify_folder(rows.path)


def test_datasets_without_digests_are_read_and_verified(rows: TokenRows, tmp_path: Path) -> None:
    """As a program of version 1 wrote them."""
    folder = tmp_path / "rows"
    shutil.copytree(rows.path, folder)
    (folder / "rows_digests.npy").unlink()
    edit_header(folder / "dataset.json", format_version=1, digests=...)
    assert TokenRows(folder)[5].tolist() == rows[5].tolist()
    assert "intact" in verify_folder(folder)
    flip_byte(folder / "rows.bin", 5 * SEQ_LENGTH * 2)
    with pytest.raises(ValueError, match=r"rows\.bin or rows_documents\.npy was changed after the dataset was made"):
        verify_folder(folder)
    content = np.memmap(folder / "rows.bin", dtype=rows.header.dtype, mode="r+")
    content[5 * SEQ_LENGTH + 2] = 999
    content.flush()
    with pytest.raises(ValueError, match=r"row 5, position 2: id 999, but dataset\.json says that the largest is"):
        TokenRows(folder)[5]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_datasets(rows: TokenRows, tmp_path: Path, damage: str) -> None:
    apply, message = DAMAGES[damage]
    shutil.copytree(rows.path, tmp_path / "rows")
    apply(tmp_path / "rows")
    with pytest.raises(ValueError, match=message):
        TokenRows(tmp_path / "rows")


@pytest.mark.parametrize(("seq_length", "vocab_size"), [(4, None), (3, 100)])
def test_index_of_another_dataset(rows: TokenRows, tmp_path: Path, seq_length: int, vocab_size: int | None) -> None:
    """Of the same size in bytes, but for int32 ids, or for shorter rows."""
    source = tmp_path / "other.jsonl"
    source.write_text((json.dumps({"input_ids": list(range(seq_length))}) + "\n") * NUM_ROWS)
    prepare_rows([source], tmp_path / "other", seq_length=seq_length, tokenizer=None, vocab_size=vocab_size)
    shutil.copytree(rows.path, tmp_path / "rows")
    shutil.copyfile(tmp_path / "other" / "rows.idx", tmp_path / "rows" / "rows.idx")
    with pytest.raises(ValueError, match=r"rows\.idx does not fit the header"):
        TokenRows(tmp_path / "rows")


def test_check_rows(rows: TokenRows) -> None:
    check_rows(rows, seq_length=4, model_vocab_size=100)
    with pytest.raises(ValueError, match=r"dataset rows of 4 tokens, --seq-length 8"):
        check_rows(rows, seq_length=8)
    with pytest.raises(
        ValueError, match=r"dataset \(ready ids\) with a vocabulary of 100 tokens, but the model's has 99"
    ):
        check_rows(rows, seq_length=4, model_vocab_size=99)


def test_fingerprint_is_of_the_rows(rows: TokenRows, tmp_path: Path) -> None:
    assert make_rows(tmp_path).header.fingerprint == rows.header.fingerprint
    assert make_rows(tmp_path, shift=1).header.fingerprint != rows.header.fingerprint


def test_every_epoch_takes_every_row_once_in_its_own_order() -> None:
    order = RowOrder(50, seed=3, shuffle=True)
    epochs = [[order[sample] for sample in range(epoch * 50, epoch * 50 + 50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [RowOrder(50, seed=4, shuffle=True)[sample] for sample in range(50)] != epochs[0]
    assert order[7] == epochs[0][7]  # a sample's row does not depend on what was asked before


def test_the_shuffle_never_changes() -> None:
    """A run must find its order again after an update of numpy or on another machine."""
    assert epoch_permutation(8, seed=1234, epoch=0).tolist() == SHUFFLE_0
    assert epoch_permutation(8, seed=1234, epoch=1).tolist() == SHUFFLE_1


def test_no_shuffle_is_input_order_in_every_epoch(rows: TokenRows) -> None:
    steps = global_steps(rows, 3, gbs=5, shuffle=False)
    assert steps == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]


def test_batches_hold_the_rows_they_name(rows: TokenRows) -> None:
    loader = make_loader(rows, mbs=2, gbs=8, dp_size=2)
    batches = next(loader)
    assert len(batches) == loader.num_microbatches == 2
    assert loader.consumed_samples == 8
    for batch in batches:
        assert batch.tokens.dtype == batch.row_index.dtype == torch.int64
        assert batch.valid is None
        assert batch.tokens.shape == (2, SEQ_LENGTH)
        assert batch.tokens.tolist() == [rows[row].tolist() for row in batch.row_index.tolist()]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_layout_does_not_change_the_rows_of_a_step_or_their_order(rows: TokenRows, shuffle: bool) -> None:
    expected = global_steps(rows, 6, shuffle=shuffle)  # 48 samples of 10 rows: epochs end inside steps
    order = RowOrder(NUM_ROWS, seed=3, shuffle=shuffle)
    assert [row for step in expected for row in step] == [order[sample] for sample in range(48)]
    for dp_size, mbs in ((1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)):
        assert global_steps(rows, 6, dp_size=dp_size, mbs=mbs, shuffle=shuffle) == expected


def test_resume_inside_an_epoch_under_another_layout(rows: TokenRows) -> None:
    expected = global_steps(rows, 6, gbs=4)
    loader = make_loader(rows, gbs=4)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))  # plain values
    assert state["consumed_samples"] == 12

    resumed = make_loader(rows, gbs=4, mbs=2)
    resumed.load_state_dict(state)
    steps = [[row for batch in next(resumed) for row in batch.row_index.tolist()] for _ in range(3)]
    assert steps == expected[3:]
    assert global_steps(rows, 3, gbs=4, dp_size=2, consumed_samples=12) == expected[3:]


def test_resume_on_other_data_tells_every_difference(rows: TokenRows, tmp_path: Path) -> None:
    state = make_loader(rows).state_dict()
    with pytest.raises(
        ValueError, match=r"seed was 3 and is now 4 \(--seed\); shuffle was True and is now False \(--no-shuffle\)$"
    ):
        make_loader(rows, seed=4, shuffle=False).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"num_rows was 10 and is now 11 \(--data-path\); data_fingerprint was \w+ and is now \w+"
    ):
        make_loader(make_rows(tmp_path, 11)).load_state_dict(state)
    with pytest.raises(ValueError, match="data_fingerprint"):
        make_loader(make_rows(tmp_path, shift=1)).load_state_dict(state)


def test_batch_sizes_must_fit(rows: TokenRows) -> None:
    message = r"--global-batch-size 8 must be a positive multiple of --micro-batch-size 3 x data-parallel size 1"
    with pytest.raises(ValueError, match=message):
        make_loader(rows, mbs=3)
    with pytest.raises(ValueError, match="--global-batch-size 0"):
        make_loader(rows, gbs=0)
    with pytest.raises(ValueError, match="--seed -1"):
        make_loader(rows, seed=-1)
