"""Packed and masked rows on disk: every token of every document is there once, with its boundaries and its mask."""

import doctest
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_data_prepare import TEXTS, files_of, write_jsonl
from test_data_tokenizer import train_sentencepiece

from megatron_tw.data import packing, rows, rows_writer
from megatron_tw.data.loader import read_batch
from megatron_tw.data.packing import OPEN_ROWS, Packer, Piece
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.rows_format import MARKS_FILE, RowsHeader
from megatron_tw.data.tokenizer import load_tokenizer
from megatron_tw.data.verify import verify_folder

SEQ_LENGTH, MULTIPLE = 64, 8


@pytest.fixture(scope="module")
def spm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("spm"))


def prepare_ids(folder: Path, records: list, name: str = "ids", pack_multiple: int | None = MULTIPLE) -> TokenRows:
    source = write_jsonl(folder / f"{name}.jsonl", records)
    prepare_rows([source], folder / name, seq_length=SEQ_LENGTH, tokenizer=None, vocab_size=100,
                 pack_multiple=pack_multiple)  # fmt: skip
    return TokenRows(folder / name)


def documents_of(packed: TokenRows) -> list[list[int]]:
    """Ids of all documents, in the order of the rows."""
    found = []
    for index in range(len(packed)):
        row = packed.read(index)
        assert row.documents is not None
        assert (row.documents[:, 0] % MULTIPLE == 0).all()
        found += [row.tokens[start : start + tokens].tolist() for start, tokens in row.documents.tolist() if tokens]
    return found


def test_docstring_examples() -> None:
    assert doctest.testmod(packing) == (0, 5)
    assert doctest.testmod(rows) == (0, 1)
    assert doctest.testmod(rows_writer) == (0, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_token_of_every_document_is_there_once(workers: int, tmp_path: Path, spm_file: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS * 3])
    header = prepare_rows([source], tmp_path / "out", seq_length=SEQ_LENGTH, tokenizer=spm_file,
                          pack_multiple=MULTIPLE, workers=workers)  # fmt: skip
    packed = TokenRows(tmp_path / "out")
    assert packed.header == header
    ids = [load_tokenizer(spm_file).encode(text) for text in TEXTS * 3]
    pieces = [[1, *one[first : first + SEQ_LENGTH - 1]] for one in ids for first in range(0, len(one), SEQ_LENGTH - 1)]
    assert sorted(documents_of(packed)) == sorted(pieces)
    counts, told = header.counts, header.packing
    assert told is not None
    assert (counts.documents, counts.documents_too_short, counts.tokens_dropped) == (15, 3, 0)  # three are empty
    assert counts.tokens == sum(map(len, ids))
    assert told.documents == len(pieces)
    assert told.padding_tokens == len(packed) * SEQ_LENGTH - sum(map(len, pieces))
    for index in range(len(packed)):
        row = packed.read(index)
        assert row.valid is not None
        assert row.documents is not None
        expected = np.zeros(SEQ_LENGTH, dtype=bool)
        for start, tokens in row.documents.tolist():
            expected[start + 1 : start + tokens] = True
        assert (row.valid == expected[1:]).all()
        number, offset = packed.documents_R2[index].tolist()
        start, tokens = row.documents[0].tolist()
        assert row.tokens[start + 1 : start + tokens].tolist() == ids[number][offset : offset + tokens - 1]
    assert verify_folder(tmp_path / "out").endswith("are intact")
    if workers > 1:
        prepare_rows([source], tmp_path / "one", seq_length=SEQ_LENGTH, tokenizer=spm_file, pack_multiple=MULTIPLE)
        assert files_of(tmp_path / "one") == files_of(tmp_path / "out")


def test_memory_is_bounded_and_the_fullest_row_is_closed() -> None:
    packer = Packer(16, 4)
    closed = []
    for number in range(OPEN_ROWS + 1):  # none fits with another
        tokens = 12 if number == 7 else 9 if number % 2 else 10
        closed += list(packer.add(Piece(np.full(tokens, 1, np.int32), None, number, 0)))
    assert [row.document for row in closed] == [0]  # all have 4 tokens of room: the oldest
    assert [row.document for row in packer.finish()] == [*range(1, OPEN_ROWS + 1)]


