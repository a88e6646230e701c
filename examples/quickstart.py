"""The steps of the quickstart that are no tool of the project: documents, tokenizer, start model, final check.

    examples/quickstart.py files     --modules NAME ... --max-bytes B --output DIR
    examples/quickstart.py corpus    --output DIR --max-bytes B --min-document-bytes B
    examples/quickstart.py tokenizer --corpus FILE --vocab-size V --output DIR
    examples/quickstart.py documents --corpus DIR --tokenizer DIR --context n --seq-length N --facts F
                                     --short-rows R --long-rows R --heldout-rows R --seed S --output DIR
    examples/quickstart.py model     --tokenizer DIR --seq-length n --hidden-size H --layers L --seed S --output DIR
    examples/quickstart.py answers   --rows DIR --output FILE
    examples/quickstart.py export    --evaluations DIR ... --models DIR ... --rows DIR --answers FILE --output DIR

`examples/quickstart.sh` calls them, with the tools of the project in between.
"""

import argparse
import hashlib
import json
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from quickstart_facts import FACTS, THINGS, check_tokens, find_answers, plant

if TYPE_CHECKING:
    from megatron_tw.evaluation.result import EvaluationResult

HELD_OUT_SHARE = 0.1
# Test suites are two thirds of the bytes, and generated tables of codes are no text.
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "lib2to3", "__pycache__"}
NAME_REPEATS = 1000
"""How often the tokenizer's text holds the name of each planted class, besides the library's lines."""
CHECKED_ROWS = 4
TOLERANCE = 1e-4
"""Nats between two fp32 programs that add in different orders; a wrong rope base gives a thousand times more."""


def write_files(modules: Sequence[str], max_bytes: int, output: Path) -> None:
    """Writes the first `max_bytes` of modules of the standard library, whole lines, as text files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    output.mkdir(parents=True)
    for name in modules:
        text = (library / f"{name}.py").read_text(encoding="utf-8")
        (output / f"{name}.py").write_text(text[: text.rfind("\n", 0, max_bytes) + 1], encoding="utf-8")


def write_corpus(output: Path, max_bytes: int, min_document_bytes: int) -> None:
    """Writes the standard library's modules as documents, `{"name": ..., "text": ...}` a line: train and heldout.jsonl.

    A tenth of the files is held out, chosen by a hash of the name: a file is on the same side on every machine. Files
    shorter than `min_document_bytes` hold no long row and are left out. The files come in the order of their hash, so
    that a corpus cut to `max_bytes` is a sample of the library and not its first letters.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = {
        path.relative_to(library).as_posix(): path
        for path in library.rglob("*.py")
        if not LEFT_OUT_FOLDERS & set(path.relative_to(library).parts)
    }
    hashed = sorted((hashlib.sha256(name.encode()).digest(), name) for name in paths)
    output.mkdir(parents=True)
    for split, share in (("heldout", HELD_OUT_SHARE), ("train", 1 - HELD_OUT_SHARE)):
        documents = 0
        size = 0
        with (output / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for digest, name in hashed:
                # The last bytes decide the split: the first ones decide the order.
                if (int.from_bytes(digest[-8:], "big") < HELD_OUT_SHARE * 2**64) != (split == "heldout"):
                    continue
                text = paths[name].read_bytes().decode("utf-8", errors="replace")
                if len(text) < min_document_bytes or size + len(text) > share * max_bytes:
                    continue
                file.write(json.dumps({"name": name, "text": text}) + "\n")
                documents += 1
                size += len(text)
        if not documents:
            sys.exit(f"error: no file of {min_document_bytes} bytes or more under {library} for the {split} documents")
        print(f"{split}: {documents} files, {size / 1e6:.2f} MB, from {library}")


def train_tokenizer(corpus: Path, vocab_size: int, output: Path) -> None:
    """Trains a sentencepiece BPE tokenizer of Llama's kind, which gives code back exactly (indentation, any byte).

    The lines of the facts are repeated in its text, so that each name becomes one piece as a frequent word does.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    from megatron_tw.data.tokenizer import load_tokenizer

    output.mkdir(parents=True)
    with corpus.open(encoding="utf-8") as file:
        lines = [line for record in file for line in json.loads(record)["text"].splitlines() if line.strip()]
    classes = {thing: " ".join(fact.name for fact in FACTS if fact.thing == thing) for thing in THINGS}
    names = [f"{word} {classes[thing]}" for thing in THINGS for word in (f"{thing}:", "import")]
    SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *(names * NAME_REPEATS)]),
        model_prefix=str(output / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,  # line ends among others
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation
        split_by_unicode_script=False,  # "cache:" may be a piece
        add_dummy_prefix=False,
        minloglevel=2,
    )
    processor = SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
    sample = "\n".join(lines[:2000])
    ids = processor.encode(sample)
    check_tokens(load_tokenizer(output))
    if processor.decode(ids) != sample:
        sys.exit("error: the tokenizer does not give the text back")
    print(f"{processor.vocab_size()} pieces, {len(sample) / len(ids):.2f} characters a token")


def write_documents(
    corpus: Path,
    tokenizer: Path,
    context: int,
    seq_length: int,
    facts: int,
    short_rows: int,
    long_rows: int,
    heldout_rows: int,
    seed: int,
    output: Path,
) -> None:
    """Writes the documents with planted facts, one a row: short, long and heldout.jsonl."""
    from megatron_tw.data.tokenizer import load_tokenizer

    opened = load_tokenizer(tokenizer)
    texts = {}
    for split in ("train", "heldout"):
        with (corpus / f"{split}.jsonl").open(encoding="utf-8") as file:
            texts[split] = [json.loads(record)["text"] for record in file]
    output.mkdir(parents=True)
    for name, split, length, num_rows in (
        ("short", "train", context, short_rows),
        ("long", "train", seq_length, long_rows),
        ("heldout", "heldout", seq_length, heldout_rows),
    ):
        documents = plant(
            texts[split], opened, seq_length=length, context=context, facts=facts, num_rows=num_rows, seed=seed
        )
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps({"text": document}) + "\n")
        print(f"{name}: {num_rows:,} documents of {length:,} tokens")


def write_answers(rows: Path, output: Path) -> None:
    """Writes where the rows ask for a planted fact."""
    output.parent.mkdir(parents=True, exist_ok=True)
    print(find_answers(rows, output))


def make_model(tokenizer: Path, seq_length: int, hidden_size: int, layers: int, seed: int, output: Path) -> None:
    """Writes a small Llama with random weights in Hugging Face format: what the base training starts from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tw.data.tokenizer import load_tokenizer

    torch.manual_seed(seed)
    opened = load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=opened.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=seq_length,
        bos_token_id=opened.bos_id,
        eos_token_id=opened.eos_id,
        tie_word_embeddings=True,  # copying a token is then easy to learn
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); with the usual 0.02 so small a model hardly starts
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(output)
    opened.save(output)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M parameters")


