"""Tokenizers: the two kinds behind one protocol, their fingerprints, and copies that still are the same tokenizer."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_tw.data.tokenizer import load_tokenizer

TEXT = Path(os.__file__).read_text(encoding="utf-8")[:20_000]
SAMPLE = "def main():\n\treturn 'é😀'  # 1234\r\n"


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    """A model of Llama's kind (BPE, byte fallback, no normalization), unless `options` say otherwise; BOS is 1."""
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
        "num_threads": 1,
    } | options
    prefix = folder / "spm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_prefix=str(prefix), **settings
    )
    return prefix.with_suffix(".model")


def train_hugging_face(folder: Path, **tokenizer_config: object) -> Path:
    """A byte-level BPE folder; BOS is 0. Like some published ones it adds special tokens and truncates, if it may."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.enable_truncation(100)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokenizer_config))
    return folder


def test_sentencepiece(tmp_path: Path) -> None:
    file = train_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(file)
    assert (tokenizer.kind, tokenizer.name) == ("sentencepiece", "spm")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    ids = tokenizer.encode(TEXT)
    assert sentencepiece.SentencePieceProcessor(model_file=str(file)).decode(ids) == TEXT
    assert not {1, 2} & set(ids)


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_saved_sentencepiece_opens_in_transformers_with_the_same_ids(tmp_path: Path, add_dummy_prefix: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, add_dummy_prefix=add_dummy_prefix))
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    converted = AutoTokenizer.from_pretrained(str(saved), local_files_only=True)
    # Not a text that begins with a space, to which transformers adds no dummy prefix.
    for text in (TEXT, SAMPLE, "\n", "a  b   ", *([] if add_dummy_prefix else [" leading"])):
        assert converted.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (converted.bos_token_id, converted.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    again = load_tokenizer(saved)
    assert (again.kind, again.fingerprint, again.encode(TEXT)) == (
        "sentencepiece",
        tokenizer.fingerprint,
        tokenizer.encode(TEXT),
    )


def test_no_conversion_is_promised_for_other_sentencepiece_models(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, model_type="unigram"))
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    assert [file.name for file in saved.iterdir()] == ["tokenizer.model"]
    assert load_tokenizer(saved).encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_hugging_face(tmp_path: Path) -> None:
    folder = train_hugging_face(tmp_path / "byte_bpe")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.kind, tokenizer.name) == ("huggingface", "byte_bpe")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 0, 1)
    ids = tokenizer.encode(TEXT)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    assert ids == reference.encode(TEXT, add_special_tokens=False).ids
    assert len(ids) > 1000  # not truncated, whatever the file says
    assert load_tokenizer(folder / "tokenizer.json").encode(SAMPLE) == tokenizer.encode(SAMPLE)


@pytest.mark.parametrize("kind", ["truncating", "splitting", "sentencepiece"])
def test_encoders_make_the_same_ids_here_and_elsewhere(tmp_path: Path, kind: str) -> None:
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(train_sentencepiece(tmp_path))
    else:
        tokenizer = load_tokenizer(train_hugging_face(tmp_path / "bpe", split_special_tokens=kind == "splitting"))
    texts = [TEXT, "", SAMPLE, f"a {tokenizer.decode([tokenizer.bos_id or 0])} b", " ", TEXT[:100]]
    expected = [tokenizer.encode(text) for text in texts]
    if kind == "splitting":
        assert tokenizer.bos_id not in expected[3]
    elif kind == "truncating":
        assert tokenizer.bos_id in expected[3]
    encoder = load_tokenizer(tokenizer.path).encoder()
    assert encoder.encode_batch(texts) == expected
    assert pickle.loads(pickle.dumps(encoder)).encode_batch(texts) == expected
    sent = pickle.dumps(encoder)
    code = f"import pickle, sys; print(pickle.loads({sent!r}).encode_batch(['a b'])[0], 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{tokenizer.encode('a b')} False"  # which takes seconds in each worker


def test_hugging_face_fingerprint_is_of_what_decides_the_ids(tmp_path: Path) -> None:
    folder = train_hugging_face(tmp_path / "one")
    fingerprint = load_tokenizer(folder).fingerprint
    saved = tmp_path / "saved"
    saved.mkdir()
    load_tokenizer(folder).save(saved)
    assert sorted(file.name for file in saved.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(saved).fingerprint == fingerprint

    content = json.loads((saved / "tokenizer.json").read_text())
    content["truncation"] = None
    (saved / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert load_tokenizer(saved).fingerprint == fingerprint

    content["pre_tokenizer"]["add_prefix_space"] = True
    (saved / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(saved).fingerprint != fingerprint


def test_hugging_face_vocabulary_with_holes(tmp_path: Path) -> None:
    folder = train_hugging_face(tmp_path / "holes")
    content = json.loads((folder / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 999
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).vocab_size == 1000


def test_no_program_of_the_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does transformers ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = train_hugging_face(tmp_path / "own")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))
    with pytest.raises(ValueError, match=r"--tokenizer .*own: transformers cannot open it: .* custom code"):
        load_tokenizer(folder)


def test_errors_name_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokenizer .*nothing: no such file or folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"--tokenizer .*: the folder holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocabulary.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"--tokenizer .*vocabulary.txt: expected a folder"):
        load_tokenizer(tmp_path / "vocabulary.txt")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"--tokenizer .*bad.model: sentencepiece cannot open it"):
        load_tokenizer(tmp_path / "bad.model")
    folder = train_hugging_face(tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ValueError, match=r"--tokenizer .*broken: transformers cannot open it"):
        load_tokenizer(folder)
