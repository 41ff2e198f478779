"""Arithmetic of a Python program, evaluated from its syntax tree: nothing is executed, so it is safe everywhere.

Numbers, + - * / // % **, parentheses, names assigned before, min max abs sum round, and print. The output is what Python
would print; everything else is an error that says what is missing.
"""

from __future__ import annotations

import ast
import operator
import time
from collections.abc import Callable
from typing import Any

from ctpo_megatron.rollout.output import clip_middle
from ctpo_megatron.rollout.protocols import ToolResult

MAX_CODE_CHARS = 4000
MAX_BITS = 8192  # of a whole number; below the length at which Python refuses to print one
MAX_DIGITS = 1000  # that round may be asked for
Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs, "sum": sum, "round": round}


class CalculatorError(Exception):
    """The program asks for more than arithmetic."""


class Calculator:
    """The tool for hosts without a sandbox."""

    def __init__(self, max_output_chars: int = 256) -> None:
        self._max_output_chars = max_output_chars

    async def run(self, code: str) -> ToolResult:
        """What `code` would print; an error's line where it fails, with `ok` False."""
        begun = time.monotonic()
        ok, output = calculate(code)
        return ToolResult(clip_middle(output, self._max_output_chars), ok, time.monotonic() - begun)


def calculate(code: str) -> tuple[bool, str]:
    """(succeeded, printed lines) of an arithmetic program; after a failure the last line names it."""
    program = _Program()
    try:
        if len(code) > MAX_CODE_CHARS:
            raise CalculatorError(f"the program has {len(code)} characters, the calculator reads {MAX_CODE_CHARS}")
        for statement in ast.parse(code.strip()).body:
            program.execute(statement)
    except _EXPECTED as error:
        words = error.msg if isinstance(error, SyntaxError) else str(error)
        return False, "\n".join([*program.printed, f"{type(error).__name__}: {words}".rstrip(": ")])
    return True, "\n".join(program.printed)


_EXPECTED = (
    *(CalculatorError, SyntaxError, ArithmeticError, NameError, TypeError, ValueError),
    *(RecursionError, MemoryError),  # of the parser, for deep nesting
)


class _Program:
    """Variables and output so far."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.printed: list[str] = []

    def execute(self, node: ast.stmt) -> None:
        """One statement: print(...), an assignment, or an expression whose value is dropped."""
        match node:
            case ast.Expr(ast.Call(func=ast.Name("print"), args=args, keywords=[])):
                self.printed.append(" ".join(str(self._printable(arg)) for arg in args))
            case ast.Expr(value):
                self._value(value)
            case ast.Assign(targets=[ast.Name(name)], value=value):
                self.names[name] = self._value(value)
            case ast.AugAssign(target=ast.Name(name) as target, op=op, value=value):
                self.names[name] = self._binary(op, self._name(target.id), self._value(value))
            case _:
                raise CalculatorError(f"{_describe(node)} is not supported; only arithmetic, assignments and print are")

    def _printable(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        return self._value(node)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(int() | float() as value) if not isinstance(value, bool):
                return _bounded(value)
            case ast.Name(name):
                return self._name(name)
            case ast.UnaryOp(op, operand) if type(op) in _UNARY:
                return _UNARY[type(op)](_number(self._value(operand)))
            case ast.BinOp(left, op, right):
                return self._binary(op, self._value(left), self._value(right))
            case ast.List(elements) | ast.Tuple(elements):
                kind = list if isinstance(node, ast.List) else tuple
                return kind(_number(self._value(element)) for element in elements)  # flat, so its text stays short
            case ast.Call(func=ast.Name(name), args=args, keywords=[]) if name in _FUNCTIONS:
                return self._call(name, [self._value(arg) for arg in args])
            case _:
                raise CalculatorError(f"{_describe(node)} is not supported; only arithmetic, assignments and print are")

    @staticmethod
    def _call(name: str, args: list[Any]) -> Any:
        if name == "round" and len(args) == 2 and abs(_number(args[1])) > MAX_DIGITS:
            raise CalculatorError(f"round to more than {MAX_DIGITS} digits is not supported")
        return _bounded(_FUNCTIONS[name](*args))

    def _name(self, name: str) -> Any:
        if name not in self.names:
            raise NameError(f"name {name!r} is not defined")
        return self.names[name]

    def _binary(self, op: ast.operator, left: Any, right: Any) -> Number:
        if type(op) not in _BINARY:
            raise CalculatorError(f"{_describe(op)} is not supported; only + - * / // % ** are")
        left, right = _number(left), _number(right)
        whole = isinstance(left, int) and isinstance(right, int)
        if isinstance(op, ast.Pow) and whole and right > 0 and abs(left) > 1 and left.bit_length() * right > 2 * MAX_BITS:
            raise CalculatorError(f"the result of ** has more than {MAX_BITS} bits")
        return _bounded(_BINARY[type(op)](left, right))


def _number(value: Any) -> Number:
    if not isinstance(value, int | float):
        raise CalculatorError(f"arithmetic with a {type(value).__name__} is not supported")
    return value


def _bounded(value: Any) -> Any:
    """`value`, unless it is complex or too large to go on with."""
    if isinstance(value, complex):
        raise CalculatorError("complex numbers are not supported")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise CalculatorError(f"a number has more than {MAX_BITS} bits")
    return value


def _describe(node: ast.AST) -> str:
    text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else type(node).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."
