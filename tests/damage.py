"""What the programs are tried on: a folder of everything that they read, and ways to damage it, in words.

`make_world` makes in an empty folder, by the programs themselves:

    rows, short, other, big   ready rows: 4 of 256 tokens; of 64; in another order; with an id beyond the model's
    model, scores             the tiny Llama, and its short NLLs of `rows` (windows of 64, stride 48)
    run                       a run of 2 steps with a checkpoint after each
    eval, eval_long           evaluations of the run, with short windows and without
    eval_other                ... on `other`
    docs, ids.jsonl           documents, and ready ids
    words, drow               tokenizers of four words, in order and in reverse; rows_of_words, rows_of_drow,
                              model_of_drow: rows that they made, and the tiny Llama with one of them
    file, empty               what is no folder, and an empty one
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from programs import Programs
from tiny import SEQ_LENGTH, TINY_LLAMA, edit_header, prepare_ready_rows, reference_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BASE = {
    "train": "--load-hf model --data-path rows --seq-length 256 --train-iters 2 --save out",
    "score": "--load-hf model --data-path rows --short-window 64 --short-stride 48 --output out",
    "evaluate": "--load-hf model --data-path rows --seq-length 256 --short-window 64 --short-stride 48 --output out",
    "convert": "",
    "preprocess": "--input docs --tokenizer words --seq-length 8 --output out",
    "report": "--evaluations base=eval --key-tokens base --output out",
    "verify": "",
    "plan": "--load-hf model --seq-length 256 --world-size 1",
}
"""What a program is asked where nothing is wrong; verify is preprocess --verify."""
STEPS = [
    ("train", "--load-hf model --data-path rows --seq-length 256 --train-iters 2 --save run --save-interval 1"),
    ("score", BASE["score"].replace("output out", "output scores")),
    ("evaluate", BASE["evaluate"].replace("output out", "output eval").replace("--load-hf model", "--load run")),
    ("evaluate", BASE["evaluate"].replace("output out", "output eval_other").replace("path rows", "path other")),
    ("evaluate", "--load-hf model --data-path rows --seq-length 256 --output eval_long"),
]


NOT_ALWAYS = ("common.pt", "__0_1.distcp")
"""Files of a checkpoint that some versions of Megatron-Core do not write: what they hold is in the others."""


def make_world(folder: Path, programs: Programs) -> None:
    """Everything above, in a new folder."""
    folder.mkdir()
    rows = reference_rows()
    big = rows.copy()
    big[2, 5] = 400
    prepare_ready_rows(rows, folder / "rows")
    prepare_ready_rows(np.ascontiguousarray(rows[:, :64]), folder / "short")
    prepare_ready_rows(np.ascontiguousarray(rows[::-1]), folder / "other")
    prepare_ready_rows(big, folder / "big", vocab_size=None)
    shutil.copytree(TINY_LLAMA, folder / "model")
    (folder / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(8))}) + "\n")
    words = ["<s>", "a", "b", "c"]
    for name, order in (("words", words), ("drow", words[::-1])):
        make_tokenizer(folder / name, order)
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("a b c " * 400)
    (folder / "docs" / "b.jsonl").write_text(json.dumps({"text": "b c a " * 20}) + "\n")
    (folder / "file").write_text("a file\n")
    (folder / "empty").mkdir()
    for program, options in STEPS:
        answer = programs.run(program, options.split(), folder)
        assert answer.status == 0, answer.stderr
    for name in ("words", "drow"):
        options = f"--input docs --tokenizer {name} --seq-length {SEQ_LENGTH} --output rows_of_{name}"
        answer = programs.run("preprocess", options.split(), folder)
        assert answer.status == 0, answer.stderr
    shutil.copytree(folder / "model", folder / "model_of_drow")
    shutil.copytree(folder / "drow", folder / "model_of_drow", dirs_exist_ok=True)


def make_tokenizer(folder: Path, words: list[str]) -> None:
    """A Hugging Face tokenizer of whole words, with the BOS "<s>"."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


def flip(file: Path, where: str = "1/2") -> None:
    """Change one bit, at a byte or a share of the file."""
    content = bytearray(file.read_bytes())
    content[_place(where, len(content))] ^= 1
    file.write_bytes(content)


def cut(file: Path, where: str = "1/2") -> None:
    os.truncate(file, _place(where, file.stat().st_size))


def write(file: Path, *text: str) -> None:
    r"""Words as a file's content; \n is a new line, \xff a byte."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(" ".join(text).encode().decode("unicode_escape").encode("latin-1"))


def append(file: Path, *text: str) -> None:
    with file.open("ab") as stream:
        stream.write(" ".join(text).encode().decode("unicode_escape").encode("latin-1"))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit(file: Path, *changes: str) -> None:
    """Set fields (`a.b=JSON`) of a JSON file, or remove them (`a.b=`). Its checksum stays."""
    content = json.loads(file.read_text())
    for change in changes:
        name, _, value = change.partition("=")
        *path, last = name.split(".")
        place = content
        for key in path:
            place = place[key]
        if value:
            place[last] = json.loads(value)
        else:
            del place[last]
    file.write_text(json.dumps(content))


def header(file: Path, *changes: str) -> None:
    """As `edit`, with a checksum that fits."""
    edit(file, *changes)
    edit_header(file)


def array(file: Path, where: str, value: str) -> None:
    """Set one number of a .npy file."""
    content = np.load(file)
    content.reshape(-1)[int(where)] = int(value)
    np.save(file, content)


def copy(path: Path, target: str) -> None:
    """`target` is beside `path`."""
    to = path.parent / target
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copy(path, to)


def link(place: Path, to: str) -> None:
    place.symlink_to(to)


WAYS: dict[str, Callable[..., None]] = {
    way.__name__: way for way in (flip, cut, write, append, remove, edit, header, array, copy, link)
}


def damage(folder: Path, text: str) -> None:
    """Do what `WAY FILE ARGUMENTS; ...` says."""
    for step in filter(None, (part.strip() for part in text.split(";"))):
        way, file, *arguments = step.split()
        WAYS[way](folder / file, *arguments)


def _place(where: str, size: int) -> int:
    over, _, under = where.partition("/")
    return size * int(over) // int(under) if under else int(over)
