"""Documents to a folder of token rows.

    1. read       documents come from the input files in order                  (this process)
    2. tokenize   a group of documents at a time; cut into rows of BOS + N-1    (worker processes)
    3. write      rows in input order, counts, header; then rename the folder   (this process)

The result is the same, byte for byte, with any number of workers. Shapes: R rows, N tokens of a row (`seq_length`).
"""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_tw.data.documents import Document, expand_inputs, read_documents
from megatron_tw.data.files import new_folder
from megatron_tw.data.progress import Progress
from megatron_tw.data.rows import TOKENIZER_DIR, RowCounts, RowsHeader, RowsWriter, TokenizerInfo, file_digests
from megatron_tw.data.tokenizer import Tokenizer, load_tokenizer

GROUP_BYTES = 1 << 20  # of documents that travel to a worker together
GROUPS_PER_WORKER = 4  # read ahead; bounds the memory
LARGEST_STORED_ID = np.iinfo(np.int32).max

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CutDocument:
    """The rows of one document."""

    rows: npt.NDArray[np.int32]
    """[R, N]"""
    num_tokens: int
    """Of the whole document, without BOS."""
    file_bytes: int


def cut_rows(token_ids: npt.NDArray[np.int32], *, seq_length: int, bos_id: int) -> npt.NDArray[np.int32]:
    """Cuts a document's tokens into rows of BOS + N-1 tokens [R, N]; a last piece shorter than N-1 is dropped.

    >>> cut_rows(np.arange(10, 18, dtype=np.int32), seq_length=4, bos_id=1)
    array([[ 1, 10, 11, 12],
           [ 1, 13, 14, 15]], dtype=int32)
    """
    tokens_per_row = seq_length - 1
    num_rows = len(token_ids) // tokens_per_row
    rows_RN = np.full((num_rows, seq_length), bos_id, dtype=np.int32)
    rows_RN[:, 1:] = token_ids[: num_rows * tokens_per_row].reshape(num_rows, tokens_per_row)
    return rows_RN


def prepare_rows(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    seq_length: int,
    tokenizer: str | Path | None,
    text_key: str | None = None,
    vocab_size: int | None = None,
    bos_id: int | None = None,
    workers: int = 1,
    progress: bool = False,
) -> RowsHeader:
    """Prepares the rows of `inputs` in the new folder `output` (what it holds: rows.py).

    Args:
        inputs: files, globs and directories (documents.expand_inputs).
        seq_length: N, tokens of a row.
        tokenizer: path for `load_tokenizer`. None: each document is a ready row of exactly N ids, stored as it is.
        text_key: JSON key or parquet column; default "text", or "input_ids" for ready ids.
        vocab_size: vocabulary size of ready ids; ids are checked against it.
        bos_id: BOS of ready ids, for the header; with a tokenizer, used instead of its BOS.
        workers: processes that tokenize; 1 tokenizes in this one.
        progress: show a progress bar.

    Raises:
        ValueError: bad option or input; names the option, or the file and line.
        OSError: a file cannot be read or written.
    """
    output = Path(output)
    if seq_length < 2:
        raise ValueError(f"--seq-length {seq_length}: a row needs at least 2 tokens")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    files, repeated = expand_inputs(inputs)
    if repeated and progress:
        print(f"--input: {repeated} files were named more than once; each of the {len(files)} files is read once")
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    vocab_size, bos_id = _vocabulary(loaded, vocab_size, bos_id)
    ready_ids = loaded is None
    key = text_key or ("input_ids" if ready_ids else "text")

    with new_folder(output) as folder:
        writer = RowsWriter(folder, seq_length=seq_length, vocab_size=vocab_size, bos_id=bos_id)
        documents = read_documents(files, key=key, ready_ids=ready_ids)
        cut: Iterable[CutDocument]
        if loaded is None:
            cut = (_ready_row(document, seq_length, vocab_size) for document in documents)
        else:
            assert bos_id is not None
            cut = _tokenize(documents, loaded, seq_length, bos_id, workers)
        total_bytes = sum(file.stat().st_size for file in files)
        with Progress("preparing rows", total_bytes, "B", show=progress, scale=True) as bar:
            counts, longest = _write(cut, writer, bar, tokens_per_row=seq_length if ready_ids else seq_length - 1)
        if counts.rows == 0:
            raise ValueError(
                f"--seq-length {seq_length}: no document is long enough for one row of BOS + {seq_length - 1} tokens; "
                f"the longest of {counts.documents} documents has {longest} tokens"
            )
        if loaded is None:
            return writer.close(counts, None)
        (folder / TOKENIZER_DIR).mkdir()
        loaded.save(folder / TOKENIZER_DIR)
        info = TokenizerInfo(
            kind=loaded.kind,
            name=loaded.name,
            fingerprint=loaded.fingerprint,
            files=file_digests(folder / TOKENIZER_DIR),
        )
        return writer.close(counts, info)


