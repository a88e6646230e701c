"""Prepares documents as rows of token ids for training and evaluation."""

import sys
from collections.abc import Sequence

from megatron_tw.config import user_errors
from megatron_tw.config.arguments import ToolParser, path, text
from megatron_tw.config.options import flag
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows_format import RowsHeader

DESCRIPTION = """\
Prepares documents as rows of token ids for training and evaluation.

A document is cut into rows of BOS + N-1 tokens. A row never holds two documents, and a document's last piece shorter
than that is dropped. Rows are stored in input order, in Megatron's indexed dataset format. With --pack a row holds
several documents and their boundaries, and nothing is dropped.
"""
EPILOG = """\
examples:
  tools/preprocess_data.py --input books/ --tokenizer llama3/ --seq-length 32768 --output rows_32k --workers 16
  tools/preprocess_data.py --input 'src/**/*.py' --tokenizer spm.model --seq-length 2048 --output rows
  tools/preprocess_data.py --input ids.jsonl --tokenizer none --vocab-size 320 --bos-id 1 --seq-length 256 --output rows
  tools/preprocess_data.py --input notes.jsonl --tokenizer llama3/ --seq-length 32768 --pack --output packed_32k
  tools/preprocess_data.py --verify rows
"""


def build_parser() -> ToolParser:
    parser = ToolParser("tools/preprocess_data.py", DESCRIPTION, EPILOG)
    documents = parser.add_argument_group("Documents", "What is read.")
    documents.add_argument(
        "--input",
        nargs="+",
        type=text,
        metavar="PATH",
        help="files (.gz and .zst too), quoted globs (** is any depth), folders of Hugging Face's save_to_disk, or "
        "directories (their .txt, .jsonl and .parquet files); a text file is one document, as is a line of a .jsonl or "
        ".json file and a row of a table",
    )
    documents.add_argument(
        "--text-key",
        type=text,
        metavar="NAME",
        help="JSON key or parquet column of the document [text; with --tokenizer none: input_ids]",
    )
    tokens = parser.add_argument_group("Tokenizer", "Whose token ids the rows hold.")
    tokens.add_argument(
        "--tokenizer",
        type=text,
        metavar="PATH",
        help="Hugging Face folder or tokenizer.json, or sentencepiece .model file; "
        "'none': the documents are ready rows of N token ids, stored as they are",
    )
    tokens.add_argument("--vocab-size", type=int, metavar="V", help="with --tokenizer none: ids must be below it")
    tokens.add_argument("--bos-id", type=int, metavar="ID", help="BOS token, if not the tokenizer's own")
    rows = parser.add_argument_group("Rows", "What is written, and by how many processes.")
    rows.add_argument("--seq-length", type=int, metavar="N", help="tokens of a row, BOS included")
    rows.add_argument(
        "--pack",
        action="store_true",
        help="several documents in a row: attention stays inside each, positions and windows start anew",
    )
    rows.add_argument(
        "--pack-multiple",
        type=int,
        metavar="P",
        help="with --pack: each document is padded to a multiple of P tokens, which 2 x context- x tensor-parallel "
        "size must divide when the rows are used [128]",
    )
    rows.add_argument("--output", type=path, metavar="DIR", help="new or empty folder for the rows")
    rows.add_argument("--workers", type=int, default=1, metavar="W", help="processes that tokenize; same result [1]")
    verification = parser.add_argument_group("Verification", "Instead of all this.")
    verification.add_argument(
        "--verify",
        type=path,
        metavar="DIR",
        help="read every row of a folder that this tool or tools/score_tokens.py wrote, and compare it with what was "
        "written",
    )
    return parser


def summary(header: RowsHeader) -> str:
    counts = header.counts
    dropped = counts.tokens_dropped / counts.tokens
    return (
        f"{counts.documents:,} documents, {counts.tokens:,} tokens -> "
        f"{counts.rows:,} rows of {header.seq_length:,} tokens\n{_packing(header)}"
        f"{counts.documents_too_short:,} documents too short for a row; "
        f"{counts.tokens_dropped:,} tokens dropped ({dropped:.1%})"
    )


def _pack_multiple(pack: bool, multiple: int | None) -> int | None:
    if not pack:
        if multiple is not None:
            raise ValueError(f"--pack-multiple {multiple}: expected --pack with it")
        return None
    return 128 if multiple is None else multiple


def _packing(header: RowsHeader) -> str:
    packing = header.packing
    if packing is None:
        return ""
    share = packing.padding_tokens / (header.counts.rows * header.seq_length)
    return (
        f"packed: {packing.documents:,} documents and pieces at multiples of {packing.multiple:,} tokens; "
        f"{packing.padding_tokens:,} tokens of padding ({share:.1%})\n"
    )


def main(argv: Sequence[str]) -> None:
    """Parse, prepare or verify, print. A user's mistake is one line on stderr and exit status 2."""
    with user_errors():
        parser = build_parser()
        options = parser.parse(argv)
        needed = {"--input": options.input, "--tokenizer": options.tokenizer, "--seq-length": options.seq_length,
                  "--output": options.output}  # fmt: skip
        missing = [name for name, value in needed.items() if value is None]
        given = [flag(name) for name, value in vars(options).items() if value != parser.get_default(name)]
        if options.verify is not None and len(given) > 1:
            others = ", ".join(name for name in given if name != "--verify")
            raise ValueError(f"--verify: expected no other option with it, got {others}")
        if options.verify is None and missing:
            raise ValueError("missing " + ", ".join(missing))
        if options.verify is not None:
            from megatron_tw.data.verify import verify_folder  # imports torch

            print(verify_folder(options.verify, progress=True))
            return
        header = prepare_rows(
            options.input,
            options.output,
            seq_length=options.seq_length,
            tokenizer=None if options.tokenizer == "none" else options.tokenizer,
            text_key=options.text_key,
            vocab_size=options.vocab_size,
            bos_id=options.bos_id,
            pack_multiple=_pack_multiple(options.pack, options.pack_multiple),
            workers=options.workers,
            progress=True,
        )
        print(f"{summary(header)}\nwritten to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
