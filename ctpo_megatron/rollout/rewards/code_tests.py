"""Tests of code as known answers: how they are written, the programs that run them, and whether they have passed.

    {"inputs": ["1 2\\n", ...], "outputs": ["3\\n", ...]}          what a program prints for what it reads
    {"assertions": ["assert add(1, 2) == 3", ...]}               what its functions return

What is expected stays here, out of the sandbox, wherever it is a literal: code that looks around in its process cannot find it.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.errors import DataError

_BLOCK = re.compile(
    r"^[ \t]*```(?:python|py|python3)?[ \t]*\r?\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
_FORMS = '{"inputs": [...], "outputs": [...]} or {"assertions": ["assert f(1) == 2", ...]}'
_PRINTING = """
import sys, io
sys.stdin = io.TextIOWrapper(io.BytesIO({stdin!r}), encoding="utf-8")
del sys, io
exec(compile({code!r}, "<answer>", "exec"))
"""
_RETURNING = """
import sys
__name__ = "answer"  # what stands behind `if __name__ == "__main__"` is not what is tested
sys.modules[__name__] = sys.modules["__main__"]
del sys
exec(compile({code!r}, "<answer>", "exec"))
def _plain(x):
    if x is None or type(x) in (bool, int, float, str):
        return x
    for name, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if type(x) is kind:
            return {{name: [_plain(each) for each in x]}}
    if isinstance(x, dict):
        return {{"dict": [[_plain(key), _plain(value)] for key, value in x.items()]}}
    return {{"other": str(type(x))}}
def _tell():
    import json
    value = _plain({expression})
    print("\\n" + {mark!r} + json.dumps(value), flush=True)
_tell()
"""
_KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}


@dataclass(frozen=True, slots=True)
class Printing:
    """A program that reads `stdin` is to print `stdout`, but for white space."""

    stdin: str
    stdout: str

    def program(self, code: str, mark: str) -> str:
        """Returns what is run: `code` as the main program."""
        return _PRINTING.format(stdin=self.stdin.encode("utf-8", "replace"), code=code)

    def passed(self, output: str, mark: str) -> bool:
        """Whether `output` is what was to be printed."""
        return output.split() == self.stdout.split()


@dataclass(frozen=True, slots=True)
class Returning:
    """An expression is to be equal to a value."""

    expression: str
    value: Any

    def program(self, code: str, mark: str) -> str:
        """Returns what is run: `code`, then the expression, whose value is printed behind `mark`."""
        return _RETURNING.format(code=code, expression=self.expression, mark=mark)

    def passed(self, output: str, mark: str) -> bool:
        """Whether the value that was printed is the right one."""
        _, found, said = output.rpartition(mark)
        try:
            return bool(found) and bool(_value(json.loads(said)) == self.value)
        except (ValueError, TypeError, KeyError, RecursionError):  # it was cut, or the code printed the mark itself
            return False


Test = Printing | Returning


def last_code(text: str) -> str | None:
    """Returns the last closed block of Python of a text, None where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def read_tests(answer: str, where: str) -> list[Test]:
    """Returns the tests that a known answer holds. Raises DataError, which names `where`."""
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: the known answer is no JSON ({error}); needed for rollout.reward.type=code: {_FORMS}"
        ) from error
    match given:
        case {"inputs": list(inputs), "outputs": list(outputs), **rest} if not rest and inputs and len(inputs) == len(outputs):
            if all(isinstance(each, str) for each in (*inputs, *outputs)):
                return [Printing(*pair) for pair in zip(inputs, outputs, strict=True)]
        case {"assertions": list(assertions), **rest} if not rest and assertions:
            return [_returning(each, where) for each in assertions]
    raise DataError(
        f"{where}: the known answer is {answer[:200]!r}; needed for rollout.reward.type=code: {_FORMS}, all of it text"
    )


def _returning(assertion: Any, where: str) -> Returning:
    try:
        parsed = ast.parse(assertion.strip()).body if isinstance(assertion, str) else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        parsed = []
    if len(parsed) != 1 or not isinstance(parsed[0], ast.Assert):
        raise DataError(f"{where}: {assertion!r} is no test; needed: one `assert ...` of Python")
    test = parsed[0].test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        for asked, expected in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
            try:
                return Returning(ast.unparse(asked), ast.literal_eval(expected))
            except (ValueError, TypeError):
                continue
    return Returning(f"bool({ast.unparse(test)})", True)


def _value(plain: Any) -> Any:
    """Returns the value that `_plain` of the program stands for. Raises KeyError for one that has no literal."""
    if not isinstance(plain, dict):
        return plain
    ((kind, parts),) = plain.items()
    if kind == "dict":
        return {_value(key): _value(value) for key, value in parts}
    return _KINDS[kind](_value(each) for each in parts)
