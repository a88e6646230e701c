"""How fast documents become rows: tools/preprocess_data.py's throughput a core, beside the tokenizer library's own.

    python tools/benchmarks/preprocess.py --tokenizer DIR --input FILES [--workers 1 2] [--megabytes 30]

The library's own speed is that of `encode_batch_fast` (its fastest call: no offsets) of the same documents, already
read, on one thread. Ours counts everything: reading, decoding JSON, tokenizing, cutting, digests, writing, in all
processes; but not what the same command takes for one short document, which is the start of the processes and told
apart. Seconds are of processors, which others on the machine disturb less than the clock; ratios by the clock stand
beside them. Library and ours take turns; a ratio is the median of those of the rounds.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, before the library is loaded

from tokenizers import Tokenizer

from megatron_tw.data.documents import expand_inputs, read_documents
from megatron_tw.data.prepare import prepare_rows

ROUNDS = 3
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Speed:
    """Seconds of one round."""

    processor: float
    wall: float

    def minus(self, other: "Speed") -> "Speed":
        return Speed(self.processor - other.processor, self.wall - other.wall)


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(work: Callable[[], object]) -> Speed:
    before, start = processor_seconds(), time.monotonic()
    work()
    return Speed(processor_seconds() - before, time.monotonic() - start)


def processor_name() -> str:
    """The model name in /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def texts_of(inputs: Sequence[str], megabytes: float) -> list[str]:
    """Documents of `inputs`, repeated until they are so large, in parts of at most 100,000 characters."""
    files, *_ = expand_inputs(inputs)
    read = [document.content for document in read_documents(files, key="text", ready_ids=False)]
    parts = [text[at : at + 100_000] for text in read if isinstance(text, str) for at in range(0, len(text), 100_000)]
    texts: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        for text in parts:
            texts.append(text)
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return texts


def library_alone(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Ids of all texts, in batches as large as ours."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            [encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
            batch, size = [], 0
    [encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="with a tokenizer.json")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="text to make documents of")
    parser.add_argument("--megabytes", type=float, default=30, metavar="X", help="of text [30]")
    parser.add_argument("--seq-length", type=int, default=4096, metavar="N", help="[4096]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="W", help="[1 2]")
    parser.add_argument("--bos-id", type=int, metavar="ID")
    options = parser.parse_args(argv)
    texts = texts_of(options.input, options.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    library: list[Speed] = []
    starts: dict[int, list[Speed]] = {workers: [] for workers in options.workers}
    ours: dict[int, list[Speed]] = {workers: [] for workers in options.workers}
    with tempfile.TemporaryDirectory() as folder:
        source, one = Path(folder) / "documents.jsonl", Path(folder) / "one.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        one.write_text(json.dumps({"text": texts[0][:1000]}) + "\n")

        def prepare(file: Path, workers: int, seq_length: int) -> None:
            output = Path(folder) / "rows"
            prepare_rows(
                [file],
                output,
                seq_length=seq_length,
                tokenizer=options.tokenizer,
                bos_id=options.bos_id,
                workers=workers,
            )
            shutil.rmtree(output)

        prepare(one, 1, 16)  # imports
        for _ in range(ROUNDS):
            library.append(timed(lambda: library_alone(tokenizer, texts)))
            for workers in options.workers:
                start = timed(partial(prepare, one, workers, 16))
                starts[workers].append(start)
                ours[workers].append(timed(partial(prepare, source, workers, options.seq_length)))
    print(f"{processor_name()}; {len(texts)} documents, {megabytes:.1f} MB, rows of {options.seq_length} tokens")
    print(
        f"the library alone, one thread: {megabytes / min(one.processor for one in library):.2f} MB a processor second"
    )
    for workers, found in ours.items():
        without_start = [one.minus(start) for one, start in zip(found, starts[workers], strict=True)]
        pairs = list(zip(library, without_start, strict=True))
        a_core = [alone.processor / speed.processor for alone, speed in pairs]
        started = median(alone.processor / speed.processor for alone, speed in zip(library, found, strict=True))
        by_the_clock = median(alone.wall / speed.wall for alone, speed in pairs)
        print(
            f"--workers {workers}: {median(a_core):.2f} of it a core (rounds: {min(a_core):.2f} to {max(a_core):.2f}), "
            f"{started:.2f} with its start ({median(one.processor for one in starts[workers]):.1f} s), "
            f"{by_the_clock:.2f} by the clock"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
