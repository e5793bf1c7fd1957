"""The functions that the model of `paged demo --tools` may call. They are a file of tools like any other, which `paged
chat --tools` takes, too.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

_SIGNS: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 200  # characters of an expression
# of the towns that the model's stories are set in
_POPULATIONS = {"Millbrook": 9644, "Oldport": 48210, "Riverton": 21437, "Thornby": 3170}


def calculate(expression: str) -> float:
    """Works out an arithmetic expression.

    Args:
        expression: For example 2 + 3
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; the longest has {_LONGEST}")
    found = _value(ast.parse(expression.strip(), mode="eval").body)
    return int(found) if found == int(found) else round(found, 6)


def get_population(city: str) -> int:
    """Look up the population of the city."""
    if city not in _POPULATIONS:
        raise LookupError(f"unknown city; the list has {', '.join(_POPULATIONS)}")
    return _POPULATIONS[city]


def _value(node: ast.expr) -> float:
    """Of numbers and the four signs between them; nothing else is run."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_value(left), _value(right))
    raise ValueError("expected numbers with + - * / between them")
