"""tools/preprocess_data.py and its parts: every format and any number of workers give the same rows; every error."""

import doctest
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_data_tokenizer import TEXT, train_hugging_face, train_sentencepiece

from megatron_tw.data import documents, prepare
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
TEXTS = [TEXT[:6000], "too short", TEXT[6000:9000] + " é\r\n", "", TEXT[9000:18000]]
SEQ_LENGTH = 64


@pytest.fixture(scope="module")
def spm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools" / "preprocess_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_jsonl(file: Path, records: list) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_docstring_example() -> None:
    assert doctest.testmod(prepare) == (0, 1)


def test_rows_are_bos_and_pieces_of_one_document(tmp_path: Path, spm_file: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    header = prepare_rows([source], tmp_path / "out", seq_length=SEQ_LENGTH, tokenizer=spm_file)
    rows = TokenRows(tmp_path / "out")
    assert rows.header == header

    tokenizer = load_tokenizer(spm_file)
    expected_rows, expected_documents, num_tokens, too_short = [], [], 0, 0
    for number, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        num_tokens += len(ids)
        too_short += len(ids) < SEQ_LENGTH - 1
        for offset in range(0, len(ids) - (SEQ_LENGTH - 1) + 1, SEQ_LENGTH - 1):
            expected_rows.append([1, *ids[offset : offset + SEQ_LENGTH - 1]])
            expected_documents.append([number, offset])
    assert [list(rows[index]) for index in range(len(rows))] == expected_rows
    assert rows.documents_R2.tolist() == expected_documents
    counts = header.counts
    assert (counts.documents, counts.tokens, too_short) == (5, num_tokens, 2)
    assert counts.documents_too_short == too_short
    assert counts.rows == len(expected_rows)
    assert counts.tokens_dropped == num_tokens - counts.rows * (SEQ_LENGTH - 1) > 0
    assert (header.vocab_size, header.bos_id, header.dtype) == (400, 1, "uint16")
    assert header.tokenizer is not None
    assert header.tokenizer.fingerprint == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "out" / "tokenizer").fingerprint == tokenizer.fingerprint


def test_a_last_piece_of_exactly_a_row_is_kept(tmp_path: Path, spm_file: Path) -> None:
    ids = load_tokenizer(spm_file).encode(TEXT[:500])
    (tmp_path / "a.txt").write_text(TEXT[:500])
    for seq_length, num_rows in ((len(ids) + 1, 1), (len(ids), 1), (len(ids) // 2 + 1, 2)):
        header = prepare_rows(
            [tmp_path / "a.txt"], tmp_path / str(seq_length), seq_length=seq_length, tokenizer=spm_file
        )
        assert header.counts.rows == num_rows
        assert header.counts.tokens_dropped == len(ids) - num_rows * (seq_length - 1)


def test_every_format_gives_the_same_rows(tmp_path: Path, spm_file: Path) -> None:
    texts = [text for text in TEXTS if text]  # a text file cannot be an empty document
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text.encode())
    (folder / "notes.md").write_text("not in a directory's documents")
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": text} for text in texts])
    jsonl.write_text("\n" + jsonl.read_text() + "\n \n")  # blank lines are no documents
    other_key = write_jsonl(tmp_path / "b.json", [{"content": text} for text in texts])
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"other": list(range(len(texts))), "text": texts}), parquet)
    first, rest = write_jsonl(tmp_path / "1.jsonl", [{"text": texts[0]}]), tmp_path / "2.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[1:]}), rest)

    inputs: list[tuple[list[Path | str], str | None]] = [
        ([folder / f"{number}.txt" for number in range(len(texts))], None),
        ([tmp_path / "texts"], None),
        ([f"{tmp_path}/texts/**/*.txt"], None),
        ([jsonl], None),
        ([other_key], "content"),
        ([parquet], None),
        ([first, rest], None),
    ]
    prepared = []
    for number, (paths, text_key) in enumerate(inputs):
        output = tmp_path / f"out{number}"
        prepare_rows(paths, output, seq_length=SEQ_LENGTH, tokenizer=spm_file, text_key=text_key)
        prepared.append(files_of(output))
    assert set(prepared[0]) == {
        *("dataset.json", "rows.bin", "rows.idx", "rows_documents.npy", "rows_digests.npy"),
        *("tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json"),
    }
    assert all(files == prepared[0] for files in prepared[1:])


