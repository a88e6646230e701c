"""Compressed files and Hugging Face datasets as input: the same documents as the plain file, and every damage named."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_data_tokenizer import TEXT

from megatron_tw.data import documents
from megatron_tw.data.documents import Document, expand_inputs, read_documents
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows

TEXTS = [f"{number}: {TEXT[number : 50 + 13 * number]}" for number in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def dataset(folder: Path, texts: list[str], shards: int = 1) -> Path:
    """As `datasets.Dataset.save_to_disk` writes it (version 5)."""
    folder.mkdir(parents=True)
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for shard, name in enumerate(names):
        part = texts[len(texts) * shard // shards : len(texts) * (shard + 1) // shards]
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=40)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read(*inputs: Path | str) -> list[Document]:
    return list(read_documents(expand_inputs(inputs)[0], key="text", ready_ids=False))


def texts_of(*inputs: Path | str) -> list[object]:
    return [document.content for document in read(*inputs)]


def test_every_source_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "TABLE_BATCH_ROWS", 7)
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    compressed = {
        "a.jsonl.gz": gzip.compress(LINES),
        "b.jsonl.gz": gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]),
        "a.jsonl.zst": zstd(LINES),
        "b.json.zst": zstd(LINES[:half]) + zstd(LINES[half:]),
    }
    for name, content in compressed.items():
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / name) == TEXTS, name
        read_bytes = sum(document.file_bytes for document in read(tmp_path / name))
        assert read_bytes == len(content), name  # of the file on disk: what the progress bar counts
    folder = dataset(tmp_path / "datasets" / "one", TEXTS, shards=3)
    assert texts_of(folder) == texts_of(tmp_path / "datasets") == texts_of(f"{tmp_path}/datasets/*") == TEXTS
    sizes = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    assert 0.5 * sizes < sum(document.file_bytes for document in read(folder)) <= sizes
    dataset(tmp_path / "datasets" / "two", TEXTS[:5])
    assert texts_of(tmp_path / "datasets") == texts_of(f"{tmp_path}/datasets/*") == TEXTS + TEXTS[:5]

    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "1.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    (folder / "2.txt.zst").write_bytes(zstd(TEXTS[1].encode()))
    (folder / "3.txt").write_text(TEXTS[2])
    (folder / "4.jsonl.zst").write_bytes(zstd(LINES))
    (folder / "5.log.gz").write_bytes(gzip.compress(b"not in a directory's documents"))
    assert texts_of(folder) == TEXTS[:3] + TEXTS
    assert texts_of(folder / "5.log.gz") == ["not in a directory's documents"]


def test_a_dataset_that_datasets_itself_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [[1, number, 3] for number in range(20)]
    whole = datasets.Dataset.from_dict({"input_ids": rows})
    whole.select(range(19, -1, -1)).save_to_disk(tmp_path / "turned", num_shards=2)
    prepare_rows([tmp_path / "turned"], tmp_path / "rows", seq_length=3, tokenizer=None)
    opened = TokenRows(tmp_path / "rows")
    assert [opened[row].tolist() for row in range(20)] == rows[::-1]
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match=r"dict: a DatasetDict of the splits test, train: name one, such as .*/test$"):
        expand_inputs([tmp_path / "dict"])
    assert len(expand_inputs([tmp_path / "dict" / "train"])[0]) == 1


def cut(file: Path, bytes_left: int) -> None:
    file.write_bytes(file.read_bytes()[:bytes_left])


BIG = LINES * 40  # several buffers
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut gz": ("a.jsonl.gz", lambda file: file.write_bytes(gzip.compress(BIG)[:-100]),
               r"a\.jsonl\.gz: damaged or truncated gzip data after line \d\d+: Compressed file ended"),
    "flipped gz": ("a.jsonl.gz", lambda file: file.write_bytes(gzip.compress(LINES)[:-8] + b"checksum"),
                   r"a\.jsonl\.gz: damaged or truncated gzip data after line \d+: CRC check failed"),
    "no gz": ("a.txt.gz", lambda file: file.write_text("text"), r"a\.txt\.gz: damaged .* gzip data: Not a gz"),
    "cut zst": ("a.jsonl.zst", lambda file: file.write_bytes(zstd(BIG)[:-100]),
                r"a\.jsonl\.zst: damaged or truncated Zstandard data after line \d\d+: Truncated compressed stream"),
    "cut in a frame": ("a.jsonl.zst", lambda file: file.write_bytes(zstd(LINES) + zstd(LINES)[:-9]),
                       r"a\.jsonl\.zst: damaged or truncated Zstandard data after line \d+: Truncated"),
    "no zst": ("a.jsonl.zst", lambda file: file.write_bytes(LINES), r"a\.jsonl\.zst: damaged .* after line 0: ZSTD"),
    "cut text": ("a.txt.zst", lambda file: file.write_bytes(zstd(b"text")[:-2]), r"a\.txt\.zst: damaged or trunc"),
    "nothing in it": ("a.jsonl.gz", lambda file: file.write_bytes(gzip.compress(b"\n")), r"a\.jsonl\.gz: the file"),
    "line of gz": ("a.jsonl.gz", lambda file: file.write_bytes(gzip.compress(LINES + b"[1]")),
                   r"a\.jsonl\.gz:301: expected a JSON object"),
    "parquet in gz": ("a.parquet.gz", lambda file: file.write_bytes(gzip.compress(b"PAR1")),
                      r"a\.parquet\.gz: a compressed \.parquet file cannot be read; decompress it"),
    "shard is missing": ("d", lambda folder: (dataset(folder, TEXTS, 2) / "data-00001-of-00002.arrow").unlink(),
                         r"d/data-00001-of-00002\.arrow is missing: the dataset is incomplete"),
    "cut shard": ("d", lambda folder: cut(dataset(folder, TEXTS) / "data-00000-of-00001.arrow", 4000),
                  r"data-00000-of-00001\.arrow: not a readable arrow file: the mark of its end is missing: truncated"),
    "damaged state": ("d", lambda folder: (dataset(folder, TEXTS) / "state.json").write_text('{"_data_files": [1]}'),
                      r"d/state\.json: not the state of a Hugging Face dataset, or damaged"),
    "old selection": ("d", lambda folder: (dataset(folder, TEXTS) / "state.json").write_text(
        '{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}'),
                      r"d: a selection that an old version of datasets saved"),
    "no rows": ("d", lambda folder: (dataset(folder, TEXTS) / "state.json").write_text('{"_data_files": []}'),
                r"d: the dataset has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_names_the_file(tmp_path: Path, case: str) -> None:
    name, make, message = DAMAGES[case]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_text_beyond_its_buffer_is_an_error(tmp_path: Path) -> None:
    """Arrow itself follows the offset, and the process dies."""
    file = dataset(tmp_path / "d", ["seventy"] * 40) / "data-00000-of-00001.arrow"
    whole, offsets = file.read_bytes(), np.arange(0, 41 * 7, 7, dtype=np.int32)
    right = offsets.tobytes()
    assert whole.count(right) == 1
    offsets[20] = 1 << 30
    file.write_bytes(whole.replace(right, offsets.tobytes()))
    with pytest.raises(ValueError, match=r"\.arrow: not a readable arrow file: .*column 0"):
        read(file)


def test_a_stream_that_ends_between_two_messages_is_truncated(tmp_path: Path) -> None:
    """Arrow itself takes it for whole."""
    file = dataset(tmp_path / "d", TEXTS) / "data-00000-of-00001.arrow"
    cut(file, file.stat().st_size - 8)
    with pyarrow.memory_map(str(file)) as raw:
        assert pyarrow.ipc.open_stream(raw).read_all().num_rows == len(TEXTS)
    with pytest.raises(ValueError, match="the mark of its end is missing"):
        read(file)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    shutil.copyfile(dataset(tmp_path / "d", TEXTS) / "data-00000-of-00001.arrow", tmp_path / "a.arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert texts_of(tmp_path / "a.jsonl.gz") == TEXTS
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: reading Zstandard needs pyarrow"):
        expand_inputs([tmp_path / "a.jsonl.zst"])
    with pytest.raises(ValueError, match=r"a\.arrow: reading an Arrow file needs pyarrow"):
        expand_inputs([tmp_path / "a.arrow"])
