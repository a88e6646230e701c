"""A user's mistake ends a program with one line on stderr and exit status 2; a bug keeps its traceback."""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a tool's `main`: turn an OSError, or a ValueError that this project raised, into `error: ...` on stderr
    and exit status 2.

    A ValueError from inside a library is nobody's wrong option and keeps its traceback. Under a launcher most mistakes
    are seen by every rank at once; rank 0 tells. The others wait GRACE_SECONDS first, in which the launcher ends them:
    without that, the first of them to leave would make the launcher end rank 0 before it has spoken. What only one of
    them saw (a file missing on its machine), it then says itself.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _raised_here(error):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank != 0:
            time.sleep(GRACE_SECONDS)
        where = f" (rank {rank})" if rank != 0 else ""
        print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


def _raised_here(error: BaseException) -> bool:
    """Whether the statement that raised is in this project's own files."""
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(frames[-1].filename).resolve()
    return path.is_relative_to(_PROJECT) and "site-packages" not in path.relative_to(_PROJECT).parts
