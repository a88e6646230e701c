"""Preprocessing that is killed goes on: the same bytes in the end, nothing half-written taken for complete, another
command refused; and memory that does not grow with the corpus."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from test_data_prepare import files_of, write_jsonl
from test_data_sources import dataset, zstd
from test_data_tokenizer import TEXT, train_sentencepiece

from megatron_tw.data import prepare, rows_format
from megatron_tw.data.documents import Document, expand_inputs, read_documents
from megatron_tw.data.growing import GrowingFolder
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows, check_fingerprint
from megatron_tw.data.rows_format import RowCounts
from megatron_tw.data.rows_writer import RowsWriter

ROOT = Path(__file__).parent.parent
TEXTS = [TEXT[start : start + 100 + 37 * (start % 11)] for start in range(0, 8000, 100)]


class Killed(BaseException):
    """Like SIGKILL between two documents: nobody handles it."""


@pytest.fixture(scope="module")
def spm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One file of each kind, 80 documents."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "1.jsonl").write_text("\n" + "".join(lines[:20]) + "\n\n")
    (folder / "2.jsonl.zst").write_bytes(zstd("".join(lines[20:40]).encode()))
    dataset(folder / "3", TEXTS[40:79], shards=2)
    (folder / "4.txt").write_text(TEXTS[79])
    return [folder / "1.jsonl", folder / "2.jsonl.zst", folder / "3", folder / "4.txt"]


def begin(inputs: list[Path], output: Path, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Prepare, and be killed after so many documents; what was written last is not yet noted, some of it cut off."""
    real = prepare.read_documents

    def reading(*arguments: Any, **keywords: Any) -> Iterator[Document]:
        for number, document in enumerate(real(*arguments, **keywords)):
            if number == after:
                raise Killed
            yield document

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "SAVE_SECONDS", 0.0)
        patch.setattr(prepare, "GROUP_BYTES", 200)
        patch.setattr(prepare, "read_documents", reading)
        with pytest.raises(Killed):
            prepare_rows(inputs, output, **options)


def test_documents_are_found_again_behind_any_of_them(inputs: list[Path]) -> None:
    files, *_ = expand_inputs(inputs)
    documents = list(read_documents(files, key="text", ready_ids=False))
    assert [document.content for document in documents] == TEXTS
    for number, document in enumerate(documents):
        rest = list(read_documents(files, key="text", ready_ids=False, after=document.place))
        assert [one.content for one in rest] == TEXTS[number + 1 :]
        assert [one.place for one in rest] == [one.place for one in documents[number + 1 :]]
        assert [one.location for one in rest] == [one.location for one in documents[number + 1 :]]


@pytest.mark.parametrize(("workers", "pack_multiple"), [(1, None), (2, None), (1, 4)])
def test_what_is_cut_off_anywhere_ends_the_same(
    inputs: list[Path],
    spm_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    workers: int,
    pack_multiple: int | None,
) -> None:
    options: dict[str, Any] = {"seq_length": 32, "tokenizer": spm_file, "pack_multiple": pack_multiple}
    prepare_rows(inputs, tmp_path / "whole", **options)
    expected = files_of(tmp_path / "whole")
    draw = random.Random(1)
    output = tmp_path / "out"
    for after in (5, 7, 20, 21, 33, 60, 79) if workers == 1 else (70,):
        options["workers"] = workers
        begin(inputs, output, after, monkeypatch, **options)
        partial = tmp_path / "out.partial"
        noted = GrowingFolder(partial).written()
        assert not output.exists()
        assert 0 < noted.documents <= after
        with pytest.raises(ValueError, match="not a dataset folder"):
            TokenRows(partial / "rows")  # what is half-written has no header
        for file in (*(partial / "rows").glob("*.npy"), *(partial / "rows").glob("*.bin")):
            with file.open("ab") as stream:  # as a dying machine leaves it
                stream.write(draw.randbytes(draw.randrange(50)))
        (partial / "rows" / "rows.idx").write_bytes(b"half of it")
        (partial / "progress.json.17.tmp").write_text("{")
        prepare_rows(inputs, output, **options, progress=True)
        assert files_of(output) == expected
        assert not partial.exists()
        told = capsys.readouterr().out
        assert f"going on after {noted.documents} documents and {noted.written.rows} rows" in told
        shutil.rmtree(output)
    for after in (15, 20, 5, 20):  # several times in one
        begin(inputs, output, after, monkeypatch, **options)
    prepare_rows(inputs, output, **options)
    assert files_of(output) == expected


