"""The options of token weighting as Megatron-LM takes them, among its own arguments.

Some of their names are Megatron-LM's already (`--normalization` is its kind of norm), so here those of a scheme all
begin with `--token-weighting`: what this project's own tools call `--interpolation` is
`--token-weighting-interpolation`. Those of the windows keep their names.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from megatron_tw.config import ShortWindows, WeightingOptions, WindowsConfig, check_own_windows, check_weighting
from megatron_tw.config.options import Option, flag, options_of
from megatron_tw.weighting import WeightingSchedule
from megatron_tw.weighting.options import schedule_from_options

MAIN = "token_weighting"
_BOS = f"{MAIN}_bos_id"


@dataclass(frozen=True, kw_only=True)
class TokenWeightingOptions:
    """What a run is asked for. bos_id: replaces the first token of a window where the row begins with it; None: none
    does."""

    weighting: WeightingOptions
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    bos_id: int | None = None

    def schedule(self) -> WeightingSchedule:
        """The scheme of every step. Raises ValueError; names the option as this project's own programs do."""
        return schedule_from_options(self.weighting)

    def windows_of_rows(self, seq_length: int) -> ShortWindows | None:
        """The windows of rows of `seq_length` tokens, None without --short-window."""
        return self.windows.of_rows(seq_length)

    def check(self, seq_length: int) -> None:
        """Raises ValueError where options do not fit each other or rows of `seq_length` tokens; see `schedule`."""
        check_weighting(self.weighting)
        check_own_windows(self.windows, seq_length)
        schedule = self.schedule()
        schedule.check_rows(seq_length + 1)  # as many tokens as S targets take
        if schedule.needs_scorer and self.windows.short_window is None:
            raise ValueError("--short-window: the weighting compares with short windows, got none")


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """The dataclasses whose fields become flags."""

    weighting: WeightingOptions
    windows: WindowsConfig


def _dest(option: Option) -> str:
    """Where Megatron-LM's namespace keeps it: under a prefix, since its config classes take up names that they know."""
    return MAIN if option.name == "weighting" else f"{MAIN}_{option.name.removeprefix('weighting_')}"


def _flag(option: Option) -> str:
    return flag(_dest(option) if option.group == "weighting" else option.name)


_OPTIONS = tuple(options_of(_Groups).values())


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options to Megatron-LM's parser. It is an `extra_args_provider`; a script that calls `install()` itself
    need not name it."""
    group = parser.add_argument_group("token weighting", "Off without --token-weighting.")
    for option in _OPTIONS:
        default = None if option.name == "weighting" else option.default
        group.add_argument(
            _flag(option),
            dest=_dest(option),
            default=default,
            type=_reader(option),
            metavar=option.metavar,
            help=renamed_text(option.help).replace("%", "%%"),
        )
    group.add_argument(
        "--short-window-bos-id",
        dest=_BOS,
        type=int,
        metavar="N",
        help="Id that replaces a window's first token where the row begins with it (null: none does).",
    )
    return parser


def _reader(option: Option) -> Callable[[str], Any]:
    """From the text of a flag to the option's value."""
    if option.is_list:
        return lambda text: tuple(part.strip() for part in text.split(","))
    if get_origin(option.type) is Literal:

        def one_of(text: str) -> str:
            if text not in get_args(option.type):
                raise argparse.ArgumentTypeError(f"expected {option.expected}, got {text!r}")
            return text

        return one_of
    reader: Callable[[str], Any] = option.type
    return reader


def options_from(namespace: Any) -> TokenWeightingOptions | None:
    """What parsed arguments ask for; None without --token-weighting.

    Raises:
        ValueError: one of the other options stands there without it.
    """
    values = vars(namespace)
    if values.get(MAIN) is None:
        for option in _OPTIONS:
            if values.get(_dest(option), option.default) != option.default and option.name != "weighting":
                raise ValueError(f"{_flag(option)}: is for --token-weighting, which is not given")
        if values.get(_BOS) is not None:
            raise ValueError("--short-window-bos-id: is for --token-weighting, which is not given")
        return None

    def group(kind: type) -> Any:
        names = {option.name: option for option in _OPTIONS}
        return kind(**{f.name: values.get(_dest(names[f.name]), names[f.name].default) for f in fields(kind)})

    return TokenWeightingOptions(
        weighting=group(WeightingOptions), windows=group(WindowsConfig), bos_id=values.get(_BOS)
    )


def asked_for(argv: list[str]) -> bool:
    """Whether a command line has any option of this project."""
    flags = {*map(_flag, _OPTIONS), "--short-window-bos-id"}
    return any(word.partition("=")[0] in flags for word in argv)


_RENAMED = {flag(option.name): _flag(option) for option in _OPTIONS if flag(option.name) != _flag(option)}
_RENAMED_FLAG = re.compile("|".join(rf"(?<![\w-]){name}(?![\w-])" for name in _RENAMED))


def renamed_text(text: str) -> str:
    """With the options called as they are here.

    >>> renamed_text("--weighting dense: --interpolation and --short-window")
    '--token-weighting dense: --token-weighting-interpolation and --short-window'
    """
    return _RENAMED_FLAG.sub(lambda match: _RENAMED[match.group()], text)


def renamed(check: Callable[[], Any]) -> Any:
    """What `check` returns; its ValueError calls the options as they are here."""
    try:
        return check()
    except ValueError as error:
        raise ValueError(renamed_text(str(error))) from error
