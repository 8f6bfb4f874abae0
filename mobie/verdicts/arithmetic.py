"""Arithmetic as text over draws: `100 * (mobie / other - 1)`, `min(layers)`, `place(own, others)`.

Numbers, names, + - * / and the functions below; a list is an array with one more axis in front, which functions reduce.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

import numpy as np

from mobie.errors import ConfigError, unknown_name
from mobie.verdicts.sampling import Draws

OPERATORS: dict[type[ast.operator], Callable[[Draws, Draws], Draws]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _stack(values: tuple[Draws, ...]) -> Draws:
    """Scalars and lists as one list: `(count, draws)`."""
    return np.concatenate([np.atleast_2d(value) for value in values])


def _place(own: Draws, others: Draws) -> Draws:
    """1 + how many of the others are lower; a tie does not push it down."""
    return 1.0 + (np.atleast_2d(others) < own).sum(axis=0)


FUNCTIONS: dict[str, Callable[..., Draws]] = {
    "mean": lambda *values: _stack(values).mean(axis=0),
    "min": lambda *values: _stack(values).min(axis=0),
    "max": lambda *values: _stack(values).max(axis=0),
    "abs": np.abs,
    "place": _place,
}


def evaluate(expression: str, values: Mapping[str, Draws]) -> Draws:
    """Draws of an expression; not finite where a denominator is zero.

    Raises:
        ConfigError: no such name or function, no arithmetic, or a list that no function reduces.
    """
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"{expression!r} is no arithmetic: {error.msg}") from error
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.asarray(_value(tree, values, expression))
    if found.ndim != 1:
        raise ConfigError(f"{expression!r} gives a list; put it into {', '.join(FUNCTIONS)}")
    return found


def _value(node: ast.expr, names: Mapping[str, Draws], expression: str) -> Draws:
    match node:
        case ast.Constant(value=int() | float() as number):
            return np.asarray(number, dtype=np.float64)
        case ast.Name(id=name):
            if name not in names:
                raise ConfigError(f"{expression!r}: {unknown_name('value', name, names)}")
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names, expression)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names, expression), _value(right, names, expression))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            if name not in FUNCTIONS:
                raise ConfigError(f"{expression!r}: {unknown_name('function', name, FUNCTIONS)}")
            return FUNCTIONS[name](*(_value(arg, names, expression) for arg in args))
    raise ConfigError(f"{expression!r}: {ast.unparse(node)!r} is not understood; expected numbers, names, + - * /")
