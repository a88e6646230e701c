"""Text to token ids: Hugging Face and sentencepiece tokenizers behind one protocol."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

# What a Hugging Face tokenizer may consist of. Copied as they are; those of VOCABULARY_FILES decide the ids.
VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *VOCABULARY_FILES,
)
# The parts of a tokenizer.json that decide the ids of a text to which no special tokens are added.
TOKENIZER_JSON_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


class Encoder(Protocol):
    """The part of a tokenizer that makes ids, to be sent to other processes."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`Tokenizer.encode` of each, on one core."""


class Tokenizer(Protocol):
    """What this project asks of a tokenizer."""

    kind: str
    """"huggingface" or "sentencepiece"."""
    name: str
    """Name of its folder or file, without the path: for people, never compared."""
    path: Path
    """`load_tokenizer(path)` opens it again."""
    vocab_size: int
    """Largest id + 1."""
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    """sha256 (hex) of what decides the ids of a text: the same for copies of a tokenizer, wherever they lie."""
    library: str
    """Name and version of the library that makes the ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no special tokens are added."""

    def encoder(self) -> "Encoder":
        """What does `encode` for many texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their name; a character whose bytes are not all there becomes U+FFFD."""

    def first_ids(self) -> list[int]:
        """What stands before a text where the tokenizer's own special tokens are added (BOS, or nothing)."""

    def save(self, directory: Path) -> None:
        """Copies the tokenizer's files into an existing directory, where `load_tokenizer` finds the same tokenizer."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens the tokenizer at `path`:

    - a Hugging Face folder, or its tokenizer.json;
    - a sentencepiece .model file, or a folder with tokenizer.model but no tokenizer.json.

    Raises:
        ValueError: no tokenizer there, or one that cannot be read.
    """
    path = Path(path)
    if path.is_file():
        if path.name == "tokenizer.json":
            return HuggingFaceTokenizer(path.absolute().parent)
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise ValueError(f"--tokenizer {path}: expected a folder, a tokenizer.json or a sentencepiece .model file")
    if not path.is_dir():
        raise ValueError(f"--tokenizer {path}: no such file or folder")
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")  # exact, where transformers would convert it
    if not any((path / file).is_file() for file in ("tokenizer.json", *VOCABULARY_FILES)):
        raise ValueError(
            f"--tokenizer {path}: the folder holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json, ...)"
        )
    return HuggingFaceTokenizer(path)


class HuggingFaceTokenizer:
    """A tokenizer that `transformers.AutoTokenizer` opens from a local folder.

    The name of a special token in the text becomes that token, as it does in transformers.
    """

    kind = "huggingface"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # seconds: only when it is asked for

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,  # else it asks on the terminal whether to run a program of the folder
            )
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"--tokenizer {folder}: transformers cannot open it: {error}") from error
        self.path = folder
        self.name = folder.absolute().name
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1  # not len(): ids may have holes
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self.fingerprint = _folder_fingerprint(folder)
        self.library = f"tokenizers {version('tokenizers')}"
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)  # none of a tokenizer in Python alone

    def encode(self, text: str) -> list[int]:
        # verbose=False: no warning that a document is longer than the base model's context
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def encoder(self) -> Encoder:
        if self._backend is None:
            return OpenedEncoder(self.path)
        self.encode("")  # transformers sets truncation, padding and more of the library's when it is called
        return FastEncoder(self._backend, self._backend.encode_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def first_ids(self) -> list[int]:
        whole: list[int] = self._tokenizer.encode("a", add_special_tokens=True)
        return whole[: whole.index(self.encode("a")[0])]

    def save(self, directory: Path) -> None:
        for file in TOKENIZER_FILES:
            if (self.path / file).is_file():
                shutil.copyfile(self.path / file, directory / file)


class SentencePieceTokenizer:
    """A sentencepiece model, run by the sentencepiece library."""

    kind = "sentencepiece"

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--tokenizer {file}: sentencepiece cannot open it: {error}") from error
        self.path = file
        file = file.absolute()
        self.name = file.parent.name if file.name == "tokenizer.model" else file.stem
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
        self.library = f"sentencepiece {version('sentencepiece')}"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encoder(self) -> Encoder:
        return OpenedEncoder(self.path)

    def decode(self, ids: Sequence[int]) -> str:
        text = ""
        plain: list[int] = []
        for token in ids:
            if self._processor.is_control(token):  # the library drops them
                text += str(self._processor.decode(plain)) + str(self._processor.id_to_piece(token))
                plain = []
            else:
                plain.append(int(token))
        return text + str(self._processor.decode(plain))

    def first_ids(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]

    def save(self, directory: Path) -> None:
        """Copies the model as tokenizer.model.

        A model of Llama's kind gets the tokenizer_config.json with which transformers makes the same ids from it. For
        other kinds transformers has no exact conversion, so none is promised.

        One difference is left: transformers adds no dummy prefix to a text that begins with a space.
        """
        shutil.copyfile(self.path, directory / "tokenizer.model")
        config = self._llama_config()
        if config is not None:
            (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _llama_config(self) -> dict[str, Any] | None:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self._processor.serialized_model_proto())
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        like_llama = (
            trainer.model_type == trainer.BPE
            and trainer.byte_fallback
            and normalizer.name == "identity"
            and normalizer.escape_whitespaces
            and not normalizer.remove_extra_whitespaces
            and not trainer.treat_whitespace_as_suffix
            and not trainer.user_defined_symbols
        )
        if not like_llama or self.bos_id is None or self.eos_id is None:
            return None
        return {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": self._processor.id_to_piece(self.bos_id),
            "eos_token": self._processor.id_to_piece(self.eos_id),
            "unk_token": self._processor.id_to_piece(self._processor.unk_id()),
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": normalizer.add_dummy_prefix,
            "legacy": False,
        }


@dataclass(frozen=True)
class FastEncoder:
    """By the tokenizers library itself. A process that is sent it need not import transformers.

    tokenizer: tokenizers.Tokenizer. encode_special_tokens: of it, which it does not take along itself.
    """

    tokenizer: Any
    encode_special_tokens: bool

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its only switch: otherwise it takes all cores
        self.tokenizer.encode_special_tokens = self.encode_special_tokens
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)  # fast: no offsets
        return [encoding.ids for encoding in encodings]


@dataclass(frozen=True)
class OpenedEncoder:
    """By the tokenizer at `path`, which each process opens once."""

    path: Path

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = _opened(self.path)
        return [tokenizer.encode(text) for text in texts]


@cache
def _opened(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint that the tokenizer in a folder would have, without opening it; None where there is none."""
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    if not any((folder / file).is_file() for file in ("tokenizer.json", *VOCABULARY_FILES)):
        return None
    return _folder_fingerprint(folder)


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None  # sentencepiece says -1 for "has none"


def _folder_fingerprint(folder: Path) -> str:
    """Hashes tokenizer.json's id-deciding parts, however the file is laid out; else the vocabulary files' bytes."""
    digest = hashlib.sha256()
    fast_file = folder / "tokenizer.json"
    if fast_file.is_file():
        content = json.loads(fast_file.read_text(encoding="utf-8"))
        parts = {part: content.get(part) for part in TOKENIZER_JSON_PARTS}
        digest.update(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())
        return digest.hexdigest()
    for name in VOCABULARY_FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
