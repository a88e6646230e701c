"""Data sets of lm_eval's tasks from folders on disk, laid out as on the Hugging Face hub; nothing is downloaded.

    EVAL_DATA/cais/mmlu/anatomy/test-00000-of-00001.parquet        a folder a data set, under its name on the hub

which is what `hf download --repo-type dataset cais/mmlu --local-dir EVAL_DATA/cais/mmlu` writes. Where its README.md
says which files are of which part (`configs`), that holds; else the files of part NAME and split SPLIT are found by
their names: NAME/SPLIT-*.parquet, and the like, or .jsonl (see PATTERNS).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_tw.evaluation.training import read_text

SPLITS = ("train", "validation", "dev", "test")
PATTERNS = (
    *("{name}/{split}-*", "{name}/{split}", "{name}/{split}/*", "data/{name}/{split}-*", "data/{name}/{split}"),
    *("{split}/{name}", "data/{split}/{name}", "{name}_{split}", "{name}-{split}"),
)
"""Of files of one split; where none is found, those that hold all of a part, whatever the split is called:"""
WHOLE_PATTERNS = ("{name}", "data/{name}")
SUFFIXES = (".parquet", ".jsonl", ".json")


class MissingDataError(Exception):
    """Files that are not there. dataset: its name on the hub. name: of the part. split: None: of all of them."""

    def __init__(self, dataset: str, name: str | None, folder: Path, split: str | None = None) -> None:
        super().__init__(f"{dataset} {name} {split or ''} not found in {folder}")
        self.dataset, self.name, self.folder, self.split = dataset, name, folder, split


@contextmanager
def data_from(folder: Path, opened: set[Path]) -> Iterator[None]:
    """Within the block `datasets.load_dataset` reads files under `folder`, and nothing else; adds them to `opened`.

    Raises:
        MissingDataError: there are none of a data set's part, or of a split that is asked for.
        ValueError: a file that cannot be read, or a split without rows that is asked for; names the file.
    """
    import datasets

    class Splits(datasets.DatasetDict):
        """A part's splits; tells what is wrong with one when it is asked for, since a task needs not all."""

        def __init__(self, dataset: str, name: str | None, files: dict[str, list[Path]]) -> None:
            super().__init__({split: _read(of_split) for split, of_split in files.items()})
            self.dataset, self.name, self.files = dataset, name, files

        def __getitem__(self, split: Any) -> Any:
            if split not in self.files:
                raise MissingDataError(self.dataset, self.name, folder, split)
            rows = super().__getitem__(split)
            if not len(rows):
                raise ValueError(f"--eval-data: {self.files[split][0]}: expected rows of the split {split}, got none")
            return rows

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        files = files_of(folder, path, name)
        if not files:
            raise MissingDataError(path, name, folder)
        opened.update(file for of_split in files.values() for file in of_split)
        return Splits(path, name, files)

    real, datasets.load_dataset = datasets.load_dataset, load
    try:
        yield
    finally:
        datasets.load_dataset = real


def files_of(folder: Path, dataset: str, name: str | None) -> dict[str, list[Path]]:
    """The files of each split of a data set's part, in order; empty where there are none.

    Raises:
        ValueError: its README.md names files in another way than the hub does.
    """
    where = folder / dataset
    part = name if name is not None else "default"
    declared = _declared(where, part)
    if declared:
        return declared
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        patterns = [pattern.format(name=part, split=split) for pattern in PATTERNS]
        patterns += [f"{split}-*", f"data/{split}-*", split] if name is None else []
        files = _first(where, patterns)
        if files:
            found[split] = files
    if found:
        return found
    whole = _first(where, [pattern.format(name=part) for pattern in WHOLE_PATTERNS])
    return dict.fromkeys(("train", "test"), whole) if whole else {}


def _first(where: Path, patterns: list[str]) -> list[Path]:
    for pattern in patterns:
        for suffix in SUFFIXES:
            files = sorted(where.glob(pattern + suffix))
            if files:
                return files
    return []


def _declared(where: Path, part: str) -> dict[str, list[Path]]:
    """What the front matter of README.md says of the part, as far as the files are there."""
    readme = where / "README.md"
    if not readme.is_file():
        return {}
    text = readme.read_text(encoding="utf-8", errors="replace")
    pieces = text.split("---\n", 2)
    if len(pieces) < 3 or pieces[0].strip():
        return {}
    try:
        front = yaml.safe_load(pieces[1])
    except yaml.YAMLError:
        return {}
    configs = front.get("configs") if isinstance(front, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict) or config.get("config_name") != part:
            continue
        found: dict[str, list[Path]] = {}
        entries = config.get("data_files") or []
        if not isinstance(entries, list | dict | str):
            raise ValueError(f"--eval-data: {readme}: data_files of {part}: expected a list, got {entries!r}")
        for entry in entries:
            if isinstance(entry, dict) and "split" in entry and "path" in entry:
                paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
                try:
                    files = sorted(file for path in paths for file in where.glob(str(path)) if file.is_file())
                except (ValueError, NotImplementedError) as error:  # "" and **x; from /
                    raise ValueError(
                        f"--eval-data: {readme}: data_files of {part}: expected paths below {where}, got "
                        f"{', '.join(map(repr, paths))}"
                    ) from error
                if files:
                    found[str(entry["split"])] = files
        return found
    return {}


def _read(files: list[Path]) -> Any:
    """A data set in memory.

    Raises:
        ValueError: a file that is no parquet or JSON, or whose columns are not those of the others; names it.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    if files[0].suffix == ".parquet":
        tables: list[Any] = []
        for file in files:
            try:
                tables.append(pyarrow.parquet.read_table(file))
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"--eval-data: {file}: cannot be read: {' '.join(str(error).split())}") from error
            if not tables[-1].schema.equals(tables[0].schema):
                raise ValueError(
                    f"--eval-data: {file}: expected the columns of {files[0].name}, {_columns(tables[0])}, got "
                    f"{_columns(tables[-1])}"
                )
        return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.concat_tables(tables)))
    rows = [row for file in files for row in _json_rows(file)]
    try:
        return datasets.Dataset.from_list(rows)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        others = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        raise ValueError(
            f"--eval-data: {files[0]}{others}: expected values of one type in a column: {' '.join(str(error).split())}"
        ) from error


def _columns(table: Any) -> str:
    return ", ".join(f"{column.name} ({column.type})" for column in table.schema)


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that is a list of objects, or has one in each line."""
    text = read_text("--eval-data", file)
    try:
        whole = text.lstrip().startswith("[")
        # Lines end at "\n" alone: others of Unicode's line ends may stand within a string.
        rows = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--eval-data: {file}: no JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"--eval-data: {file}: row {number}: expected an object, got {json.dumps(row)[:80]}")
    return rows
