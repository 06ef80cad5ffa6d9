"""What an arithmetic expression comes to, without Python's `eval`, in bounded time and memory.

The numbers are those of numexpr, which Themis's calculator uses (https://github.com/pydata/numexpr): an expression of
constants is Python's arithmetic there, and a result must fit into 64 bits. What is no real number, such as sqrt(-1),
is an error here.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

LONGEST = 500
"""Characters of an expression; the longest of TARA has 97."""
MOST_BITS = 4096
"""Bits of an integer on the way to the result."""


def _rounded(how: Callable[[float], int]) -> Callable[[int | float], int | float]:
    """Rounding that leaves the type as it is."""
    return lambda value: value if isinstance(value, int) else float(how(value))


_FUNCTIONS: dict[str, Callable[[int | float], int | float]] = {
    "abs": abs,
    "ceil": _rounded(math.ceil),
    "floor": _rounded(math.floor),
    "trunc": _rounded(math.trunc),
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_UNARY: dict[type[ast.unaryop], Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Invert: operator.inv}
_BINARY: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.RShift: operator.rshift,
}


def evaluate(expression: str) -> int | float:
    """The value of numbers, `+ - * / // % ** & | ^ ~ << >>`, parentheses and functions of one number.

    Raises ValueError for anything else, and for numbers that are too large; ArithmeticError as Python does.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression is longer than {LONGEST} characters")
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is no arithmetic: {error}") from None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("the result does not fit into 64 bits")
    return value


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right):
            return _combined(_value(left), op, _value(right))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(argument))
    raise ValueError(f"{ast.unparse(node)!r} is no arithmetic")


def _combined(left: int | float, op: ast.operator, right: int | float) -> int | float:
    if isinstance(op, ast.Pow):
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        value = left**right
        if isinstance(value, complex):
            raise ValueError("the result is not a real number")
    elif isinstance(op, ast.LShift):
        _check_bits(left.bit_length() + right if isinstance(left, int) and isinstance(right, int) else 0)
        value = operator.lshift(left, right)
    elif type(op) in _BINARY:
        value = _BINARY[type(op)](left, right)
    else:
        raise ValueError(f"{type(op).__name__} is no arithmetic")
    if isinstance(value, int):
        _check_bits(value.bit_length())
    return value


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise ValueError(f"a number on the way has more than {MOST_BITS} bits")