def test_masks_come_with_the_data(tmp_path: Path) -> None:
    ids, mask = list(range(SEQ_LENGTH)), [int(place % 3 == 0) for place in range(SEQ_LENGTH)]
    one = prepare_ids(tmp_path, [{"input_ids": ids, "loss_mask": mask}], "one", pack_multiple=None)
    assert one.header.masked
    assert one.header.packing is None
    batch = read_batch(one, [0, 0])
    assert batch.documents is None
    assert batch.valid is not None
    assert batch.valid.tolist() == [[bool(bit) for bit in mask[1:]]] * 2

    records = [{"input_ids": ids[:n], "loss_mask": mask[:n]} for n in (5, 40, 30)]
    table = pyarrow.table({key: [record[key] for record in records] for key in ("input_ids", "loss_mask")})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    packed = prepare_ids(tmp_path, records, "packed")
    prepare_rows([tmp_path / "in.parquet"], tmp_path / "again", seq_length=SEQ_LENGTH, tokenizer=None, vocab_size=100,
                 pack_multiple=MULTIPLE)  # fmt: skip
    assert files_of(tmp_path / "again") == files_of(packed.path)
    assert documents_of(packed) == [ids[:5], ids[:40], ids[:30]]
    batch = read_batch(packed, [1, 0])
    assert batch.documents is not None
    assert batch.documents.tolist() == [
        *([0, 0, 30], [0, 32, 0], [0, 40, 0], [0, 48, 0], [0, 56, 0]),
        *([1, 0, 5], [1, 8, 40], [1, 48, 0], [1, 56, 0]),
    ]
    assert batch.valid is not None
    expected = torch.zeros(2, SEQ_LENGTH, dtype=torch.bool)
    expected[0, 3:30:3] = expected[1, 3:5] = expected[1, 8 + 3 : 8 + 40 : 3] = True
    expected[1, 4] = False
    assert torch.equal(batch.valid, expected[:, 1:])
    assert one.header.fingerprint != packed.header.fingerprint


def test_what_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    packed = prepare_ids(tmp_path, [{"input_ids": list(range(20))}] * 4)
    file = packed.path / MARKS_FILE
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"the ids or marks \({MARKS_FILE}\) of row 0 are not those"):
        TokenRows(packed.path)[0]
    with pytest.raises(ValueError, match=r"row 0 .*\(1 of 2 rows\)"):
        verify_folder(packed.path)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{MARKS_FILE} is truncated"):
        TokenRows(packed.path)
    header = json.loads((packed.path / "dataset.json").read_text())
    assert RowsHeader.from_file(packed.path / "dataset.json").packing is not None
    header["packing"]["documents"] = 3
    (packed.path / "dataset.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="its fields are not those that were written"):
        TokenRows(packed.path)


IDS = list(range(SEQ_LENGTH))


@pytest.mark.parametrize(
    ("records", "pack_multiple", "message"),
    [
        ([{"input_ids": [*IDS, 1]}], 8, r"ids.jsonl:1: a ready row must have at most --seq-length 64 ids, got 65"),
        ([{"input_ids": IDS}], 24, "--pack-multiple 24: expected a divisor of --seq-length 64"),
        ([{"input_ids": IDS}], 0, "--pack-multiple 0: expected a divisor"),
        ([{"input_ids": [1]}, {"input_ids": []}], 8, "--input: expected a document with a target, got 2 without any"),
        ([{"input_ids": [1, 2], "loss_mask": [1, 2]}], 8, r'ids.jsonl:1: "loss_mask" must be a list of 0 and 1'),
        ([{"input_ids": [1, 2], "loss_mask": None}], 8, r'ids.jsonl:1: "loss_mask" must be a list of 0 and 1'),
        ([{"input_ids": [1, 2], "loss_mask": [1]}], 8, r"must have as many entries as there are ids, 2; got 1"),
        ([{"input_ids": [1, 2], "loss_mask": [1, 0]}], 8, 'ids.jsonl:1: "loss_mask" leaves no target'),
        ([{"input_ids": IDS}, {"input_ids": IDS, "loss_mask": IDS}], None, 'ids.jsonl:2: "loss_mask" must be a list'),
        ([{"input_ids": IDS, "loss_mask": [1] * 64}, {"input_ids": IDS}], None, r'ids.jsonl:2: "loss_mask": expected'),
    ],
)  # fmt: skip
def test_bad_input_is_named(records: list, pack_multiple: int | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_ids(tmp_path, records, pack_multiple=pack_multiple)
    assert not (tmp_path / "ids").exists()
