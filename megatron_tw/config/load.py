"""Options from YAML files and flags into dataclasses, and back.

A schema is a dataclass whose fields are dataclasses (RunConfig is one), each a group of options: its docstring is the
group's title, the line under a field is the option's help. jsonargparse does the typed parsing; this file gives it the
flags, finds keys that nobody knows, and says what is wrong in one line. Flags win over YAML wherever they stand; of
two YAML files the later wins.
"""

import difflib
import functools
import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter

from megatron_tw.config.errors import remember_options, user_errors
from megatron_tw.config.options import Option, flag, groups_of, options_of
from megatron_tw.config.programs import programs_with
from megatron_tw.config.schema import RunConfig

Schema = TypeVar("Schema")

_READ_OTHERWISE = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")
"""Numbers of which YAML makes what nobody means: 0100 is 64 (octal), 1:30 is 90 (minutes and seconds)."""
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_SMALLEST_FP32, _LARGEST_FP32 = 1.2e-38, 3.4e38


def load_config(argv: Sequence[str], *, prog: str, description: str) -> RunConfig:
    """The options of a training run from its arguments; see `load_options`."""
    return load_options(argv, RunConfig, prog=prog, description=description)


def load_options(argv: Sequence[str], schema: type[Schema], *, prog: str, description: str) -> Schema:
    """Like `parse_options`, for a program: a mistake is one line `error: ...` on stderr and exit status 2."""
    with user_errors():
        return parse_options(argv, schema, prog=prog, description=description)


def parse_options(argv: Sequence[str], schema: type[Schema], *, prog: str = "", description: str = "") -> Schema:
    """Parse arguments into an instance of `schema`. `--help` prints the options and exits.

    Args:
        argv: arguments after the program's name; `--config FILE.yaml` may stand anywhere among them.
        schema: dataclass of dataclasses; no option name may occur twice.

    Raises:
        ValueError: unknown option or YAML key, wrong type, missing required option, unreadable or malformed file; the
        message names it.
    """
    kind: type = schema  # which can be hashed, mypy says
    options = options_of(kind)
    remember_options({}, {})
    parser = _parser(kind, prog, description)
    files, flags = _split_config_files(argv)
    _check_flags(flags, options)
    for file in files:
        _check_yaml(file, options)
    origins = _files_of_values(files, flags, options)
    remember_options({}, origins)
    arguments = [f"--config={_as_flags_take_it(file, options)}" for file in files] + _join_lists(flags, options)
    try:
        values = vars(parser.parse_args(arguments))
    except ArgumentError as error:
        raise ValueError(_one_line(str(error), options)) from None
    _check_values(values, options)
    remember_options({name: values[name] for name in options}, origins)
    groups = {
        name: group(**{field.name: values[field.name] for field in fields(group)})
        for name, group in groups_of(schema).items()
    }
    return schema(**groups)


def flat_options(config: object) -> dict[str, Any]:
    """Every option of `config` by its YAML key, as plain YAML values."""
    assert is_dataclass(config)
    groups = [getattr(config, group.name) for group in fields(config)]
    options = {field.name: (field, getattr(group, field.name)) for group in groups for field in fields(group)}
    return {name: _plain(value, bool(field.metadata.get("paths"))) for name, (field, value) in options.items()}


def _plain(value: Any, paths: bool) -> Any:
    """A value as YAML has it; of `paths` a single one is no list."""
    if not isinstance(value, tuple):
        return value
    return value[0] if paths and len(value) == 1 else list(value)