def test_input_order_is_kept(tmp_path: Path, spm_file: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(TEXT[:2000])
    two.write_text("\ufeff" + TEXT[2000:5000], encoding="utf-8")  # the byte-order mark is no part of the text
    rows = {}
    for name, paths in {"12": [one, two], "21": [two, one], "1": [one], "2": [two]}.items():
        prepare_rows(paths, tmp_path / name, seq_length=32, tokenizer=spm_file)
        opened = TokenRows(tmp_path / name)
        rows[name] = [list(opened[index]) for index in range(len(opened))]
    assert rows["12"] == rows["1"] + rows["2"]
    assert rows["21"] == rows["2"] + rows["1"]
    assert rows["2"][0][1:] == load_tokenizer(spm_file).encode(TEXT[2000:5000])[:31]


def test_several_workers_write_the_same_bytes(tmp_path: Path, spm_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "GROUP_BYTES", 1000)  # many groups, so that order matters
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": TEXT[start : start + 700]} for start in range(0, 18000, 300)])
    for workers in (1, 3):
        prepare_rows([source], tmp_path / str(workers), seq_length=32, tokenizer=spm_file, workers=workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    assert TokenRows(tmp_path / "1").header.counts.documents == 60


def test_reading_ahead_is_bounded() -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = prepare._map_in_order(str, tasks(), workers=2)
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]
    assert len(taken) <= 3 + 2 * prepare.GROUPS_PER_WORKER
    results.close()  # type: ignore[attr-defined]


def test_hugging_face_tokenizer(tmp_path: Path) -> None:
    folder = train_hugging_face(tmp_path / "byte_bpe")
    (tmp_path / "a.txt").write_text(TEXT)
    header = prepare_rows([tmp_path / "a.txt"], tmp_path / "out", seq_length=128, tokenizer=folder)
    ids = load_tokenizer(folder).encode(TEXT)
    assert header.counts.rows == len(ids) // 127 > 10
    assert list(TokenRows(tmp_path / "out")[1]) == [0, *ids[127:254]]
    assert load_tokenizer(tmp_path / "out" / "tokenizer").fingerprint == load_tokenizer(folder).fingerprint


def test_bos_of_a_tokenizer_without_one(tmp_path: Path) -> None:
    folder = train_hugging_face(tmp_path / "no_bos", bos_token=None)
    (tmp_path / "a.txt").write_text(TEXT[:3000])
    with pytest.raises(ValueError, match=r"tokenizer no_bos has no BOS token: give --bos-id"):
        prepare_rows([tmp_path / "a.txt"], tmp_path / "out", seq_length=32, tokenizer=folder)
    header = prepare_rows([tmp_path / "a.txt"], tmp_path / "out", seq_length=32, tokenizer=folder, bos_id=7)
    rows = TokenRows(tmp_path / "out")
    assert header.bos_id == 7
    assert all(rows[index][0] == 7 for index in range(len(rows)))


def test_ready_rows_are_stored_as_they_are(tmp_path: Path, reference: Path) -> None:
    ids = np.load(reference / "windows.npz")["input_ids"]
    jsonl = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": row.tolist()} for row in ids])
    parquet = tmp_path / "ids.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"ids": ids.tolist()}), parquet)
    header = prepare_rows([jsonl], tmp_path / "a", seq_length=256, tokenizer=None, vocab_size=320, bos_id=1)
    prepare_rows([parquet], tmp_path / "b", seq_length=256, tokenizer=None, vocab_size=320, bos_id=1, text_key="ids")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    rows = TokenRows(tmp_path / "a")
    assert np.array_equal([rows[index] for index in range(4)], ids)
    assert rows.documents_R2.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert (header.vocab_size, header.bos_id, header.dtype, header.tokenizer) == (320, 1, "uint16", None)
    assert header.largest_id == ids.max()
    assert (header.counts.tokens, header.counts.tokens_dropped, header.counts.rows) == (1024, 0, 4)


def test_dtype_holds_the_vocabulary(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": [0, 128_255, 70_000]}])
    for vocab_size in (128_256, None):
        output = tmp_path / str(vocab_size)
        header = prepare_rows([source], output, seq_length=3, tokenizer=None, vocab_size=vocab_size)
        assert (header.dtype, header.largest_id) == ("int32", 128_255)
        assert TokenRows(output)[0].tolist() == [0, 128_255, 70_000]


def corrupt_parquet(file: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT]}), file)
    file.write_bytes(file.read_bytes()[:-20])


