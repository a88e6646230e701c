"""The script of a first real extension, at toy size: a random tiny Llama, made-up documents, the project's own
programs."""

import json
from pathlib import Path

import first_extension
import pytest
import smollm2
from programs import Programs
from tiny import VOCAB, make_folder

from megatron_tw.data.files import check_new_folder

LEAST_BYTES = 800


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages of which some are held out, one is too short, and one is a test suite."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(24):
        (root / f"package{number}").mkdir()
        for half in "ab":
            lines = [f"def name_{number}_{half}_{line}(value):\n    return value + {line}\n" for line in range(30)]
            (root / f"package{number}" / f"{half}.py").write_text("".join(lines))
    (root / "short").mkdir()
    (root / "short" / "a.py").write_text("x = 1\n")
    (root / "package0" / "tests").mkdir()
    (root / "package0" / "tests" / "a.py").write_text("y = 2\n" * 1000)
    return root


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE of the tiny model's vocabulary, in Hugging Face format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_documents_are_folders_and_a_package_is_on_one_side(sources: Path, tmp_path: Path) -> None:
    counts = first_extension.write_corpus(tmp_path, [sources], least_bytes=LEAST_BYTES, most_bytes=1500)
    found = {side: [json.loads(line) for line in (tmp_path / f"{side}.jsonl").open()] for side in counts}
    assert {side: len(documents) for side, documents in found.items()} == counts
    assert sum(counts.values()) == 24
    names = {side: {document["name"] for document in documents} for side, documents in found.items()}
    assert not names["train"] & names["heldout"]
    first = found["train"][0]["text"]
    assert first.startswith("# package")
    assert "b.py\n" in first or len(first) == 1500
    assert all("y = 2" not in document["text"] for documents in found.values() for document in documents)
    with pytest.raises(ValueError, match=r"documents of 10000000 bytes or more under .*: found"):
        first_extension.write_corpus(tmp_path, [sources], least_bytes=10**7, most_bytes=1)


def test_schemes_are_compared_on_held_out_rows(sources: Path, programs: Programs, tmp_path: Path) -> None:
    model = make_folder("llama", tmp_path / "tiny")
    save_tokenizer(model, [file.read_text() for file in sources.glob("*/a.py")])
    sizes = (
        "--context 32 --stride 24 --seq-length 128 --rotary-base 40000 --train-iters 2 --rows 2 --eval-rows 4 --lr 1e-3"
    )
    given = ["--model", str(model), "--output", str(tmp_path / "out"), "--roots", str(sources), *sizes.split()]
    options = first_extension.build_parser().parse_args([*given, "--schemes", "uniform", "sparse"])
    called = []

    def run(program: str, arguments: list[str]) -> None:
        called.append(program)
        answer = programs.run(program, arguments, tmp_path)
        assert answer.status == 0, answer.stderr[-3000:]

    first_extension.extend(options, run)
    assert called == [*["preprocess"] * 2, "evaluate", *["train", "evaluate"] * 2, "report"]
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    base, uniform, sparse = report["models"]
    assert [model["name"] for model in report["models"]] == ["base", "uniform", "sparse"]
    assert (report["seq_length"], report["old_context"], report["rows"]) == (128, 32, 4)
    assert report["reference"] == report["key_tokens"]["source"] == "uniform"
    assert sparse["beyond"]["difference"]["standard_error"] > 0
    assert len({model["all"]["nll"] for model in (base, uniform, sparse)}) == 3
    steps = [json.loads(line) for line in (tmp_path / "out" / "train" / "sparse" / "metrics.jsonl").open()]
    assert min(step["weight_std"] for step in steps) > 0
    config = (tmp_path / "out" / "train" / "uniform").rglob("*.json")
    assert any("40000" in file.read_text() for file in config)
    assert {file.suffix for file in (tmp_path / "out" / "report").iterdir()} == {".json", ".csv", ".html", ".png"}

    called.clear()
    first_extension.extend(options, run)  # all is done
    assert called == []


@pytest.mark.skipif(not smollm2.missing_packages(), reason="the packages of the real model are installed here")
def test_the_real_model_asks_for_its_packages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not installed: .*; pip install"):
        smollm2.convert(tmp_path / "model")
    check_new_folder(tmp_path / "model")
