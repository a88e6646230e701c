"""Whether the folders of rows and of cached short NLLs still hold what was written into them: every row is read."""

from collections.abc import Callable
from pathlib import Path

from megatron_tw.data.progress import Progress
from megatron_tw.data.rows import TokenRows, check_fingerprint
from megatron_tw.data.rows_format import HEADER_FILE as ROWS_HEADER
from megatron_tw.data.scores import HEADER_FILE as SCORES_HEADER
from megatron_tw.data.scores import ScoreRows


def verify_folder(folder: str | Path, *, progress: bool = False) -> str:
    """Compare all that a folder of tools/preprocess_data.py or tools/score_tokens.py holds with its checksums.

    Returns:
        what was found to be intact, in one line.

    Raises:
        ValueError: neither kind of folder, or damaged; names the first damaged row and says how many there are.
    """
    folder = Path(folder)
    if (folder / SCORES_HEADER).is_file():
        scores = ScoreRows(folder)
        _each_row(lambda row: scores.check([row]), len(scores), progress)
        weak = " (written without digests: only that they are finite)" if scores.header.digests is None else ""
        return f"{folder}: the short NLLs of {len(scores):,} rows are intact{weak}"
    if not (folder / ROWS_HEADER).is_file():
        raise ValueError(f"--verify {folder}: expected a folder with {ROWS_HEADER} or {SCORES_HEADER}, found neither")
    rows = TokenRows(folder)
    if rows.digests_R is not None:
        _each_row(lambda row: rows[row], len(rows), progress)
    with _progress(len(rows), progress) as bar:
        check_fingerprint(rows, progress=bar.update)
    return f"{folder}: {len(rows):,} rows of {rows.header.seq_length:,} tokens are intact"


def _each_row(check: Callable[[int], object], num_rows: int, progress: bool) -> None:
    first: ValueError | None = None
    damaged = 0
    with _progress(num_rows, progress) as bar:
        for row in range(num_rows):
            try:
                check(row)
            except ValueError as error:
                first, damaged = first or error, damaged + 1
            bar.update()
    if first is not None:
        raise ValueError(f"{first} ({damaged} of {num_rows} rows)")


def _progress(num_rows: int, show: bool) -> Progress:
    return Progress("verifying", num_rows, "rows", show=show)
