"""Runs this package's CUDA paths on one GPU and holds what they find against what is wanted: a table, and a file of JSON.

    python tools/gpu_check.py                      every row, in at most 4 minutes; needs a GPU
    python tools/gpu_check.py --dry                every row on the CPU with tiny sizes; what needs a GPU says so
    python tools/gpu_check.py --list               what is checked, and what is wanted
    python tools/gpu_check.py --row NAME           these rows only; may be given again
    python tools/gpu_check.py --json found.json    the table and the lines about CUDA that ran, as a file too
    python tools/gpu_check.py --logs FOLDER        what the processes said, by default left in a temporary folder
    python tools/gpu_check.py --carry FOLDER       copy what a machine with torch alone lacks into FOLDER, with its size

Ends with exit code 1 where a row is a fault. Needs nothing but Python itself: a row whose packages are missing says which.
docs/gpu.md says how to run it on a machine without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from gpu_check_carry import MAX_MIB, carry
from gpu_check_children import Report, run_rows
from gpu_check_reached import Site, cuda_sites
from gpu_check_rows import BUDGET_S, ROWS, Place, Result, Row

TOOLS = Path(__file__).resolve().parent
LINES_ROW = "lines about CUDA"
WIDTHS = (33, 66, 34, 9)
HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    asked = _parse(arguments)
    if asked.list:
        for row in ROWS:
            print(f"{row.name:32} {row.wanted or 'measured'}{'; needs a GPU' if row.needs_gpu else ''}")
        return 0
    if asked.carry:
        return _carry(asked.carry, asked.python)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])  # for the children
    if not asked.dry and subprocess.run([sys.executable, "-c", HAS_GPU], capture_output=True).returncode:
        print("no torch that sees a GPU here; --dry runs the rows on the CPU with tiny sizes", file=sys.stderr)
        return 2
    rows = [row for row in ROWS if not asked.row or row.name in asked.row]
    return _check(rows, asked)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--list", action="store_true", help="only show the rows")
    parser.add_argument("--row", action="append", default=[], choices=[row.name for row in ROWS], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--logs", type=Path, metavar="FOLDER")
    parser.add_argument("--carry", type=Path, metavar="FOLDER")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="of that machine: 3.12")
    return parser.parse_args(arguments)


def _check(rows: list[Row], asked: argparse.Namespace) -> int:
    begun = time.monotonic()
    report = Report()
    _print_line("row", "found", "wanted", "")
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        place = Place("cpu" if asked.dry else "cuda", Path(folder), asked.dry)
        for _, together in groupby(rows, key=lambda row: row.process):
            run_rows(list(together), place, report, deadline=begun + BUDGET_S, show=_show)
        logs = asked.logs or Path(tempfile.mkdtemp(prefix="gpu_check_logs_"))
        logs.mkdir(parents=True, exist_ok=True)
        for log in place.folder.glob("*.log"):
            shutil.copy(log, logs)
    sites = cuda_sites()
    lines = lines_result(sites, report.reached, whole=not asked.row)
    report.results.append(lines)
    _show(lines)
    seconds, verdicts = time.monotonic() - begun, Counter(each.verdict for each in report.results)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    print(f"\n{len(report.results)} rows: {counted}; {seconds:.0f} s; what the processes said: {logs}")
    if asked.json:
        asked.json.write_text(json.dumps(_as_json(report, sites, seconds, asked.dry), indent=1) + "\n")
    return 1 if verdicts["FAULT"] else 0


def lines_result(sites: list[Site], reached: set[tuple[str, int]], *, whole: bool) -> Result:
    """The row about lines: which of those that need no more than the check has did not run."""
    within = [site for site in sites if not site.needs]
    ran = sum((site.file, site.line) in reached for site in within)
    needs = sorted({site.needs for site in sites if site.needs})
    found = f"{ran} of {len(within)} ran; {len(sites) - len(within)} more need {', '.join(needs)}"
    return Result(LINES_ROW, found if whole else f"{found} (not all rows were asked for)", "", "measured")


def _as_json(report: Report, sites: list[Site], seconds: float, dry: bool) -> dict[str, object]:
    ran = [site for site in sites if (site.file, site.line) in report.reached]
    left = [site for site in sites if site not in ran]
    return {
        "dry": dry,
        "seconds": seconds,
        "rows": [asdict(result) for result in report.results],
        "lines that ran": [str(site) for site in ran],
        "lines that did not run": [{"line": str(site), "needs": site.needs} for site in left],
        "modules": sorted(report.modules),
    }


def _show(result: Result) -> None:
    _print_line(result.name, result.found, result.wanted, result.verdict)


def _print_line(*cells: str) -> None:
    wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, WIDTHS, strict=True)]
    for number in range(max(map(len, wrapped))):
        parts = [(cell[number] if number < len(cell) else "").ljust(width) for cell, width in zip(wrapped, WIDTHS, strict=True)]
        print("  ".join(parts).rstrip(), flush=True)


def _carry(folder: Path, python: str) -> int:
    sizes = carry(folder, python)
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:8.2f} MiB in {folder}, at most {MAX_MIB}; put it into PYTHONPATH there")
    return 0 if total <= MAX_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
