"""Flags of the tools that need no YAML: argparse with this project's help and one-line errors."""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_tw.config.errors import remember_options
from megatron_tw.config.load import unknown_option


class ToolParser(argparse.ArgumentParser):
    """A parser whose `parse` raises ValueError with one line where argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [options]",
            description=description,
            epilog=epilog,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=40, width=120),
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, which errors can name from here on.

        Raises:
            ValueError: unknown, missing or malformed options; names them.
        """
        options, rest = self.parse_known_args(argv)
        if rest:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            raise ValueError(unknown_option(rest[0].partition("=")[0], known))
        remember_options(vars(options), {})
        return options

    def error(self, message: str) -> NoReturn:
        """In argparse's words, without its prefixes."""
        message = re.sub(r"^argument (\S+):", r"\1:", message)
        message = re.sub(r"^the following arguments are required:", "missing", message)
        message = re.sub(r"invalid int value: (.*)", r"expected an integer, got \1", message)
        raise ValueError(re.sub(r"invalid float value: (.*)", r"expected a number, got \1", message))


def path(text: str) -> Path:
    """The type of an option that is a path: not empty, as a variable is that nobody set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def text(value: str) -> str:
    """The type of an option that is a text: not empty."""
    if not value.strip():
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return value


def named_path(value: str) -> tuple[str, Path]:
    """The type of an option `NAME=DIR`."""
    name, _, folder = value.partition("=")
    if not (name.strip() and folder.strip()):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {value!r}")
    return name, Path(folder)


def by_name(option: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """`NAME=DIR` pairs by name.

    Raises:
        ValueError: a name that stands twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{option}: expected each name once, got {name} {names.count(name)} times")
    return dict(pairs)
