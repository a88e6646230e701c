"""Writes docs/options.md: every option of the programs that read YAML, from the schemas that the programs read.

python tools/list_options.py > docs/options.md
"""

import inspect
import sys
from typing import Any

from megatron_tw.config import RunConfig
from megatron_tw.config.conversion import ConversionConfig
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.config.options import flag, groups_of, options_of
from megatron_tw.config.plan import OwnPlanOptions
from megatron_tw.config.scoring import ScoringConfig

PROGRAMS: dict[str, type] = {
    "tools/train.py": RunConfig,
    "tools/evaluate.py": EvaluationConfig,
    "tools/score_tokens.py": ScoringConfig,
    "tools/convert_checkpoint.py": ConversionConfig,
    "tools/plan.py": OwnPlanOptions,
}

HEAD = """\
# Options

Every option is a flag (`--seq-length 32768`) and a YAML key (`seq_length: 32768`). `--config FILE.yaml` reads YAML
files: of two files the later wins, and flags win over files. Unknown names are errors. A switch is turned off by
`--no-NAME`. Names are Megatron's where Megatron has one. All options are checked against each other, the model and
the number of ranks before anything is allocated. The resolved ones are saved with each checkpoint.

`tools/preprocess_data.py` and `tools/report.py` take flags only; their `--help` lists them. Each table says which
programs take its options; `tools/plan.py` takes all of `tools/train.py` besides its own.

This page is made by `python tools/list_options.py > docs/options.md`.
"""


def markdown() -> str:
    """The page: a table for each group of options, and for each program the groups that it takes."""
    owners: dict[type, list[str]] = {}
    for program, schema in PROGRAMS.items():
        for group in groups_of(schema).values():
            owners.setdefault(group, []).append(program)
    lines = [HEAD]
    for program, schema in PROGRAMS.items():
        for name, group in groups_of(schema).items():
            if owners[group][0] == program:
                lines += _table(schema, name, group, owners[group])
    return "\n".join(lines)


def _table(schema: type, name: str, group: Any, programs: list[str]) -> list[str]:
    title, _, text = (inspect.getdoc(group) or name).partition(":")
    text = " ".join(text.split())
    rows = [
        f"| `{flag(option.name)}` | {option.full_help.replace('|', chr(92) + '|')} |"
        for option in options_of(schema).values()
        if option.group == name
    ]
    taken = ", ".join(f"`{program}`" for program in programs)
    heading = f"{text[:1].upper()}{text[1:]} " if text else ""
    return [f"## {title.strip(' .')}", "", f"{heading}In {taken}.", "", "| option | |", "| --- | --- |", *rows, ""]


if __name__ == "__main__":
    sys.stdout.write(markdown())