def text_of_bytes(values: list[bytes]) -> pyarrow.Array:
    """A column that says it is text, whatever the bytes are."""
    column = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), column.buffers())


TEXT_ERRORS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty file": ("a.txt", lambda file: file.write_text(""), r"a\.txt: the file is empty"),
    "blank lines only": ("a.jsonl", lambda file: file.write_text("\n \n"), r"a\.jsonl: the file holds no documents"),
    "not UTF-8": ("a.txt", lambda file: file.write_bytes(b"good\nb\xffad"), r"a\.txt:2: not UTF-8 text \(byte 0xff\)"),
    "not UTF-8 line": (
        "a.jsonl",
        lambda file: file.write_bytes(b'{"text": ""}\n\n\xe9'),
        r"a\.jsonl:3: not UTF-8 text",
    ),
    "malformed": (
        "a.jsonl",
        lambda file: file.write_text('{"text": "a"}\n{"text"'),
        r"a\.jsonl:2: malformed JSON: .* \(column",
    ),
    "integer too long": (
        "a.jsonl",
        lambda file: file.write_text('{"text": "a"}\n{"text": ' + "9" * 5000 + "}"),
        r"a\.jsonl:2: the JSON holds an integer of thousands of digits$",
    ),
    "nested": (
        "a.jsonl",
        lambda file: file.write_text('{"text": "a"}\n' + "[" * 200_000),
        r"a\.jsonl:2: the JSON is nested too deeply$",
    ),
    "mask of text": (
        "a.jsonl",
        lambda file: file.write_text('{"text": "a"}\n{"text": "b", "loss_mask": [1]}'),
        r"a\.jsonl:2: \"loss_mask\" has a number for each of ready ids \(--tokenizer none\), got one beside text",
    ),
    "mask of a table's text": (
        "a.parquet",
        lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "loss_mask": [[1]]}), file),
        r"a\.parquet: \"loss_mask\" has a number for each of ready ids",
    ),
    "nothing but a byte-order mark": (
        "a.txt",
        lambda file: file.write_bytes(b"\xef\xbb\xbf"),
        r"a\.txt: the file is empty",
    ),
    "nothing compressed": (
        "a.txt.gz",
        lambda file: file.write_bytes(gzip.compress(b"")),
        r"a\.txt\.gz: the file is empty",
    ),
    "no object": ("a.jsonl", lambda file: file.write_text("[1]\n"), r"a\.jsonl:1: expected a JSON object, got list"),
    "no key": (
        "a.jsonl",
        lambda file: file.write_text('{"body": ""}'),
        r"a\.jsonl:1: no key \"text\" among \['body'\] \(see --text-key",
    ),
    "no text": ("a.jsonl", lambda file: file.write_text('{"text": 3}'), r"a\.jsonl:1: \"text\" must be text, got int"),
    "surrogate": (
        "a.jsonl",
        lambda file: file.write_text(r'{"text": "a\ud800"}'),
        r"a\.jsonl:1: .* unpaired surrogate at character 1",
    ),
    "broken parquet": ("a.parquet", corrupt_parquet, r"a\.parquet: not a readable parquet file"),
    "no column": (
        "a.parquet",
        lambda file: pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), file),
        r"a\.parquet: no column \"text\" among \['body'\]",
    ),
    "not UTF-8 column": (
        "a.parquet",
        lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": text_of_bytes([b"good", b"b\xffad"])}), file),
        r"a\.parquet: row 2: \"text\" is not UTF-8 text \(byte 0xff\)",
    ),
    "two columns": (
        "a.parquet",
        lambda file: pyarrow.parquet.write_table(
            pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]), file
        ),
        r"a\.parquet: expected one column \"text\", got 2",
    ),
    "no rows": (
        "a.parquet",
        lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file),
        r"a\.parquet: the table has no rows",
    ),
    "null": (
        "a.parquet",
        lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), file),
        r"a\.parquet: row 2: \"text\" must be text, got NoneType",
    ),
    "too short": (
        "a.txt",
        lambda file: file.write_text("short"),
        r"--seq-length 64: no document .* the longest of 1 documents has \d",
    ),
}