def _vocabulary(
    tokenizer: Tokenizer | None, vocab_size: int | None, bos_id: int | None
) -> tuple[int | None, int | None]:
    """The vocabulary size and BOS of the rows, checked."""
    if tokenizer is not None:
        if vocab_size is not None:
            raise ValueError(
                f"--vocab-size {vocab_size} is for --tokenizer none; tokenizer {tokenizer.name} has its own"
            )
        vocab_size = tokenizer.vocab_size
        bos_id = tokenizer.bos_id if bos_id is None else bos_id
        if bos_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.name} has no BOS token: give --bos-id, such as its end-of-text token's id"
            )
    if vocab_size is not None and not 1 <= vocab_size <= LARGEST_STORED_ID + 1:
        raise ValueError(f"--vocab-size {vocab_size}: expected 1 to {LARGEST_STORED_ID + 1}")
    if bos_id is not None and not 0 <= bos_id < (vocab_size or LARGEST_STORED_ID + 1):
        raise ValueError(f"--bos-id {bos_id}: not an id of a vocabulary of {vocab_size or LARGEST_STORED_ID + 1}")
    return vocab_size, bos_id


def _ready_row(document: Document, seq_length: int, vocab_size: int | None) -> CutDocument:
    ids = document.content
    assert isinstance(ids, np.ndarray)
    if len(ids) != seq_length:
        raise ValueError(f"{document.location}: a ready row must have --seq-length {seq_length} ids, got {len(ids)}")
    limit = LARGEST_STORED_ID + 1 if vocab_size is None else vocab_size
    if ids.min() < 0 or ids.max() >= limit:
        position = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
        raise ValueError(
            f"{document.location}: id {ids[position]} at position {position} is not in 0..{limit - 1} (--vocab-size)"
        )
    return CutDocument(ids.astype(np.int32)[None], len(ids), document.file_bytes)


def _tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, seq_length: int, bos_id: int, workers: int
) -> Iterator[CutDocument]:
    groups = _groups(documents)
    if workers == 1:
        results: Iterable[list[CutDocument]] = (_cut_group(tokenizer, seq_length, bos_id, group) for group in groups)
    else:
        results = _map_in_order(partial(_cut_group_in_worker, tokenizer.path, seq_length, bos_id), groups, workers)
    for group in results:
        yield from group


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that a worker gets at once: small ones together, because a message costs time too."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.content)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _cut_group(tokenizer: Tokenizer, seq_length: int, bos_id: int, group: list[Document]) -> list[CutDocument]:
    cut = []
    for document in group:
        assert isinstance(document.content, str)
        ids = np.array(tokenizer.encode(document.content), dtype=np.int32)
        rows_RN = cut_rows(ids, seq_length=seq_length, bos_id=bos_id)
        cut.append(CutDocument(rows_RN, len(ids), document.file_bytes))
    return cut


def _cut_group_in_worker(path: Path, seq_length: int, bos_id: int, group: list[Document]) -> list[CutDocument]:
    return _cut_group(_worker_tokenizer(path), seq_length, bos_id, group)


@cache
def _worker_tokenizer(path: Path) -> Tokenizer:
    """Opened once a worker process."""
    return load_tokenizer(path)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ctrl-C waits until the end; a process that is started inside keeps it waiting until `_end_at_ctrl_c`."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as in a shell's background
    if ignored or threading.current_thread() is not threading.main_thread():  # only that one is told of signals
        yield
        return
    waiting: list[int] = []
    # Blocked for the process that is started; noted for this one, some thread of which may get the signal all the same.
    handler = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if waiting:
        raise KeyboardInterrupt


def _end_at_ctrl_c() -> None:
    """In a worker: at once and without a word, unless the parent ignores it. The parent speaks."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _map_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """`map` over processes: results in the order of the tasks, which are read only a little ahead of the results.

    (Pool.imap would read all of them.) The processes are spawned, not forked: this one may run threads.

    Raises:
        OSError: a worker was killed.
    """
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_at_ctrl_c)
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            with _without_ctrl_c():  # this starts workers
                pending.append(pool.submit(function, task))
            if len(pending) >= workers * GROUPS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise OSError(f"--workers {workers}: one of them was killed; fewer take less memory") from None
    except BaseException:
        for worker in active_children():  # what they are at is of no use to anybody
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _write(cut: Iterable[CutDocument], writer: RowsWriter, bar: Progress, tokens_per_row: int) -> tuple[RowCounts, int]:
    """Writes all rows; returns the counts and the length of the longest document in tokens."""
    documents = tokens = rows = too_short = longest = 0
    for document in cut:
        num_rows = len(document.rows)
        if num_rows:
            offsets_R = np.arange(num_rows, dtype=np.int64) * tokens_per_row
            writer.add_document(document.rows, documents, offsets_R)
        documents += 1
        tokens += document.num_tokens
        rows += num_rows
        too_short += num_rows == 0
        longest = max(longest, document.num_tokens)
        bar.update(document.file_bytes)
    counts = RowCounts(
        documents=documents,
        tokens=tokens,
        rows=rows,
        documents_too_short=too_short,
        tokens_dropped=tokens - rows * tokens_per_row,
    )
    return counts, longest
