"""Documents to a folder of token rows.

    1. read       documents come from the input files in order                  (this process)
    2. tokenize   a group of documents at a time; cut into rows of BOS + N-1    (worker processes)
    3. pack       with --pack: several documents in a row (packing.py)          (this process)
    4. write      rows in input order, counts, header; then rename the folder   (this process)

The result is the same, byte for byte, with any number of workers, and however often the work was cut off and gone on
with (growing.py). Memory is bounded by the largest document, whatever there is of them.

Shapes: R rows, N tokens of a row (`seq_length`).
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_tw.config.layout_checks import LARGEST_ROW
from megatron_tw.config.ranges import at_most
from megatron_tw.data.documents import MASK_KEY, Document, check_memory, expand_inputs, read_documents
from megatron_tw.data.growing import (
    GrowingFolder,
    Plan,
    Written,
    check_unchanged,
    growing_folder,
    input_states,
    inputs_digest,
)
from megatron_tw.data.packing import PackedRow, Packer, Piece
from megatron_tw.data.progress import Progress
from megatron_tw.data.rows_format import TOKENIZER_DIR, RowCounts, RowsHeader, TokenizerInfo, file_digests
from megatron_tw.data.rows_writer import RowsWriter
from megatron_tw.data.tokenizer import Encoder, Tokenizer, load_tokenizer

GROUP_BYTES = 1 << 20  # of documents that travel to a worker together
GROUPS_PER_WORKER = 4  # read ahead; bounds the memory
MOST_WORKERS = 4096  # beyond it, somebody's slip
SAVE_SECONDS = 30.0  # between two notes of how far the work has come
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
    place: tuple[int, int]
    """Document.place."""
    rest: npt.NDArray[np.int32] | None = None
    """For packed rows: what is left after them, as a shorter piece [tokens]; BOS is in front as in a row."""
    targets: npt.NDArray[np.bool_] | None = None
    """Of a ready document: which tokens count."""
    location: str = ""
    """For errors."""


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
    pack_multiple: int | None = None,
) -> RowsHeader:
    """Prepares the rows of `inputs` in the new folder `output` (rows_format.py), going on where a process that
    was given the same was killed.

    Args:
        inputs: files, globs and directories (documents.expand_inputs).
        seq_length: N, tokens of a row.
        tokenizer: path for `load_tokenizer`. None: each document is a ready row of exactly N ids, stored as it is.
        text_key: JSON key or parquet column; default "text", or "input_ids" for ready ids.
        vocab_size: vocabulary size of ready ids; ids are checked against it.
        bos_id: BOS of ready ids, for the header; with a tokenizer, used instead of its BOS.
        workers: processes that tokenize; 1 tokenizes in this one.
        progress: show a progress bar.
        pack_multiple: several documents in a row, each beginning at a multiple of so many tokens; ready documents may
            then be shorter than a row. None: a row never holds two documents, and what is shorter is dropped.

    Raises:
        ValueError: bad option or input; names the option, or the file and line.
        OSError: a file cannot be read or written.
    """
    output = Path(output)
    if seq_length < 2:
        raise ValueError(f"--seq-length {seq_length}: a row needs at least 2 tokens")
    at_most(LARGEST_ROW, seq_length=seq_length)
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    at_most(MOST_WORKERS, workers=workers)
    pack = pack_multiple is not None
    if pack_multiple is not None and (pack_multiple < 1 or seq_length % pack_multiple):
        raise ValueError(f"--pack-multiple {pack_multiple}: expected a divisor of --seq-length {seq_length}")
    files, repeated, skipped = expand_inputs(inputs)
    if skipped and progress:
        what = f"{len(skipped)} folders are rows, tokenizers, models or runs, and skipped"
        print(f"--input: {what}, such as {skipped[0]}")
    if repeated and progress:
        print(f"--input: {repeated} files were named more than once; each of the {len(files)} files is read once")
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    vocab_size, bos_id = _vocabulary(loaded, vocab_size, bos_id)
    if loaded is not None and loaded.kind == "huggingface":  # nobody has measured what others hold
        check_memory(files)
    ready_ids = loaded is None
    key = text_key or ("input_ids" if ready_ids else "text")
    states = input_states(files)
    plan = Plan(
        seq_length=seq_length,
        vocab_size=vocab_size,
        bos_id=bos_id,
        text_key=key,
        tokenizer=loaded.fingerprint if loaded is not None else None,
        library=loaded.library if loaded is not None else None,
        files=len(files),
        inputs=inputs_digest(states),
        pack_multiple=pack_multiple,
    )

    with growing_folder(output, plan) as growing:
        begun, folder = growing.written(), growing.rows
        if begun.documents and progress:
            print(f"going on after {begun.documents:,} documents and {begun.written.rows:,} rows", flush=True)
        writer = RowsWriter(
            folder,
            seq_length=seq_length,
            vocab_size=vocab_size,
            bos_id=bos_id,
            pack_multiple=pack_multiple,
            begun=begun.written,
        )
        packer = None if pack_multiple is None else Packer(seq_length, pack_multiple, growing.open_rows(begun))
        documents = read_documents(files, key=key, ready_ids=ready_ids, after=(begun.file, begun.documents_of_file))
        cut: Iterable[CutDocument]
        if loaded is None:
            cut = (_ready_row(document, seq_length, vocab_size, pack) for document in documents)
        else:
            assert bos_id is not None
            cut = _tokenize(documents, loaded, seq_length, bos_id, workers, pack)
        total_bytes = sum(file.stat().st_size for file in files)
        tokens_per_row = seq_length if ready_ids else seq_length - 1
        with Progress("preparing rows", total_bytes, "B", show=progress, scale=True, begun=begun.input_bytes) as bar:
            done = _write(cut, writer, bar, tokens_per_row, packer, begun, growing)
        check_unchanged(files, states)
        rows = writer.so_far.rows
        if rows == 0 and pack:
            raise ValueError(f"--input: expected a document with a target, got {done.documents} without any")
        if rows == 0:
            raise ValueError(
                f"--seq-length {seq_length}: no document is long enough for one row of BOS + {seq_length - 1} tokens; "
                f"the longest of {done.documents} documents has {done.longest} tokens"
            )
        counts = RowCounts(
            documents=done.documents,
            tokens=done.tokens,
            rows=rows,
            documents_too_short=done.documents_too_short,
            tokens_dropped=done.tokens_dropped,
        )
        if loaded is None:
            return writer.close(counts, None)
        (folder / TOKENIZER_DIR).mkdir(exist_ok=True)
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


def _ready_row(document: Document, seq_length: int, vocab_size: int | None, pack: bool) -> CutDocument:
    ids = document.content
    assert isinstance(ids, np.ndarray)
    if len(ids) > seq_length or (len(ids) < seq_length and not pack):
        most = "at most " if pack else ""
        raise ValueError(
            f"{document.location}: a ready row must have {most}--seq-length {seq_length} ids, got {len(ids)}"
        )
    limit = LARGEST_STORED_ID + 1 if vocab_size is None else vocab_size
    if len(ids) and (ids.min() < 0 or ids.max() >= limit):
        position = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
        raise ValueError(
            f"{document.location}: id {ids[position]} at position {position} is not in 0..{limit - 1} (--vocab-size)"
        )
    row_1N = ids.astype(np.int32)[None]
    rest = row_1N[0] if pack and len(ids) > 1 else None
    rows_RN = row_1N[:0] if pack else row_1N
    return CutDocument(
        rows_RN, len(ids), document.file_bytes, document.place, rest, document.targets, document.location
    )


def _tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, seq_length: int, bos_id: int, workers: int, pack: bool
) -> Iterator[CutDocument]:
    groups, encoder, how = _groups(documents), tokenizer.encoder(), (seq_length, bos_id, pack)
    if workers == 1:
        results: Iterable[list[CutDocument]] = (_cut_group(encoder, *how, group) for group in groups)
    else:
        results = _map_in_order(partial(_cut_group_in_worker, *how), groups, workers, partial(_begin_worker, encoder))
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


def _cut_group(encoder: Encoder, seq_length: int, bos_id: int, pack: bool, group: list[Document]) -> list[CutDocument]:
    cut = []
    texts = [document.content for document in group if isinstance(document.content, str)]
    for document, token_ids in zip(group, encoder.encode_batch(texts), strict=True):
        ids = np.array(token_ids, dtype=np.int32)
        rows_RN = cut_rows(ids, seq_length=seq_length, bos_id=bos_id)
        left = ids[len(rows_RN) * (seq_length - 1) :]
        rest = np.concatenate(([np.int32(bos_id)], left)) if pack and len(left) else None
        cut.append(CutDocument(rows_RN, len(ids), document.file_bytes, document.place, rest))
    return cut


_ENCODER: list[Encoder] = []
"""Of a worker process, sent once."""


def _begin_worker(encoder: Encoder) -> None:
    _end_at_ctrl_c()
    _end_with_parent()
    _ENCODER.append(encoder)


def _cut_group_in_worker(seq_length: int, bos_id: int, pack: bool, group: list[Document]) -> list[CutDocument]:
    return _cut_group(_ENCODER[0], seq_length, bos_id, pack, group)


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


def _end_with_parent() -> None:
    """In a worker, which would wait for work for ever: a parent that was killed says nothing. Seen in a thread."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _map_in_order(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    begin: Callable[[], object] = _end_at_ctrl_c,
) -> Iterator[Result]:
    """`map` over processes: results in the order of the tasks, which are read only a little ahead of the results.
    `begin` is called in each process first.

    (Pool.imap would read all of them.) The processes are spawned, not forked: this one may run threads.

    Raises:
        OSError: a worker was killed.
    """
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin)
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


