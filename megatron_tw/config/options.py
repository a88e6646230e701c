"""What a schema says of its options: the fields of its dataclasses, their types, defaults and docstring lines."""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def flag(name: str) -> str:
    """The flag of a field: `seq_length` -> `--seq-length`."""
    return "--" + name.replace("_", "-")


PATHS = {"paths": True}
"""Metadata of a field whose texts are paths: a comma is part of one, and a single one needs no list."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of the schema: `type` without its `| None`. paths: see `PATHS`."""

    name: str
    group: str
    type: Any
    nullable: bool
    default: Any
    help: str
    paths: bool = False

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers, one or several."""
        return (get_args(self.type)[0] if self.is_list else self.type) in (int, float)

    @property
    def expected(self) -> str:
        """The type in words."""
        if get_origin(self.type) is Literal:
            words = "one of " + ", ".join(map(str, get_args(self.type)))
        elif self.is_list:
            kinds = {int: "integers", float: "numbers", str: "strings"}
            words = "one path or more" if self.paths else "a list of " + kinds[get_args(self.type)[0]]
        else:
            words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[self.type]
        return words + (" or null" if self.nullable else "")

    @property
    def metavar(self) -> str:
        if get_origin(self.type) is Literal:
            return "{" + ",".join(map(str, get_args(self.type))) + "}"
        if self.is_list:
            return "PATH ..." if self.paths else "A,B,..."
        return {int: "N", float: "X", str: "TEXT"}[self.type]

    @property
    def full_help(self) -> str:
        if self.default is MISSING:
            return f"{self.help} [required]"
        if self.default is None:
            return self.help if "null:" in self.help else f"{self.help} [null]"
        return f"{self.help} [{('on' if self.default else 'off') if self.type is bool else self.default}]"


def groups_of(schema: type) -> dict[str, Any]:
    """The dataclasses that `schema` is made of, by the name of the field that holds each."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}


@functools.cache
def options_of(schema: type) -> Mapping[str, Option]:
    """All options of `schema` by name."""
    options: dict[str, Option] = {}
    for group, group_class in groups_of(schema).items():
        helps, hints = _field_docs(group_class), get_type_hints(group_class)
        for field in fields(group_class):
            assert field.name not in options, f"two options named {field.name}"
            hint, nullable = _without_none(hints[field.name])
            options[field.name] = Option(
                name=field.name,
                group=group,
                type=hint,
                nullable=nullable,
                default=_default(field),
                help=helps[field.name],
                paths=bool(field.metadata.get("paths")),
            )
    return MappingProxyType(options)


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`int | None` -> (int, True); `int` -> (int, False)."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    (plain,) = [arm for arm in get_args(hint) if arm is not type(None)]
    return plain, True


@functools.cache
def _field_docs(group_class: type) -> dict[str, str]:
    """The string under each field of a dataclass, by the field's name; those of its base classes too."""
    docs: dict[str, str] = {}
    for base in filter(is_dataclass, group_class.__bases__):
        docs |= _field_docs(base)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(group_class))).body
    assert isinstance(tree, ast.ClassDef)
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
