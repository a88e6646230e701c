"""Prepares documents as rows of token ids for training and evaluation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import RowsHeader

DESCRIPTION = """\
Prepares documents as rows of token ids for training and evaluation.

A document is cut into rows of BOS + N-1 tokens. A row never holds two documents, and a document's last piece shorter
than that is dropped. Rows are stored in input order, in Megatron's indexed dataset format.
"""
EPILOG = """\
examples:
  tools/preprocess_data.py --input books/ --tokenizer llama3/ --seq-length 32768 --output rows_32k --workers 16
  tools/preprocess_data.py --input 'src/**/*.py' --tokenizer spm.model --seq-length 2048 --output rows
  tools/preprocess_data.py --input ids.jsonl --tokenizer none --vocab-size 320 --bos-id 1 --seq-length 256 --output rows
  tools/preprocess_data.py --verify rows
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, quoted globs (** is any depth) or directories (their .txt, .jsonl and .parquet files); "
        "a text file is one document, as is a line of a .jsonl or .json file and a row of a .parquet file",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="Hugging Face folder or tokenizer.json, or sentencepiece .model file; "
        "'none': the documents are ready rows of N token ids, stored as they are",
    )
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens of a row, BOS included")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new or empty folder for the rows")
    parser.add_argument(
        "--text-key",
        metavar="NAME",
        help="JSON key or parquet column of the document (default: text; with --tokenizer none: input_ids)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="W", help="processes that tokenize (default: 1); same result"
    )
    parser.add_argument("--vocab-size", type=int, metavar="V", help="with --tokenizer none: ids must be below it")
    parser.add_argument("--bos-id", type=int, metavar="ID", help="BOS token, if not the tokenizer's own")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="DIR",
        help="instead of all this: read every row of a folder that this tool or tools/score_tokens.py wrote, and "
        "compare it with what was written",
    )
    return parser


def summary(header: RowsHeader) -> str:
    counts = header.counts
    dropped = counts.tokens_dropped / counts.tokens
    return (
        f"{counts.documents:,} documents, {counts.tokens:,} tokens -> "
        f"{counts.rows:,} rows of {header.seq_length:,} tokens\n"
        f"{counts.documents_too_short:,} documents too short for a row; "
        f"{counts.tokens_dropped:,} tokens dropped ({dropped:.1%})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    needed = {"--input": options.input, "--tokenizer": options.tokenizer, "--seq-length": options.seq_length,
              "--output": options.output}  # fmt: skip
    given = [name for name, value in needed.items() if value is not None]
    if options.verify is not None and given:
        parser.error(f"--verify: expected no other option with it, got {', '.join(given)}")
    if options.verify is None and len(given) < len(needed):
        parser.error("missing " + ", ".join(name for name in needed if name not in given))
    try:
        if options.verify is not None:
            from megatron_tw.data.verify import verify_folder  # imports torch

            print(verify_folder(options.verify, progress=True))
            return 0
        header = prepare_rows(
            options.input,
            options.output,
            seq_length=options.seq_length,
            tokenizer=None if options.tokenizer == "none" else options.tokenizer,
            text_key=options.text_key,
            vocab_size=options.vocab_size,
            bos_id=options.bos_id,
            workers=options.workers,
            progress=True,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{summary(header)}\nwritten to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