def _write(
    cut: Iterable[CutDocument],
    writer: RowsWriter,
    bar: Progress,
    tokens_per_row: int,
    packer: Packer | None,
    begun: Written,
    growing: GrowingFolder,
) -> Written:
    """Writes all rows behind those of `begun`, noting now and then how far they have come; returns that."""
    done, saved = begun, time.monotonic()
    for document in cut:
        masked = document.targets is not None
        if done.masked not in (None, masked):
            expected = f"as {'the' if done.masked else 'no'} document before has one"
            raise ValueError(
                f'{document.location}: "{MASK_KEY}": expected {"one" if done.masked else "none"}, {expected}'
            )
        num_rows, num_rest = len(document.rows), 0
        offsets_R = np.arange(num_rows, dtype=np.int64) * tokens_per_row
        if packer is not None:
            for piece in _pieces(document, done.documents, offsets_R, tokens_per_row):
                _write_packed(packer.add(piece), writer)
            num_rest = int(document.rest is not None)
        elif num_rows:
            marks = None if document.targets is None else document.targets[None]
            writer.add_document(document.rows, done.documents, offsets_R, marks)
        file, documents_of_file = document.place
        dropped = 0 if num_rest else document.num_tokens - num_rows * tokens_per_row
        done = Written(
            file=file,
            documents_of_file=documents_of_file,
            documents=done.documents + 1,
            tokens=done.tokens + document.num_tokens,
            documents_too_short=done.documents_too_short + (num_rows + num_rest == 0),
            tokens_dropped=done.tokens_dropped + dropped,
            longest=max(done.longest, document.num_tokens),
            masked=masked,
            input_bytes=done.input_bytes + document.file_bytes,
            written=writer.so_far,
        )
        bar.update(document.file_bytes)
        if time.monotonic() - saved >= SAVE_SECONDS:
            writer.flush()
            growing.save(done, {} if packer is None else packer.state())
            saved = time.monotonic()
    if packer is not None:
        _write_packed(packer.finish(), writer)
    return done


def _pieces(
    document: CutDocument, number: int, offsets_R: npt.NDArray[np.int64], tokens_per_row: int
) -> Iterator[Piece]:
    """A document as packed rows take it: its whole rows, and what is left."""
    for row_N, offset in zip(document.rows, offsets_R.tolist(), strict=True):
        yield Piece(row_N, None, number, offset)
    if document.rest is not None:
        yield Piece(document.rest, document.targets, number, len(document.rows) * tokens_per_row)


def _write_packed(rows: Iterable[PackedRow], writer: RowsWriter) -> None:
    for row in rows:
        writer.add_document(row.ids[None], row.document, np.array([row.offset], dtype=np.int64), row.marks)
