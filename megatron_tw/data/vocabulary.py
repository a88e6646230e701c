"""Whether a model's ids mean what the rows' ids mean."""

import json
from pathlib import Path

from megatron_tw.data.rows import TokenRows, check_rows
from megatron_tw.data.rows_format import TOKENIZER_DIR
from megatron_tw.data.tokenizer import VOCABULARY_FILES, load_tokenizer


def check_model_vocabulary(rows: TokenRows, folder: str | Path) -> None:
    """Check that the folder of a model's tokenizer has the vocabulary of the rows, as far as the two can be compared.

    Raises:
        ValueError: another vocabulary; names both.
    """
    if _same_tokens(rows, Path(folder)) is False:
        raise ValueError(f"{folder}: a model with another vocabulary than the rows, {rows.path}")


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
    same = _same_tokens(rows, Path(folder))
    if same is False:
        raise ValueError(f"{folder}: a scorer with another vocabulary than the rows, {rows.path}")
    if same is None and rows.header.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"{folder}: a scorer with another vocabulary: {vocab_size} tokens, the rows of {rows.path} have "
            f"{rows.header.vocab_size}, and there are no two tokenizers to compare"
        )


def _same_tokens(rows: TokenRows, folder: Path) -> bool | None:
    """Whether the tokenizer in `folder` and that of the rows have the same tokens; None where there are no two that
    can be compared: by their fingerprint, or by the first file of tokens that both have."""
    made_by, files = rows.header.tokenizer, ("tokenizer.json", *VOCABULARY_FILES)
    if made_by is None or not any((folder / name).is_file() for name in files):
        return None
    if load_tokenizer(folder).fingerprint == made_by.fingerprint:
        return True
    for name in files:
        ours, theirs = folder / name, rows.path / TOKENIZER_DIR / name
        if ours.is_file() and theirs.is_file():
            return _table(ours) == _table(theirs)
    return None


def _table(file: Path) -> object:
    """The regular tokens and their ids: of a tokenizer.json without the special tokens, else the whole file."""
    if file.name != "tokenizer.json":
        return file.read_bytes()
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"].get("vocab")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: no tokenizer.json of the tokenizers library: {error!r}") from error
