"""What the docstrings under the fields of a section say, read when somebody asks: the reference, and errors.

pydantic would read the source of every section each time that they are imported (`use_attribute_docstrings`), which is half of
what that takes, in every process of a run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from itertools import pairwise

from pydantic import BaseModel


@functools.cache
def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """The docstring under each field of a section that has one, inherited ones too."""
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            found |= _own(each)
    return {name: found[name] for name in section.model_fields if name in found}


def _own(section: type[BaseModel]) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(tree, ast.ClassDef), "the source of a class"
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
