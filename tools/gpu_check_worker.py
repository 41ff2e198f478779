"""One child process of tools/gpu_check.py: runs rows one after another and writes a line of JSON as each begins and ends.

    python tools/gpu_check_worker.py LINES PLACE ROW...      PLACE is {"device":, "folder":, "dry":} as JSON

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
from pathlib import Path
from typing import Any

from gpu_check_reached import ROOT, Reached
from gpu_check_rows import ROWS, Found, Place, Result, Row


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
    verdict = {True: "ok", False: "FAULT", None: "measured"}[found.holds]
    return Result(row.name, found.text, row.wanted, verdict, time.monotonic() - begun)  # type: ignore[arg-type]  # of the table


def main(lines: Path, place: Place, names: list[str]) -> None:
    """Run the rows called `names`."""
    rows = {row.name: row for row in ROWS}
    if place.dry:
        use_one_thread()
    with lines.open("a", encoding="utf-8") as out, Reached(ROOT) as reached:

        def tell(**line: Any) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        for name in names:
            tell(begun=name)
            result = run_row(rows[name], place)
            fields = {name: getattr(result, name) for name in ("name", "found", "wanted", "verdict", "seconds")}
            tell(result=fields, reached=sorted(reached.new()))
        tell(packages=sorted(top_packages()))


def use_one_thread() -> None:
    """A dry run shares its processors with others, and its tensors are small."""
    try:
        import torch
    except ImportError:  # each row says so
        return
    torch.set_num_threads(1)


def top_packages() -> set[str]:
    """What is imported, besides Python's own modules and this project."""
    tops = {name.partition(".")[0] for name in sys.modules if not name.startswith("_")}
    return {name for name in tops if name not in sys.stdlib_module_names and not name.startswith(("gpu_check", "ctpo_megatron"))}


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    code = 1
    try:
        main(Path(sys.argv[1]), Place(given["device"], Path(given["folder"]), given["dry"]), sys.argv[3:])
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