@pytest.mark.parametrize("case", TEXT_ERRORS)
def test_text_errors_name_file_and_line(tmp_path: Path, spm_file: Path, case: str) -> None:
    name, write, message = TEXT_ERRORS[case]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        prepare_rows([tmp_path / name], tmp_path / "out", seq_length=SEQ_LENGTH, tokenizer=spm_file)
    assert os.listdir(tmp_path) == [name]  # nothing half-written is left


ID_ERRORS = {
    "negative": ([1, -100, 3], r"a\.jsonl:2: id -100 at position 1 is not in 0\.\.319 \(--vocab-size\)"),
    "beyond the vocabulary": ([1, 2, 320], r"a\.jsonl:2: id 320 at position 2 is not in 0\.\.319"),
    "beyond 64 bits": ([1, 2, 2**70], r"a\.jsonl:2: \"input_ids\" holds an id beyond 64 bits"),
    "too long": ([1, 2, 3, 4], r"a\.jsonl:2: a ready row must have --seq-length 3 ids, got 4"),
    "empty": ([], r"a\.jsonl:2: a ready row must have --seq-length 3 ids, got 0"),
    "float": ([1, 2, 3.0], r"a\.jsonl:2: \"input_ids\" must be a list of integers"),
    "bool": ([1, 2, True], r"a\.jsonl:2: \"input_ids\" must be a list of integers"),
    "text": ("123", r"a\.jsonl:2: \"input_ids\" must be a list of integers"),
}


@pytest.mark.parametrize("case", ID_ERRORS)
def test_ready_id_errors_name_file_and_line(tmp_path: Path, case: str) -> None:
    value, message = ID_ERRORS[case]
    source = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}, {"input_ids": value}])
    with pytest.raises(ValueError, match=message):
        prepare_rows([source], tmp_path / "out", seq_length=3, tokenizer=None, vocab_size=320)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_option_errors_name_the_option(tmp_path: Path, spm_file: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    ids = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}])
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    cases: list[tuple[str, list, dict]] = [
        (r"--seq-length 1: a row needs", [text], {"tokenizer": spm_file, "seq_length": 1}),
        (r"--workers 0", [text], {"tokenizer": spm_file, "workers": 0}),
        (r"--vocab-size 400 is for --tokenizer none", [text], {"tokenizer": spm_file, "vocab_size": 400}),
        (r"--bos-id 400: not an id of a vocabulary of 400", [text], {"tokenizer": spm_file, "bos_id": 400}),
        (r"--bos-id -1: not an id", [ids], {"tokenizer": None, "bos_id": -1}),
        (r"--vocab-size 0", [ids], {"tokenizer": None, "vocab_size": 0}),
        (r"a\.txt: --tokenizer none reads ready ids from", [text], {"tokenizer": None}),
        (r"--input .*/gone\.txt: no such file", [tmp_path / "gone.txt"], {"tokenizer": spm_file}),
        (r"--input .*/\*\.py: .* no glob that matches", [f"{tmp_path}/*.py"], {"tokenizer": spm_file}),
        (
            r"--input .*/empty: the directory holds no \.txt, .*empty/\*\*/\*\.py'",
            [tmp_path / "empty"],
            {"tokenizer": spm_file},
        ),
        (r"--input names no file", [], {"tokenizer": spm_file}),
    ]
    for message, inputs, options in cases:
        with pytest.raises(ValueError, match=message):
            prepare_rows(inputs, out, **({"seq_length": 2} | options))
        assert not out.exists()