def save_config(config: object, path: str | Path) -> None:
    """Write all options as a YAML file that `load_options` reads back to an equal object."""
    Path(path).write_text(yaml.safe_dump(flat_options(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def differences(before: str | Path, config: object) -> list[str]:
    """`option: value then -> value now`, for each option that differs from what `save_config` wrote to `before`."""
    then, now = yaml.safe_load(Path(before).read_text(encoding="utf-8")), flat_options(config)
    return [f"{name}: {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]


class _HelpFormatter(DefaultHelpFormatter):
    """Shows the help as it is written: it holds the default already."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=120)

    def _get_help_string(self, action: Any) -> str:
        return str(action.help).replace("%", "%%")


@functools.cache
def _parser(schema: type, prog: str, description: str) -> ArgumentParser:
    options = options_of(schema)
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=description,
        epilog="A YAML file holds options under their names with underscores. null takes back what it says.",
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE.yaml",
        help="YAML file of options; flags win over it, and of several files the later",
    )
    for name, group in groups_of(schema).items():
        title, _, text = (inspect.getdoc(group) or name).partition(":")
        section = parser.add_argument_group(title.strip(" ."), text.strip()[:1].upper() + text.strip()[1:] or None)
        for option in options.values():
            if option.group != name:
                continue
            keywords = {"help": option.full_help} | (
                {"required": True} if option.default is MISSING else {"default": option.default}
            )
            if option.type is bool:
                section.add_argument(flag(option.name), action=ActionYesNo(no_prefix="no-"), **keywords)
            else:
                hint = option.type | None if option.nullable else option.type
                section.add_argument(flag(option.name), type=hint, metavar=option.metavar, **keywords)
    return parser


def _split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of --config, and the arguments that are left."""
    files, rest = [], []
    arguments: Iterator[str] = iter(argv)
    for argument in arguments:
        if argument == "--config":
            files.append(next(arguments, ""))
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"--config: expected a YAML file, got {file!r}, which is no file")
    return files, rest


def unknown_option(name: str, known: Iterable[str]) -> str:
    """What to say of an unknown name, a flag or a YAML key: which programs have it, or else the nearest known one."""
    option = name.lstrip("-").replace("-", "_")
    programs = programs_with(option) or programs_with(option.removeprefix("no_"))
    if programs:
        *others, last = programs
        have = f"{', '.join(others)} and {last} have it" if others else f"{last} has it"
        return f"unknown option {name}: it does nothing here; {have}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists them")


def _check_flags(flags: Sequence[str], options: Mapping[str, Option]) -> None:
    known = {"--help"} | {flag(name) for name in options}
    known |= {flag("no_" + name) for name, option in options.items() if option.type is bool}
    for argument in flags:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise ValueError(unknown_option(name, known))
    one_value = {flag(name) for name, option in options.items() if not option.is_list and option.type is not bool}
    for before, value, next_one in zip(flags, flags[1:], flags[2:], strict=False):
        if before in one_value and not value.startswith("--") and not next_one.startswith("--"):
            expected = options[before[2:].replace("-", "_")].expected
            raise ValueError(f"{before}: expected {expected}, got more than one value: {value} {next_one}")
    for option, text in _values_of_flags(flags, options):
        for item in text.strip("[]").split(",") if option.is_number else ():
            _check_number(item.strip(), option, flag(option.name))
        if option.type is str and text.strip() and text != "null" and _is_null(text):
            raise ValueError(f"{flag(option.name)}: expected {option.expected}, got {text}, which YAML reads as null")


def _values_of_flags(flags: Sequence[str], options: Mapping[str, Option]) -> Iterator[tuple[Option, str]]:
    """Each option that has values, with each of them."""
    by_flag = {flag(name): option for name, option in options.items() if option.type is not bool}
    option = None
    for argument in flags:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = by_flag.get(name)
            if option is not None and equals:
                yield option, value
        elif option is not None:
            yield option, argument


def _is_null(text: str) -> bool:
    try:
        return yaml.safe_load(text) is None
    except yaml.YAMLError:
        return False


def _check_number(text: str, option: Option, place: str) -> None:
    """Refuse a number that YAML reads otherwise than people do; `place` names the option in the error."""
    if _READ_OTHERWISE.fullmatch(text):
        raise ValueError(f"{place}: expected {option.expected}, got {text}, which YAML reads as {yaml.safe_load(text)}")


def _check_yaml(file: str, options: Mapping[str, Option]) -> None:
    """Unknown and repeated keys, wrong nulls and booleans, with their line: of these jsonargparse has less to say."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)  # tags and keys that only show when values are made
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {file}: not a YAML file: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(
            f"--config {file}: expected lines `option: value`, got {'nothing' if root is None else root.id}"
        )
    seen = set()
    for key, value in root.value:
        name, place = str(key.value), f"--config {file}, line {key.start_mark.line + 1}"
        if name not in options:
            raise ValueError(f"{place}: {unknown_option(name, options)}")
        if name in seen:
            raise ValueError(f"{place}: {name} is set twice")
        seen.add(name)
        is_null, is_bool = (value.tag == f"tag:yaml.org,2002:{tag}" for tag in ("null", "bool"))
        option = options[name]
        if (is_null and not option.nullable) or (option.type is bool and not is_bool and not is_null):
            raise ValueError(f"{place}: {name}: expected {option.expected}, got {value.value or 'null'}")
        if isinstance(value, yaml.MappingNode):
            _check_repeated(file, name, value)
        for scalar in _scalars(value, set()):
            if option.is_number or scalar.tag in _NUMBER_TAGS:
                place = f"--config {file}, line {scalar.start_mark.line + 1}: {name}"
                _check_number(scalar.value.strip(), option, place)


def _scalars(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """All plain values and keys below a node, each once (an anchor may hold itself)."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in item if isinstance(item, tuple) else (item,):
            yield from _scalars(part, seen)


def _check_repeated(file: str, option: str, mapping: yaml.MappingNode) -> None:
    """A key twice in the mapping of an option, of which YAML would take the last."""
    seen = set()
    for key, _ in mapping.value:
        name = str(key.value)
        if name in seen:
            raise ValueError(f"--config {file}, line {key.start_mark.line + 1}: {option}: {name} is set twice")
        seen.add(name)


def _as_flags_take_it(file: str, options: Mapping[str, Option]) -> str:
    """The YAML file's name; or, where weighting_schedule is a list of stages or a mapping, weighting_parameters a
    mapping, or paths are given, its content with the texts that the flags take."""
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    texts: dict[str, Any] = {}
    for name in (name for name in content if options[name].paths and content[name] is not None):
        paths = content[name] if isinstance(content[name], list) else [content[name]]
        texts[name] = [str(item) if type(item) in (int, float) else item for item in paths]
    schedule, parameters = content.get("weighting_schedule"), content.get("weighting_parameters")
    if isinstance(schedule, list | dict):
        stages = [
            f"{step}: {scheme}"
            for entry in (schedule if isinstance(schedule, list) else [schedule])
            for step, scheme in (entry.items() if isinstance(entry, dict) else [str(entry).partition(":")[::2]])
        ]
        texts["weighting_schedule"] = "; ".join(stages)
    if isinstance(parameters, dict):
        texts["weighting_parameters"] = [f"{name}={number}" for name, number in parameters.items()]
    return yaml.safe_dump({**content, **texts}, sort_keys=False) if texts else file


def _check_values(values: dict[str, Any], options: Mapping[str, Option]) -> None:
    """What no option takes: an empty text (a variable that is not set, in a path), an integer beyond 64 bits,
    a number that is 0 or infinite in fp32."""
    for name in options:
        for value in values[name] if isinstance(values[name], list | tuple) else [values[name]]:
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"{flag(name)}: expected {options[name].expected}, got an empty text")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{flag(name)}: expected an integer of 64 bits, got {value}")
            small_or_large = isinstance(value, float) and not _SMALLEST_FP32 <= abs(value) <= _LARGEST_FP32
            if small_or_large and value != 0 and math.isfinite(value):
                raise ValueError(
                    f"{flag(name)}: expected a number of 32 bits ({_SMALLEST_FP32} to {_LARGEST_FP32}), got {value}"
                )


def _files_of_values(files: Sequence[str], flags: Sequence[str], options: Mapping[str, Option]) -> dict[str, str]:
    """The YAML file of each option whose value no flag gave."""
    origins: dict[str, str] = {}
    for file in files:
        origins |= dict.fromkeys(yaml.safe_load(Path(file).read_text(encoding="utf-8")), file)
    given = {argument.partition("=")[0] for argument in flags}
    return {
        name: file for name, file in origins.items() if not given & {flag(name), flag("no_" + name)} and name in options
    }


def _join_lists(flags: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """Make the values of a list option, given with spaces or commas, the one bracketed value that jsonargparse reads.

    >>> _join_lists(["--transforms", "minus", "shift 2", "--bf16"], options_of(RunConfig))
    ['--transforms=["minus", "shift 2"]', '--bf16']
    """
    lists = {flag(name): option for name, option in options.items() if option.is_list}
    joined: list[str] = []
    position = 0
    while position < len(flags):
        name, equals, value = flags[position].partition("=")
        position += 1
        if name not in lists:
            joined.append(flags[position - 1])
            continue
        values = [value] if equals else []
        while not equals and position < len(flags) and not flags[position].startswith("--"):
            values.append(flags[position])
            position += 1
        if not values:
            raise ValueError(f"{name}: expected values, got none ([] is the empty list)")
        option = lists[name]
        is_list = values[0].startswith("[") and (values[-1].endswith("]") or not option.paths)
        if values[0] != "null" and not is_list:
            items = values if option.paths else [item.strip() for value in values for item in value.split(",")]
            as_text = get_args(option.type)[0] is str
            values = ["[" + ", ".join(json.dumps(item) if as_text else item for item in items) + "]"]
        joined.append(f"{name}={' '.join(values)}")
    return joined


def _one_line(message: str, options: Mapping[str, Option]) -> str:
    """jsonargparse's account of a wrong value, in lines of typing's names, as `--option: expected ..., got ...`."""
    if match := re.match(r'Parser key "(\w+)"', message):
        option = options.get(match[1])
        got = re.findall(r"(?:Got|Given) value: (.*)", message)
        if option is not None and got:
            return f"{flag(option.name)}: expected {option.expected}, got {got[-1]}"
    if match := re.search(r"arguments are required: (.*)", message):
        return "missing " + ", ".join(flag(name.strip()) for name in match[1].split(","))
    return " ".join(message.split())
