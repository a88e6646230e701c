"""Whether a model's ids mean what the rows' ids mean."""

import json
from pathlib import Path

from megatron_tw.data.rows import TOKENIZER_DIR, TokenRows, check_rows
from megatron_tw.data.tokenizer import VOCABULARY_FILES, load_tokenizer


def check_same_vocabulary(rows: TokenRows, folder: str | Path, what: str) -> None:
    """Check that a model's folder has the vocabulary of the rows, where both have a tokenizer: their tables of tokens
    are compared, because tokenizers of one family may name their special tokens differently.

    what: the model, as errors name it.

    Raises:
        ValueError: another vocabulary; names both.
    """
    folder, made_by = Path(folder), rows.header.tokenizer
    if made_by is not None and has_tokenizer(folder) and load_tokenizer(folder).fingerprint != made_by.fingerprint:
        _check_tables(folder, rows.path / TOKENIZER_DIR, what)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *VOCABULARY_FILES))


def check_scorer_vocabulary(rows: TokenRows, folder: str | Path, vocab_size: int) -> None:
    """Check that the scorer in a Hugging Face folder has the vocabulary of the rows.

    Tokenizers of one family may name their special tokens differently (Llama 3 and 3.2), and models pad their
    vocabulary; so where there are two tokenizers, their tables of tokens are compared. Else the sizes must be equal.

    Args:
        vocab_size: rows of the scorer's embedding, as config.json says.

    Raises:
        ValueError: another vocabulary; names both.
    """
    check_rows(rows, seq_length=rows.header.seq_length, model_vocab_size=vocab_size)
    if rows.header.tokenizer is not None and has_tokenizer(Path(folder)):
        check_same_vocabulary(rows, folder, "scorer")
    elif rows.header.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"{folder}: a scorer with another vocabulary: {vocab_size} tokens, the rows of {rows.path} have "
            f"{rows.header.vocab_size}, and there are no two tokenizers to compare"
        )


def _check_tables(model: Path, rows: Path, what: str) -> None:
    """Compare the first file of tokens that both folders have."""
    for name in ("tokenizer.json", *VOCABULARY_FILES):
        ours, theirs = model / name, rows / name
        if ours.is_file() and theirs.is_file():
            if _table(ours) != _table(theirs):
                raise ValueError(f"{ours}: a {what} with another vocabulary than the rows, whose tokenizer is {theirs}")
            return
    raise ValueError(
        f"{model}: a {what} whose tokenizer cannot be compared with that of the rows, {rows}: no file in common"
    )


def _table(file: Path) -> object:
    """The regular tokens and their ids: of a tokenizer.json without the special tokens, else the whole file."""
    if file.name == "tokenizer.json":
        return json.loads(file.read_text(encoding="utf-8"))["model"].get("vocab")
    return file.read_bytes()