def test_output_must_be_new_or_empty(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}])
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    prepare_rows([source], out, seq_length=2, tokenizer=None)
    before = files_of(out)
    with pytest.raises(ValueError, match=r"--output .*out already exists and is not an empty folder"):
        prepare_rows([source], out, seq_length=2, tokenizer=None)
    assert files_of(out) == before
    with pytest.raises(ValueError, match=r"--output .*a\.jsonl already exists"):
        prepare_rows([source], source, seq_length=2, tokenizer=None)


def test_an_output_whose_place_cannot_be_taken_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("gone")
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(prepare, "read_documents", None)
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "empty") or ismount(path))
    for output, message in (
        (tmp_path / "link", f"found a link; give the folder: {tmp_path}/empty"),
        (tmp_path / "dangling", f"found a link; give the folder: {tmp_path}/gone"),
        (tmp_path / "empty", f"found a mount point; give a folder in it, such as {tmp_path}/empty/out"),
        (Path("."), "--output .: expected the name of a new folder, such as out"),
        (Path("/"), "--output / already exists and is not an empty folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            prepare_rows([source], output, seq_length=2, tokenizer=None)
        assert str(caught.value).startswith(f"--output {output}")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "dangling", "empty", "link"]
    assert os.listdir(tmp_path / "empty") == []


def test_a_directory_does_not_stand_for_what_is_prepared_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows with the tokenizer's vocab.txt, a tokenizer, a run, what is left of a preprocessing."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one two three " * 40)
    tokenizer = train_hugging_face(corpus / "tokenizer")
    (tokenizer / "merges.txt").write_text("a b\n")
    options: dict[str, Any] = {"seq_length": 8, "tokenizer": tokenizer, "progress": True}
    first = prepare_rows([corpus], corpus / "rows", **options)
    assert "--input: 1 folders are rows, tokenizers, models or runs, and skipped" in capsys.readouterr().out
    for name in ("run/latest_checkpointed_iteration.txt", "cut.partial/rows/b.txt"):
        (corpus / name).parent.mkdir(parents=True)
        (corpus / name).write_text("30\n")
    assert (corpus / "rows" / "tokenizer" / "merges.txt").is_file()
    assert prepare_rows([corpus], corpus / "again", **options) == first
    assert "--input: 4 folders are rows, tokenizers, models or runs, and skipped" in capsys.readouterr().out
    assert first.counts.documents == 1
    message = rf"--input {corpus}/rows: .* outside {corpus}/rows, which is rows, a tokenizer, a model or a run; name"
    with pytest.raises(ValueError, match=message):
        prepare_rows([corpus / "rows"], corpus / "third", **options)


def test_tool(tmp_path: Path, spm_file: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:4000])
    (tmp_path / "b.txt").write_text("short")
    arguments = [
        "--input",
        str(tmp_path),
        "--tokenizer",
        str(spm_file),
        "--seq-length",
        "64",
        "--output",
        str(tmp_path / "out"),
    ]
    tool.main(arguments)
    counts = TokenRows(tmp_path / "out").header.counts
    out = capsys.readouterr().out
    assert f"2 documents, {counts.tokens:,} tokens -> {counts.rows} rows of 64 tokens" in out
    assert f"1 documents too short for a row; {counts.tokens_dropped:,} tokens dropped" in out

    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments)
    assert capsys.readouterr().err == f"error: --output {tmp_path / 'out'} already exists and is not an empty folder\n"

    ids = write_jsonl(tmp_path / "ids.jsonl", [{"row": [5, 6, 7]}])
    arguments = ["--input", str(ids), "--tokenizer", "none", "--seq-length", "3", "--output", str(tmp_path / "ids")]
    tool.main([*arguments, "--text-key", "row", "--vocab-size", "8", "--bos-id", "5"])
    assert TokenRows(tmp_path / "ids").header.bos_id == 5


