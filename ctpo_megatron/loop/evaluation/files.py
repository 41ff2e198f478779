"""Results of evaluations on disk: RUN_DIR/evals/step_STEP/BENCHMARK.json, everything about every attempt but its text."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ctpo_megatron.config.evaluation import BenchmarkSettings
from ctpo_megatron.errors import storing
from ctpo_megatron.loop.evaluation.results import ACCURACY, BenchmarkResult
from ctpo_megatron.record.files import Through, at_once, write_summary

DIRECTORY = "evals"
OF_STEP = "step_"


class ResultFiles:
    """The results of a run. Those of `first_step` or later, which an earlier attempt at these steps wrote, are deleted.

    `through`: how files are written, each as a whole.
    """

    def __init__(self, run_dir: Path, first_step: int = 0, through: Through = at_once) -> None:
        self._run_dir, self._through = run_dir, through
        for step, directory in _steps(run_dir):
            if step >= first_step:
                with storing(directory):
                    shutil.rmtree(directory)

    def write(self, step: int, results: Iterable[BenchmarkResult]) -> None:
        """Write the results of the policy after `step` training steps. Raises StorageError where the disk does not take them."""
        self._through(partial(write_results, _directory(self._run_dir, step), list(results)))


def write_results(directory: Path, results: Sequence[BenchmarkResult]) -> None:
    """Write each result to `directory`, which is made where it is missing; what its parent lies in is not."""
    with storing(directory):
        directory.parent.mkdir(exist_ok=True)
        directory.mkdir(exist_ok=True)
    for result in results:
        write_summary(directory, result.as_json(), f"{result.settings.name}.json")


def read_accuracies(run_dir: Path, step: int, wanted: Iterable[BenchmarkSettings]) -> list[float]:
    """Returns avg@n of the `wanted` benchmarks after `step` training steps, as far as there are results of just these."""
    found = dict(_results(_directory(run_dir, step)))
    same = [found[each.name] for each in wanted if each.name in found and found[each.name]["benchmark"] == asdict(each)]
    return [each["estimates"][ACCURACY]["value"] for each in same]


def read_estimates(run_dir: Path) -> dict[str, dict[int, Any]]:
    """Returns the estimates of all evaluations of a run, by benchmark and training steps before. Raises StorageError."""
    found: dict[str, dict[int, Any]] = {}
    with storing(run_dir / DIRECTORY):
        for step, directory in _steps(run_dir):
            for name, result in _results(directory):
                found.setdefault(name, {})[step] = result["estimates"]
    return found


def _directory(run_dir: Path, step: int) -> Path:
    return run_dir / DIRECTORY / f"{OF_STEP}{step:08d}"


def _results(directory: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(ValueError):  # it is not what was written here
            yield path.stem, json.loads(path.read_text(encoding="utf-8"))


def _steps(run_dir: Path) -> Iterable[tuple[int, Path]]:
    for path in sorted((run_dir / DIRECTORY).glob(f"{OF_STEP}*")):
        number = path.name.removeprefix(OF_STEP)
        if number.isdigit():
            yield int(number), path
