"""One child process of tools/gpu_check.py: runs rows one after another and writes a line of JSON as each begins and ends.

    python tools/gpu_check_worker.py LINES PLACE ROWS      PLACE and ROWS as JSON: the fields of a Place and of some Rows

It ends by `os._exit`: a collective that waits for a rank that never comes would keep Python from ending.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_check_reached import ROOT, Reached
from gpu_check_rows import Found, Place, Result, Row, Verdict

VERDICTS: dict[bool | None, Verdict] = {True: "ok", False: "FAULT", None: "measured"}


def run_row(row: Row, place: Place) -> Result:
    """The row's result. What it raises is one: a package that is missing is no fault, everything else is."""
    if row.needs_gpu and place.device != "cuda":
        return Result(row.name, "needs a GPU", row.wanted, "not run")
    begun = time.monotonic()
    try:
        module, _, function = row.where.partition(":")
        call: Callable[..., Found] = getattr(importlib.import_module(module), function)
        found = call(place, **row.options)
    except ModuleNotFoundError as error:
        package = (error.name or "?").partition(".")[0]
        traceback.print_exc()
        if package in ("ctpo_megatron", *(path.stem for path in Path(__file__).parent.glob("gpu_check*.py"))):
            return Result(row.name, str(error), row.wanted, "FAULT")
        return Result(row.name, f"package {package} is missing", row.wanted, "not run")
    except Exception as error:  # noqa: BLE001 - whatever goes wrong on a device is what is looked for
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Result(row.name, said, row.wanted, "FAULT", time.monotonic() - begun)
    return Result(row.name, found.text, row.wanted, VERDICTS[found.holds], time.monotonic() - begun)


def main(lines: Path, place: Place, rows: list[Row]) -> None:
    """Run the rows, in order."""
    if place.dry:
        use_one_thread()
    with lines.open("a", encoding="utf-8") as out, Reached(ROOT) as reached:

        def tell(**line: Any) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        for row in rows:
            tell(begun=row.name)
            result = run_row(row, place)
            tell(result=asdict(result), reached=sorted(reached.new()))
        tell(modules=sorted(own_modules()))


def use_one_thread() -> None:
    """A dry run shares its processors with others, and its tensors are small."""
    try:
        import torch
    except ImportError:  # each row says so
        return
    torch.set_num_threads(1)


def own_modules() -> set[str]:
    """Files of this project that are imported, below its folder."""
    project = ROOT.parent
    files = {Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    return {file.relative_to(project).as_posix() for file in files if file.is_relative_to(project / ROOT.name)}


if __name__ == "__main__":
    place, rows = (json.loads(argument) for argument in sys.argv[2:])
    code = 1
    try:
        main(Path(sys.argv[1]), Place(**place | {"folder": Path(place["folder"])}), [Row(**row) for row in rows])
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