def test_tool_help_needs_neither_torch_nor_megatron() -> None:
    """Worker processes import the tool again: it must stay light."""
    code = (
        "import runpy, sys; sys.argv = ['preprocess_data.py', '--help']\n"
        "try: runpy.run_path('tools/preprocess_data.py', run_name='__main__')\n"
        "finally: print('heavy:', sorted({'torch', 'megatron', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--seq-length N" in done.stdout
    assert "heavy: []" in done.stdout


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: reading parquet needs pyarrow"):
        list(documents.read_documents([file], key="text", ready_ids=False))


def test_a_file_named_twice_is_read_once(tmp_path: Path, spm_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the same name, an overlapping glob, a link to it, and a loop of links to folders."""
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("one two three " * 40)
    (books / "b.txt").write_text("four five six " * 40)
    (books / "link.txt").symlink_to(books / "a.txt")
    (books / "loop").symlink_to(books, target_is_directory=True)
    once = prepare_rows([books / "a.txt", books / "b.txt"], tmp_path / "once", seq_length=8, tokenizer=spm_file)
    inputs: list[str | Path] = [books, books / "b.txt", str(books / "*.txt"), str(books / "**" / "*.txt")]
    again = prepare_rows(inputs, tmp_path / "again", seq_length=8, tokenizer=spm_file, progress=True)
    assert again == once
    assert "files were named more than once; each of the 2 files is read once" in capsys.readouterr().out


def test_a_text_file_that_memory_does_not_hold_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_hugging_face(tmp_path / "tokenizer")
    (tmp_path / "docs").mkdir()
    lines = write_jsonl(tmp_path / "docs" / "b.jsonl", [{"text": TEXT[:2000]}] * 9)
    small, large = tmp_path / "docs" / "small.txt", tmp_path / "docs" / "large.txt"
    small.write_text(TEXT[:1500])
    with large.open("wb") as file:
        file.truncate(10**10)  # nothing of it is on disk
    options: dict[str, Any] = {"seq_length": 64, "tokenizer": tokenizer}
    monkeypatch.setattr(documents.psutil, "virtual_memory", lambda: SimpleNamespace(available=240_000))
    monkeypatch.setattr(prepare, "read_documents", None)
    with pytest.raises(ValueError) as caught:
        prepare_rows([tmp_path / "docs"], tmp_path / "out", **options)
    assert str(caught.value) == (
        f"{large}: a text file is one document, which is held whole while it is tokenized: 10 GB take about 1,200 GB "
        "of memory, 0.00024 GB are available; make it several documents, each a line of a .jsonl file"
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(documents.psutil, "virtual_memory", lambda: SimpleNamespace(available=240_000))
    assert lines.stat().st_size > 2000
    assert prepare_rows([lines, small], tmp_path / "out", **options).counts.documents == 10


def test_the_multiple_of_packed_rows_is_128_and_the_padding_is_told(
    tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [200, 50, 100]
    source = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": [5] * length} for length in lengths])
    common = ["--input", str(source), "--tokenizer", "none", "--vocab-size", "9", "--seq-length", "256"]
    tool.main([*common, "--pack", "--output", str(tmp_path / "rows")])
    packing = TokenRows(tmp_path / "rows").header.packing
    assert packing is not None
    assert packing.multiple == 128
    padding = 2 * 256 - sum(lengths)  # a row of 200 + 56, and one of 50 + 78 + 100 + 28
    assert packing.padding_tokens == padding == 162
    assert "packed: 3 documents and pieces at multiples of 128 tokens; 162 tokens of padding (31.6%)\n" in (
        capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        tool.main([*common, "--pack-multiple", "128", "--output", str(tmp_path / "other")])
    assert "--pack-multiple 128: expected --pack with it" in capsys.readouterr().err
