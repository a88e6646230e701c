"""The figures of one evaluation, for people and programs: results.json, and the same as a table, results.csv.

    {"format": "megatron_tw results", "format_version": 1, "model": ..., "layout": ..., "tokenizer_fingerprint": ...,
     "settings": {option: value}, "records": [record, ...], "checksum": ...}

A record is one figure: see `Record`. results.csv has a line for each, under a header line.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tw.data.files import header_checksum, header_json, typed

FORMAT = "megatron_tw results"
FORMAT_VERSION = 1
JSON_FILE, CSV_FILE = "results.json", "results.csv"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One figure of one task."""

    suite: str
    """What the task belongs to: loss, longppl, ruler, mmlu, bbh, longbench, longbench2."""
    task: str
    """Within the suite; "all" or "average" for what is made from all of them."""
    length: int | None = None
    """Tokens of the rows or prompts; None: as long as each is."""
    metric: str
    """Of what, as "nll", "acc", "exactness"; shares are 0 to 1."""
    value: float | None = None
    """None: see `not_run`, or `samples` is 0."""
    stderr: float | None = None
    """Standard error of the value; None: not known."""
    samples: int = 0
    """Targets or examples behind the value."""
    not_run: str | None = None
    """Why there is no value; None: there is one, or there was nothing to take it from."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All figures of one evaluation, and what they are of."""

    model: str
    """The checkpoint or Hugging Face folder, as it was named."""
    layout: str
    """Parallel layout, for people: "TP 2 x CP 2"."""
    tokenizer_fingerprint: str | None
    """None: nobody knows the tokenizer."""
    settings: Mapping[str, Any]
    """Options that the figures depend on, by name."""
    records: tuple[Record, ...]

    def write(self, folder: Path) -> None:
        """Both files into an existing folder.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        for record in self.records:
            for number in (record.value, record.stderr):
                if number is not None and not math.isfinite(number):
                    raise ValueError(
                        f"{self.model}: {record.suite} {record.task} {record.metric} is {number}; nothing was written"
                    )
        (folder / JSON_FILE).write_text(header_json(FORMAT, FORMAT_VERSION, self), encoding="utf-8")
        (folder / CSV_FILE).write_text(as_csv(self.records), encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> "Results":
        """Read results.json of a folder that tools/evaluate.py wrote. Fields that this program does not know are left
        out.

        Raises:
            ValueError: no such file, one of another format version, or one that is damaged.
        """
        file = Path(folder) / JSON_FILE
        if not file.is_file():
            raise ValueError(f"{file} is missing: expected a folder that tools/evaluate.py wrote")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is truncated or no JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'{file}: not a file of "{FORMAT}"')
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file}: format version {content.get('format_version')}, but this program reads version "
                f"{FORMAT_VERSION}; evaluate again with tools/evaluate.py"
            )
        checksum = content.pop("checksum", None)
        if checksum is not None and checksum != header_checksum(content):
            raise ValueError(f"{file}: its fields are not those that were written with its checksum: damaged or edited")
        records = content.get("records")
        if not isinstance(records, list):
            raise ValueError(f"{file}: records: expected a list")
        known = {field.name for field in dataclasses.fields(Results)} - {"records"}
        header: dict[str, Any] = {name: content.get(name) for name in known}
        for name in ("model", "layout"):
            if not isinstance(header[name], str):
                raise ValueError(f"{file}: {name}: expected text, got {json.dumps(header[name])[:80]}")
        if not isinstance(header["settings"], dict):
            raise ValueError(f"{file}: settings: expected a JSON object")
        return Results(**header, records=tuple(_record(record, f"{file}: record") for record in records))


def _record(content: object, where: str) -> Record:
    names = {field.name for field in dataclasses.fields(Record)}
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object")
    record: Record = typed(Record, {name: value for name, value in content.items() if name in names}, where)
    return record


def as_csv(records: Iterable[Record]) -> str:
    """The records as a table, a line each; an empty cell where a field is None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Record)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(record) for record in records)
    return text.getvalue()


def as_lines(records: Iterable[Record]) -> list[str]:
    """The records for people, a line each."""
    lines = []
    for record in records:
        what = f"{record.suite} {record.task}" + (f" at {record.length:,} tokens" if record.length else "")
        if record.value is None:
            lines.append(f"  {what}: {record.metric} not run: {record.not_run or 'no samples'}")
        else:
            error = "" if record.stderr is None else f" ± {record.stderr:.4f}"
            lines.append(f"  {what}: {record.metric} {record.value:.4f}{error} ({record.samples:,} samples)")
    return lines