@pytest.mark.parametrize("pack_multiple", [None, 4])
def test_masked_rows_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack_multiple: int | None) -> None:
    draw = random.Random(3)
    lengths = [draw.randint(2, 16) if pack_multiple else 16 for _ in range(60)]
    records = [{"input_ids": [1] * n, "loss_mask": [1] * 2 + draw.choices([0, 1], k=n - 2)} for n in lengths]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    options: dict[str, Any] = {"seq_length": 16, "tokenizer": None, "vocab_size": 320, "pack_multiple": pack_multiple}
    prepare_rows([source], tmp_path / "whole", **options)
    for after in (20, 25):
        begin([source], tmp_path / "out", after, monkeypatch, **options)
    prepare_rows([source], tmp_path / "out", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    begin([source], tmp_path / "out2", 20, monkeypatch, **options)
    write_jsonl(tmp_path / "in.jsonl", [*records[:40], {"input_ids": [1] * 16}])
    monkeypatch.setattr("megatron_tw.data.growing.Plan.differences", lambda self, now: [])
    with pytest.raises(ValueError, match=r'in\.jsonl:41: "loss_mask": expected one, as the document before has one'):
        prepare_rows([source], tmp_path / "out2", **options)


def test_another_command_is_refused(
    inputs: list[Path], spm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text, "other": text} for text in TEXTS])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in TEXTS])
    options: dict[str, Any] = {"seq_length": 32, "tokenizer": spm_file}
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    begin([source], output, 30, monkeypatch, **options)
    before = files_of(partial)
    for paths, changes, message in (
        (
            [source],
            {"seq_length": 16},
            r"out\.partial holds the beginning of other rows: --seq-length: begun with 32, now",
        ),
        (
            [source],
            {"bos_id": 2, "text_key": "other"},
            r"--bos-id: begun with 1, now 2; --text-key: begun with text, now",
        ),
        (
            [other],
            {},
            r"--input: other files than it was begun with, .*\. Remove it to start anew, or choose another --o",
        ),
        ([source, other], {}, r"files of --input: begun with 1, now 2"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_rows(paths, output, **{**options, **changes})
        assert files_of(partial) == before
        assert not output.exists()

    held = os.open(partial / "lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"--output .*out: another process is at it"):
        prepare_rows([source], output, **options)
    os.close(held)

    (partial / "rows" / "rows.bin").write_bytes(b"")  # a disk that lost what it said was there
    with pytest.raises(ValueError, match=r"rows\.bin: \d+ bytes were written, 0 are there: damaged, and removed; run"):
        prepare_rows([source], output, **options)
    assert not partial.exists()
    begin([source], output, 30, monkeypatch, **options, pack_multiple=4)
    next(partial.glob("open_rows_*.npz")).unlink()
    with pytest.raises(ValueError, match=r"open_rows_\d+\.npz is missing: damaged, and removed; run the same command"):
        prepare_rows([source], output, **options, pack_multiple=4)


def test_the_input_may_move_but_not_change(spm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    begin([source], tmp_path / "out", 30, monkeypatch, seq_length=32, tokenizer=spm_file)
    (tmp_path / "elsewhere").mkdir()
    source = source.rename(tmp_path / "elsewhere" / "in.jsonl")
    os.utime(source, ns=(1, 1))
    with pytest.raises(ValueError, match="or changed since"):
        prepare_rows([source], tmp_path / "out", seq_length=32, tokenizer=spm_file)
    shutil.rmtree(tmp_path / "out.partial")
    begin([source], tmp_path / "out", 30, monkeypatch, seq_length=32, tokenizer=spm_file)
    source = source.rename(tmp_path / "in.jsonl")
    assert prepare_rows([source], tmp_path / "out", seq_length=32, tokenizer=spm_file).counts.documents == len(TEXTS)


def test_what_begins_in_its_own_input_goes_on(spm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of what is begun is no input, whatever lies in it when the process is killed."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    begin([tmp_path], tmp_path / "out", 30, monkeypatch, seq_length=32, tokenizer=spm_file)
    (tmp_path / "out.partial" / "rows" / "tokenizer").mkdir()
    (tmp_path / "out.partial" / "rows" / "tokenizer" / "vocab.txt").write_text("a\n")
    header = prepare_rows([tmp_path], tmp_path / "out", seq_length=32, tokenizer=spm_file)
    assert header.counts.documents == len(TEXTS)
    assert source.is_file()


@pytest.mark.parametrize("how", ["written again", "removed"])
def test_input_that_changes_while_it_is_read_is_refused(how: str, tmp_path: Path) -> None:
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", [{"input_ids": [1, 2]}] * 5) for name in ("one", "two"))
    read_documents = prepare.read_documents

    def reading(*arguments: Any, **options: Any) -> Iterator[Document]:
        yield from read_documents(*arguments, **options)
        if how == "removed":
            two.unlink()
        else:
            write_jsonl(two, [{"input_ids": [3, 4]}] * 5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "read_documents", reading)
        with pytest.raises(
            ValueError, match=rf"^--input: {two}: changed while it was read; run the same command again"
        ):
            prepare_rows([one, two], tmp_path / "out", seq_length=2, tokenizer=None)
    assert not set(os.listdir(tmp_path)) - {"one.jsonl", "two.jsonl"}


def test_all_files_are_on_disk_before_the_folder_has_its_name(
    spm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino))
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    prepare_rows([source], tmp_path / "out", seq_length=32, tokenizer=spm_file)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 5
    assert {file.stat().st_ino for file in files} <= synced


def test_wrong_input_leaves_nothing(spm_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
    source = write_jsonl(tmp_path / "in.jsonl", [*({"text": text} for text in TEXTS), {"text": 3}])
    with pytest.raises(ValueError, match=r"in\.jsonl:81"):
        prepare_rows([source], tmp_path / "out", seq_length=32, tokenizer=spm_file)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_process_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL at any moment, of the tool itself: it ends with the same bytes."""
    draw = random.Random(2)
    source = write_jsonl(
        tmp_path / "in.jsonl", [{"input_ids": [1, *(i * j % 300 for j in range(255))]} for i in range(12_000)]
    )
    options = {"seq_length": 256, "tokenizer": None, "vocab_size": 320}
    imported = tmp_path.with_name("imported")
    code = (
        "from megatron_tw.data import prepare; prepare.SAVE_SECONDS = 0.02\n"
        f"open({str(imported)!r}, 'w').close()\n"
        f"prepare.prepare_rows([{str(source)!r}], {str(tmp_path / 'out')!r}, **{options!r})"
    )
    kills = 0
    while not (tmp_path / "out").exists():
        imported.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
        while process.poll() is None and not imported.exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.1, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 2
    assert {path.name for path in tmp_path.iterdir()} <= {"in.jsonl", "out", "out.partial"}
    prepare_rows([source], tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    with pytest.raises(ValueError, match="already exists"):
        prepare_rows([source], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out.partial").exists()  # what a kill after the last rename left


@pytest.mark.parametrize("vocab_size", [320, 65_499, 65_500, None])
def test_the_index_is_megatrons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int | None) -> None:
    monkeypatch.setattr("megatron_tw.data.files.PART_ROWS", 3)  # many parts
    monkeypatch.setattr("megatron_tw.data.appending.PART_ROWS", 3)
    monkeypatch.setattr(rows_format, "PART_ROWS", 3)
    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    writer = RowsWriter(tmp_path, seq_length=4, vocab_size=vocab_size, bos_id=None)
    draw = np.random.default_rng(0)
    documents, count = [], 0
    for document in range(0, 40, 2):  # every other document gave no row
        rows_RN = draw.integers(0, 320, (draw.integers(1, 4), 4))
        offsets_R = np.arange(len(rows_RN)) * 3
        writer.add_document(rows_RN, document, offsets_R)
        builder.add_document(rows_RN.astype(dtype), [4] * len(rows_RN))
        documents += [[document, offset] for offset in offsets_R]
        count += len(rows_RN)
    builder.finalize(str(tmp_path / "theirs.idx"))
    np.save(tmp_path / "theirs.npy", np.array(documents))
    counts = RowCounts(documents=40, tokens=3 * count, rows=count, documents_too_short=20, tokens_dropped=0)
    writer.close(counts, None)
    for ours, theirs in (("rows.bin", "theirs.bin"), ("rows.idx", "theirs.idx"), ("rows_documents.npy", "theirs.npy")):
        assert (tmp_path / ours).read_bytes() == (tmp_path / theirs).read_bytes(), ours
    check_fingerprint(TokenRows(tmp_path))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with its files' sizes: one line-file of any size."""
    for module in ("files", "appending", "rows_format"):
        monkeypatch.setattr(f"megatron_tw.data.{module}.PART_ROWS", 200)  # what is held at a time

    def peak(documents: int) -> int:
        source = tmp_path / f"{documents}.jsonl"
        with source.open("w") as stream:
            for number in range(documents):
                stream.write(json.dumps({"input_ids": [number % 300] * 8}) + "\n")
        tracemalloc.start()
        try:
            prepare_rows([source], tmp_path / str(documents), seq_length=8, tokenizer=None, vocab_size=320)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(500), peak(8_000)
    # 24 bytes a row would be 180 kB, and lists of Python's integers several times that.
    assert many - few < 50_000, (few, many)
