"""Scores while they are being made: parts of some rows each, by any rank in any order, put together at the end.

    OUTPUT.partial/plan.json        the header without the fingerprint: what every part is made with
    OUTPUT.partial/FIRST-END.part   fp32 [END - FIRST, T]: these rows, and 8 bytes of their hash; there once it is
                                    complete
    OUTPUT.partial/complete/        what becomes OUTPUT, while it is put together

A part depends on the plan alone, not on who makes it or when: a run that was cut off goes on with the parts that are
missing, and the result is the same byte for byte.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megatron_tw.data.files import check_place, partial_folder, sync, write_synced
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.rows_format import digest_of_all
from megatron_tw.data.scores import (
    DIGESTS_FILE,
    HEADER_FILE,
    KEYS_FILE,
    ScoreRows,
    ScoresHeader,
    nll_digest,
    row_keys,
)

MAX_PARTS = 4096
DIGEST_BYTES = 8


def check_output(output: str | Path) -> None:
    """That the folder of the scores can be had, or is there with its header. Only looks.

    Raises:
        ValueError: it is neither.
    """
    output = Path(output)
    if (output / HEADER_FILE).is_file():
        return
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output} already exists and is neither empty nor a folder of scores")
    check_place(output)


def rows_per_part(num_rows: int, multiple: int) -> int:
    """Rows of a part: few, so that little is lost in a stop and ranks share evenly; at most MAX_PARTS parts.

    multiple: rows that are scored at once.

    >>> rows_per_part(100, 8), rows_per_part(100_000, 8)
    (8, 32)
    """
    return -(-num_rows // (MAX_PARTS * multiple)) * multiple


class ScoreParts:
    """The parts of one scoring run. Nothing is written before `begin`.

    Args:
        output: folder that the scores get in the end.
        header: of this run, the fingerprint not yet filled in.
        part_rows: rows of a part (the last may have fewer).
    """

    def __init__(self, output: str | Path, header: ScoresHeader, part_rows: int) -> None:
        self.output = Path(output)
        self.folder = partial_folder(self.output)
        self.header = header
        self.part_rows = part_rows

    def __len__(self) -> int:
        return -(-self.header.rows // self.part_rows)

    def check(self) -> bool:
        """Whether the scores are finished. Only reads.

        Raises:
            ValueError: the output, or what an earlier run left of it, was made otherwise; tells every difference.
        """
        check_output(self.output)
        if (self.output / HEADER_FILE).is_file():
            self._require_same(ScoreRows(self.output).header, f"--output {self.output} holds scores of another run")
            return True
        if (self.folder / "plan.json").is_file():
            self._require_same(
                ScoresHeader.from_file(self.folder / "plan.json"), f"{self.folder} holds the parts of another run"
            )
        return False

    def _require_same(self, header: ScoresHeader, what: str) -> None:
        if differences := header.differences(self.header):
            raise ValueError(f"{what}: {'; '.join(differences)}. Choose another --output, or remove that one")

    def begin(self) -> None:
        """Make the folder of the parts, or go on in it. One process does this, after `check`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_synced(self.folder / "plan.json", self.header.to_json().encode())

    def missing(self) -> list[int]:
        """Parts that are still to be made."""
        return [part for part in range(len(self)) if not self._is_there(part)]

    def _is_there(self, part: int) -> bool:
        file, row_bytes = self._file(part), (self.header.seq_length - 1) * 4
        return file.is_file() and file.stat().st_size == len(self.rows_of(part)) * row_bytes + DIGEST_BYTES

    def rows_of(self, part: int) -> range:
        """The dataset's rows that a part holds."""
        return range(part * self.part_rows, min((part + 1) * self.part_rows, self.header.rows))

    def write(self, part: int, nll_RT: npt.NDArray[np.float32]) -> None:
        """Keep a part: all of it or nothing."""
        assert nll_RT.shape == (len(self.rows_of(part)), self.header.seq_length - 1)
        content = nll_RT.astype("<f4").tobytes()
        write_synced(self._file(part), content + _digest(content))

    def _read(self, part: int) -> npt.NDArray[np.float32]:
        """A part's NLLs [rows, T]. One that is damaged is removed, so that the next run makes it again.

        Raises:
            ValueError: it is damaged.
        """
        file = self._file(part)
        content = file.read_bytes()
        if _digest(content[:-DIGEST_BYTES]) != content[-DIGEST_BYTES:]:
            file.unlink()
            raise ValueError(f"{file}: damaged, and removed; run the same command again to make it anew")
        return np.frombuffer(content, "<f4", offset=0, count=len(content) // 4 - DIGEST_BYTES // 4).reshape(
            -1, self.header.seq_length - 1
        )

    def complete(self, rows: TokenRows) -> None:
        """Put the parts together and give the scores their place; `discard` removes the parts. One process does this,
        when no part is missing."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        assert not self.missing()
        folder = self.folder / "complete"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        keys_R3 = row_keys(rows)
        digest = hashlib.sha256(keys_R3.tobytes())
        digests: list[int] = []
        builder = IndexedDatasetBuilder(str(folder / "scores.bin"), dtype=np.float32)
        last_of_document_R = np.append(np.diff(keys_R3[:, 0]) != 0, True)
        for part in range(len(self)):
            nll_RT = self._read(part)
            digest.update(nll_RT.tobytes())
            digests += map(nll_digest, nll_RT)
            for row, nll_T in zip(self.rows_of(part), torch.from_numpy(nll_RT.copy()), strict=True):
                builder.add_item(nll_T)
                if last_of_document_R[row]:
                    builder.end_document()
        builder.finalize(str(folder / "scores.idx"))
        np.save(folder / KEYS_FILE, keys_R3)
        digests_R = np.array(digests, dtype=np.int64)
        np.save(folder / DIGESTS_FILE, digests_R)
        header = dataclasses.replace(
            self.header, fingerprint=digest.hexdigest(), digests=digest_of_all(keys_R3, digests_R)
        )
        (folder / HEADER_FILE).write_text(header.to_json(), encoding="utf-8")
        for file in folder.iterdir():
            sync(file)
        folder.rename(self.output)  # replaces an empty folder, and nothing else

    def discard(self) -> None:
        """Remove the parts, if there are any. One process does this."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: int) -> Path:
        rows = self.rows_of(part)
        return self.folder / f"{rows.start:09d}-{rows.stop:09d}.part"


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
