"""Writes requirements.lock: what setup.py declares and all that those packages need, at the versions of this environment.

.venv/bin/python tools/lock.py            after a change to setup.py, or after upgrading packages in a working environment
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
ALSO = ("dev", "agents")  # extras that are locked; those of `gpu` are built for the machine they run on
HEAD = "# Every package of a working environment, at the versions the tests pass with. Written by tools/lock.py.\n"


def normalize(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(setup_py: Path) -> dict[str, list[Requirement]]:
    """The requirements that setup.py declares, by extra; under "" those of every installation."""
    (call,) = (
        node
        for node in ast.walk(ast.parse(setup_py.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    given = {word.arg: word.value for word in call.keywords}
    lines = {"": ast.literal_eval(given["install_requires"]), **ast.literal_eval(given["extras_require"])}
    return {extra: [Requirement(line) for line in each] for extra, each in lines.items()}


def needed(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Version by normalized name of every installed package that `requirements` lead to.

    Raises LookupError when one is not installed here.
    """
    installed = {normalize(each.metadata["Name"]): each for each in metadata.distributions()}
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()  # (name, extra)
    todo = list(requirements)
    while todo:
        requirement = todo.pop()
        name = normalize(requirement.name)
        if name not in installed:
            raise LookupError(f"{requirement} is declared but not installed here; install it, then write the lock")
        found[name] = installed[name].version
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            of_it = (Requirement(line) for line in installed[name].requires or [])
            todo += [each for each in of_it if each.marker is None or each.marker.evaluate({"extra": extra})]
    return found


def main() -> None:
    """Write the file."""
    requirements = declared(ROOT / "setup.py")
    try:
        found = needed([*requirements[""], *(each for extra in ALSO for each in requirements[extra])])
    except LookupError as error:
        sys.exit(f"error: {error}")
    LOCK.write_text(HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(found.items())))
    print(f"{LOCK.name}: {len(found)} packages")


if __name__ == "__main__":
    main()
