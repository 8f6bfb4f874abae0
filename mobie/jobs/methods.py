"""What is known of a method before torch is there: attributes of its class, read from the syntax of `mobie/methods`.

A plan, a dry run and the tables ask here; a method says all this in its own file (`mobie/methods/base.py` has the
attributes), so that there is no list of methods elsewhere. A value must be a literal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from mobie.errors import ConfigError, unknown_name
from mobie.paths import PACKAGE


@dataclass(frozen=True)
class _Class:
    """A class of `mobie/methods`, as written."""

    module: str
    syntax: ast.ClassDef

    @property
    def bases(self) -> list[str]:
        return [base.id for base in self.syntax.bases if isinstance(base, ast.Name)]

    @property
    def registered(self) -> bool:
        return "register" in {getattr(decorator, "id", None) for decorator in self.syntax.decorator_list}

    def value(self, name: str) -> ast.expr | None:
        """What stands behind `name = …` in the body of the class, annotated or not; None where nothing does."""
        for statement in self.syntax.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                if isinstance(target, ast.Name) and target.id == name and statement.value is not None:
                    return statement.value
        return None


@cache
def _classes() -> tuple[_Class, ...]:
    found = []
    for path in sorted((PACKAGE / "methods").rglob("*.py")):
        module = ".".join(["mobie", *path.relative_to(PACKAGE).with_suffix("").parts])
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [_Class(module, node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return tuple(found)


@cache
def _registered() -> dict[str, _Class]:
    """Registered name → class."""
    found = {}
    for one in _classes():
        name = one.value("name")
        if one.registered and isinstance(name, ast.Constant):
            found[str(name.value)] = one
    return found


def _lineage(one: _Class) -> Iterator[_Class]:
    """A class and those it is derived from, nearest first."""
    yield one
    for name in one.bases:
        bases = [other for other in _classes() if other.syntax.name == name]
        for base in sorted(bases, key=lambda other: other.module != one.module)[:1]:
            yield from _lineage(base)


def method_modules() -> dict[str, str]:
    """Registered name of every method → its module."""
    return {name: one.module for name, one in _registered().items()}


def _method(name: str) -> _Class:
    if name not in _registered():
        raise ConfigError(unknown_name("method", name, _registered()))
    return _registered()[name]


@cache
def method_fact(method: str, attribute: str) -> Any:
    """A class attribute of a registered method, or the default of one of its options; None where it has neither.

    Raises:
        ConfigError: there is no such method.
        ValueError: the value is no literal, so that it cannot be read without running the file.
    """
    for one in _lineage(_method(method)):
        value = one.value(attribute)
        if value is not None:
            try:
                return ast.literal_eval(value)
            except ValueError as error:
                raise ValueError(
                    f"{one.module}: {attribute} is {ast.unparse(value)}, expected a literal: it is read before torch is"
                ) from error
    return None


def is_allocating(method: str) -> bool:
    """Whether a registered method surveys the whole model before it quantizes. Raises `ConfigError`."""
    return bool(method_fact(method, "survey_passes"))
