"""Imports of thousands of modules, as quick as they can be."""

from __future__ import annotations

import contextlib
import csv
import gc
import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import Distribution

TELLS_OTHERWISE = sys.version_info >= (3, 12)  # that Python infers names in another way


@contextlib.contextmanager
def modules_stay() -> Iterator[None]:
    """Context for imports without Python's search for garbage, which would walk through all modules again and again.

    Nor does it look at them later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def packages_told_quickly() -> Iterator[None]:
    """Context in which to import transformers, which asks at once which distribution each installed package is of.

    Python 3.11 answers after 0.4 s of a processor: it reads all of each distribution's description once for each package.
    tests/unit/test_imports.py tells when transformers 5.19's successors no longer ask.
    """
    if TELLS_OTHERWISE:
        yield
        return
    before = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = packages_distributions
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = before


def packages_distributions() -> dict[str, list[str]]:
    """What `importlib.metadata.packages_distributions` of Python 3.11 returns: the distributions of each package, by its name."""
    found: dict[str, list[str]] = defaultdict(list)
    for distribution in importlib.metadata.distributions():
        declared = (distribution.read_text("top_level.txt") or "").split()
        packages = declared or _inferred(distribution)
        if packages:
            name = _name(distribution)
            for package in packages:
                found[package].append(name)
    return dict(found)


def _inferred(distribution: Distribution) -> set[str]:
    """The packages and modules that a distribution has files of."""
    record = distribution.read_text("RECORD")
    files = [row[0] for row in csv.reader(record.splitlines())] if record else [str(file) for file in distribution.files or ()]
    first = [file.partition("/") for file in files if file.endswith(".py")]
    return {name if below else name.removesuffix(".py") for name, _, below in first}


def _name(distribution: Distribution) -> str:
    head = (distribution.read_text("METADATA") or "").partition("\n\n")[0]
    names = [line.removeprefix("Name: ") for line in head.splitlines() if line.startswith("Name: ")]
    return names[0] if names else distribution.metadata["Name"]