def far_recall(result: "EvaluationResult", answers: Mapping[str, npt.NDArray[np.int64]]) -> float:
    """Share of the answers that are the model's first choice, of facts beyond its old context."""
    assert result.top1 is not None
    place_of_row = {int(row): place for place, row in enumerate(result.row_index)}
    right = [
        result.top1[place_of_row[row], position - 1]
        for row, position, distance in zip(
            *(answers[key].tolist() for key in ("row", "position", "distance")), strict=True
        )
        if row in place_of_row and distance > (result.header.known_context or 0)
    ]
    return float(np.mean(right))


def export_best(evaluations: Sequence[Path], models: Sequence[Path], rows: Path, answers: Path, output: Path) -> None:
    """Copies the model that recalls most to `output`, and checks it with transformers: its NLLs must be those that the
    evaluation measured under Megatron's parallelism, its tokenizer must give the rows' ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_tw.data.rows import TokenRows
    from megatron_tw.data.rows_format import TOKENIZER_DIR
    from megatron_tw.data.tokenizer import load_tokenizer
    from megatron_tw.evaluation.result import EvaluationResult

    results = [EvaluationResult.load(folder) for folder in evaluations]
    with np.load(answers) as found:
        recalls = [far_recall(result, dict(found)) for result in results]
    best = int(np.argmax(recalls))
    recalled = ", ".join(f"{folder.name} {recall:.1%}" for folder, recall in zip(evaluations, recalls, strict=True))
    print(f"far facts recalled: {recalled}; taken: {evaluations[best].name}")
    shutil.copytree(models[best], output)

    dataset = TokenRows(rows)
    row_index_R = results[best].row_index[:CHECKED_ROWS]
    ids_RN = torch.from_numpy(np.stack([dataset[int(row)] for row in row_index_R]))
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_RTV = model(ids_RN).logits[:, :-1].float()
    nll_RT = torch.nn.functional.cross_entropy(logits_RTV.transpose(1, 2), ids_RN[:, 1:], reduction="none").numpy()
    difference = float(np.abs(nll_RT - results[best].long_nll[:CHECKED_ROWS]).max())
    print(f"transformers against Megatron-Core, {nll_RT.size:,} targets: max |NLL difference| {difference:.2e} nats")
    if not difference <= TOLERANCE:
        sys.exit(f"error: expected at most {TOLERANCE:g}: the exported model is not the one that was evaluated")

    text = Path(__file__).read_text(encoding="utf-8")
    expected = load_tokenizer(dataset.path / TOKENIZER_DIR).encode(text)
    got = AutoTokenizer.from_pretrained(output).encode(text, add_special_tokens=False)
    if got != expected:
        sys.exit("error: the exported tokenizer gives other ids than the one that made the rows")
    print(f"exported: {output} (model and tokenizer open with transformers, the logits agree)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name, options in {
        "files": {"modules": [str], "max_bytes": int, "output": Path},
        "corpus": {"output": Path, "max_bytes": int, "min_document_bytes": int},
        "tokenizer": {"corpus": Path, "vocab_size": int, "output": Path},
        "documents": {
            **{"corpus": Path, "tokenizer": Path, "context": int, "seq_length": int, "facts": int},
            **{"short_rows": int, "long_rows": int, "heldout_rows": int, "seed": int, "output": Path},
        },
        "answers": {"rows": Path, "output": Path},
        "model": {"tokenizer": Path, "seq_length": int, "hidden_size": int, "layers": int, "seed": int, "output": Path},
        "export": {"evaluations": [Path], "models": [Path], "rows": Path, "answers": Path, "output": Path},
    }.items():
        step = steps.add_parser(name, allow_abbrev=False)
        for option, kind in options.items():
            several = isinstance(kind, list)
            step.add_argument(
                f"--{option.replace('_', '-')}",
                type=kind[0] if several else kind,
                nargs="+" if several else None,
                required=True,
            )
    return parser


STEPS: dict[str, Callable[..., None]] = {
    "files": write_files,
    "corpus": write_corpus,
    "tokenizer": train_tokenizer,
    "documents": write_documents,
    "answers": write_answers,
    "model": make_model,
    "export": export_best,
}


def main(arguments: Sequence[str]) -> None:
    options = vars(build_parser().parse_args(arguments))
    try:
        STEPS[options.pop("step")](**options)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
