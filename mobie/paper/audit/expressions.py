"""Arithmetic as text: `100 * (theirs - ours) / theirs`, evaluated over entries that are known to their last digit.

Only numbers, names, + - * / ** and the functions below are understood; nothing else of Python is.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mobie.errors import ConfigError, unknown_name

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "mean": lambda *values: statistics.fmean(values),
    "sum": lambda *values: sum(values),
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "abs": abs,
    "count": lambda *values: len(values),
}


@dataclass(frozen=True)
class Entry:
    """A printed number: `value` (None where the text is no number) ± `half`, half a unit of its last digit."""

    text: str
    value: float | None
    half: float = 0.0

    @property
    def number(self) -> float:
        """The value. Raises `ConfigError` where there is none."""
        if self.value is None:
            raise ConfigError(f"got {self.text!r} in arithmetic, expected a number")
        return self.value


Values = Mapping[str, Entry | Sequence[Entry]]


def parse_entry(text: str, decimals: int | None = None, exact: bool = False) -> Entry:
    """A printed number with the rounding its text shows: `14.37` ± 0.005, `7e2` ± 50; `decimals` overrules the text."""
    text = text.strip()
    found = re.fullmatch(r"[-+]?\d{1,30}(?:\.(\d{1,30}))?(?:e([-+]?\d{1,2}))?", text)
    if found is None:
        return Entry(text, None)
    shown = len(found[1] or "") - int(found[2] or 0)
    return Entry(text, float(text), 0.0 if exact else 0.5 * 10.0 ** -(shown if decimals is None else decimals))


def evaluate(expression: str, values: Values) -> tuple[float, float]:
    """Value of an expression, and how far rounding of the entries can move it.

    Each entry is moved by half a unit both ways; the largest moves are added. This is exact where the expression is
    linear and a bound to first order elsewhere.

    Raises:
        ConfigError: no such name or function, no arithmetic, a division by zero, or an entry that is no number.
    """
    tree = _parse(expression)
    numbers = {name: _numbers(entry) for name, entry in values.items()}
    centre = _value(tree, numbers, expression)
    if math.isnan(centre):
        raise ConfigError(f"{expression!r}: an entry is no number; expected numbers, or count()")
    tolerance = 0.0
    for name, entry in values.items():
        for position, part in enumerate([entry] if isinstance(entry, Entry) else entry):
            if part.half:
                tolerance += max(
                    abs(_value(tree, numbers | {name: _moved(entry, position, step)}, expression) - centre)
                    for step in (part.half, -part.half)
                )
    return centre, tolerance


def shown(expression: str, values: Values) -> str:
    """The expression with the printed entries in place of the names."""

    def text(match: re.Match[str]) -> str:
        entry = values.get(match[0])
        if entry is None:
            return match[0]
        return entry.text if isinstance(entry, Entry) else ", ".join(part.text for part in entry)

    return re.sub(r"[A-Za-z_]\w*", text, expression)


def _numbers(entry: Entry | Sequence[Entry]) -> float | tuple[float, ...]:
    """The number, or those of a list, where labels (which can only be counted) are NaN."""
    return entry.number if isinstance(entry, Entry) else _listed(entry)


def _listed(entries: Sequence[Entry]) -> tuple[float, ...]:
    return tuple(math.nan if part.value is None else part.value for part in entries)


def _moved(entry: Entry | Sequence[Entry], position: int, step: float) -> float | tuple[float, ...]:
    if isinstance(entry, Entry):
        return entry.number + step
    return tuple(number + (step if index == position else 0.0) for index, number in enumerate(_listed(entry)))


def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"{expression!r} is no arithmetic: {error.msg}") from error


def _value(node: ast.expr, names: Mapping[str, float | tuple[float, ...]], expression: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            found = _lookup(name, names, expression)
            if isinstance(found, tuple):
                raise ConfigError(
                    f"{expression!r}: {name} is a list; put it into mean(), sum(), min(), max() or count()"
                )
            return found
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names, expression)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _combine(OPERATORS[type(op)], _value(left, names, expression), _value(right, names, expression))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _call(name, args, names, expression)
    raise ConfigError(f"{expression!r}: {ast.unparse(node)!r} is not understood; expected numbers, names, + - * / **")


def _combine(operation: Callable[[float, float], float], left: float, right: float) -> float:
    try:
        return float(operation(left, right))
    except (ArithmeticError, TypeError) as error:  # TypeError: a root of a negative number
        raise ConfigError(f"{left:g} and {right:g}: {operation.__name__} gives no number ({error})") from error


def _call(name: str, args: list[ast.expr], names: Mapping[str, float | tuple[float, ...]], expression: str) -> float:
    values: list[float] = []
    for arg in args:
        if isinstance(arg, ast.Name) and isinstance(found := _lookup(arg.id, names, expression), tuple):
            values += found
        else:
            values.append(_value(arg, names, expression))
    if name not in FUNCTIONS:
        raise ConfigError(f"{expression!r}: {unknown_name('function', name, FUNCTIONS)}")
    try:
        return float(FUNCTIONS[name](*values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{expression!r}: {name}() of {len(values)} values: {error}") from error


def _lookup(name: str, names: Mapping[str, float | tuple[float, ...]], expression: str) -> float | tuple[float, ...]:
    if name not in names:
        raise ConfigError(f"{expression!r}: {unknown_name('value', name, names)}")
    return names[name]
