"""The ablation's own parts: what it starts, what it reads from a run, its statistics. No run is started."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from ctpo_megatron.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def ablate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "tools" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(run_dir: Path, rewards: list[float], accuracies: dict[int, float], error: str | None = None, **extra: Any) -> None:
    """A run's files, as `ctpo train` and the tool leave them."""
    run_dir.mkdir(parents=True)
    step = {
        "train/grad_norm": 1.0,
        "train/clip_fraction": 0.25,
        "train/ratio_min": 0.5,
        "train/ratio_max": 1.5,
        "train/kl_old": 0.1,
    }
    records = [{"step": s, "eval/accuracy": a} for s, a in accuracies.items()]
    records += [{"step": s, "reward/mean": reward, **step, **extra} for s, reward in enumerate(rewards, 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if error is None:
        (run_dir / "summary.json").write_text("{}")
    else:
        (run_dir / "error.txt").write_text(error + "\n")


def test_every_method_is_a_run_that_the_configuration_accepts(ablate: ModuleType, tmp_path: Path) -> None:
    found = {}
    for method in ablate.METHODS:
        words = ablate.train_words(tmp_path, method, 2, ["train.steps=3"])
        assert words[:3] == ["-m", "ctpo_megatron.cli", "train"]
        config = load_config(words[3], words[4:])
        found[method] = config.algorithm.objective
        others = config.model_copy(update={"run_dir": "", "algorithm": None})
        assert others == found.setdefault("/rest", others)  # nothing but the objective differs
        assert (config.run_dir, config.seed, config.train.steps) == (str(tmp_path / method), 2, 3)
    assert found["/rest"].train.optimizer_steps >= 16
    assert len({repr(objective) for objective in found.values()}) == len(found)
    assert found["ctpo-window"].clip_low == pytest.approx(math.log(2), abs=1e-3)
    assert found["ctpo-window"].clip_high == found["ctpo-window"].dual_clip == pytest.approx(math.log(5), abs=1e-3)
    assert [found[name].power for name in ("ctpo", "ctpo-window", "ctpo-power-0", "ctpo-power-1")] == [0.5, 0, 0, 1]


def test_no_override_changes_the_method(ablate: ModuleType, tmp_path: Path) -> None:
    words = ablate.train_words(tmp_path, "grpo", 1, ["algorithm.objective.type=gspo", "seed=9"])
    config = load_config(words[3], words[4:])
    assert (config.algorithm.objective.type, config.seed) == ("grpo", 1)


def test_a_run_is_read(ablate: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", [0.4, 0.6, 0.45, 0.5], {0: 0.35, 4: 0.7})
    run = ablate.read_run(tmp_path / "run", "ctpo", 1)
    assert (run["accuracy_before"], run["accuracy_after"], run["error"]) == (0.35, 0.7, None)
    assert (run["falls"], run["changes"]) == (1, 3)
    assert run["reward_area"] == pytest.approx(0.4875)
    assert run["log_ratio_max"] == pytest.approx(math.log(2))
    assert (run["grad_norm_max"], run["clip_fraction"], run["kl_max"]) == (1.0, 0.25, 0.1)


def test_numbers_that_are_not_finite_are_read(ablate: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run", [0.4], {0: 0.3, 1: 0.3}, **{"train/grad_norm": "Infinity", "train/ratio_min": 0.0})
    run = ablate.read_run(tmp_path / "run", "grpo", 1)
    assert run["grad_norm_max"] == run["log_ratio_max"] == math.inf


def test_a_failed_run_counts_as_one(ablate: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "1", [0.4, 0.5], {0: 0.3, 2: 0.6})
    write_run(tmp_path / "2", [0.4], {0: 0.3}, error="error: NaN")
    write_run(tmp_path / "3", [], {}, error="error: before the first step")
    runs = [ablate.read_run(tmp_path / str(seed), "grpo", seed) for seed in (1, 2, 3)]
    assert [run["error"] for run in runs] == [None, "error: NaN", "error: before the first step"]
    assert [run["accuracy_after"] for run in runs] == [0.6, None, None]
    total = ablate.over_seeds("grpo", runs)
    assert (total["errors"], total["runs"], total["accuracy_after"]["n"], total["changes"]) == (2, 3, 1, 1)


def test_differences_are_within_a_seed(ablate: ModuleType) -> None:
    def run(method: str, seed: int, accuracy: float | None) -> dict[str, Any]:
        return {"method": method, "seed": seed, "accuracy_after": accuracy, "falls": 1, "changes": 5, "error": None}

    runs = [run("ctpo", 1, 0.2), run("ctpo", 2, 0.8), run("grpo", 1, 0.3), run("grpo", 2, 0.9), run("grpo", 3, 0.9)]
    found = ablate.over_seeds("grpo", runs)
    difference = found["accuracy_after_difference"]
    assert (difference["n"], found["accuracy_after"]["n"], found["falls"], found["changes"]) == (2, 3, 3, 15)
    assert difference["mean"] == pytest.approx(0.1)
    assert difference["half_width"] == pytest.approx(0, abs=1e-12)
    assert "accuracy_after_difference" not in ablate.over_seeds("ctpo", runs)


def test_the_interval_is_students(ablate: ModuleType) -> None:
    """By a printed table of Student's quantiles of 0.975 for 1, 2, ... degrees of freedom."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    for freedom, quantile in enumerate(table, start=1):
        values = [0.1 * number**2 for number in range(freedom + 1)]
        found = ablate.spread(values)
        deviation = statistics.stdev(values) / math.sqrt(len(values))
        assert found["half_width"] == pytest.approx(quantile * deviation, rel=0.0005 / quantile)
    found = ablate.spread([0.2, 0.4, 0.9])
    assert (found["n"], found["mean"], found["min"], found["max"]) == (3, pytest.approx(0.5), 0.2, 0.9)


def test_one_value_has_no_interval(ablate: ModuleType) -> None:
    assert ablate.spread([0.5])["half_width"] is None
    assert ablate.spread([])["mean"] is None


def test_the_error_is_the_line_that_says_so(ablate: ModuleType) -> None:
    assert ablate.error_message("step 1\nerror: loss is NaN\nray: bye\n\n") == "error: loss is NaN"
    assert ablate.error_message("Traceback\nKeyError: 'x'\n") == "KeyError: 'x'"
    assert ablate.error_message("") == "no output"


class Starts(list):
    """Stands where a program would be started; every start ends with `code` and says `output`."""

    def __init__(self, code: int, output: str = "") -> None:
        super().__init__()
        self.code, self.output = code, output

    def __call__(self, words: list[str], output: Path) -> int:
        self.append(words)
        output.write_text(self.output)
        return self.code


def test_what_is_done_is_not_repeated(ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(0)
    monkeypatch.setattr(ablate, "python", starts)
    write_run(tmp_path / "ctpo", [0.4], {0: 0.3})
    write_run(tmp_path / "grpo", [0.4], {0: 0.3}, error="error: NaN")
    (tmp_path / "gspo").mkdir()
    (tmp_path / "gspo" / "metrics.jsonl").write_text("half a run")
    for method in ("ctpo", "grpo", "gspo"):
        ablate.train(tmp_path, method, 1, [])
    assert [words[-1] for words in starts] == ["algorithm.objective.type=gspo"]
    assert not (tmp_path / "gspo" / "metrics.jsonl").exists()


def test_a_run_that_fails_is_a_result(ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "python", Starts(1, "error: loss is NaN\n"))
    ablate.train(tmp_path, "grpo", 1, [])
    assert (tmp_path / "grpo" / "error.txt").read_text() == "error: loss is NaN\n"


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (130, 130), (-9, 1)])
def test_a_run_that_could_not_be_is_none(
    ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: int
) -> None:
    monkeypatch.setattr(ablate, "python", Starts(code, "error: no such key"))
    with pytest.raises(typer.Exit) as caught:
        ablate.train(tmp_path, "grpo", 1, [])
    assert caught.value.exit_code == expected
    assert not (tmp_path / "grpo" / "error.txt").exists()


def test_an_unknown_method_is_refused(ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        ablate.main(methods="ctpo,ppo", out=tmp_path / "out")
    assert caught.value.exit_code == 2
    assert "no method ppo" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_tables_and_plot_of_everything_that_can_happen(
    ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}" / "sft").mkdir(parents=True)
        (tmp_path / f"seed-{seed}" / "sft" / "summary.json").write_text("{}")
        for method in ablate.METHODS:
            error = "error: NaN" if (method, seed) == ("sequence", 2) or method == "minpro" else None
            write_run(tmp_path / f"seed-{seed}" / method, [0.4, 0.5], {0: 0.3, 2: 0.5 + seed / 10}, error=error)
    starts = Starts(0)
    monkeypatch.setattr(ablate, "python", starts)
    ablate.main(methods=",".join(ablate.METHODS), seeds=2, out=tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 18
    shown = capsys.readouterr().out
    assert "65.0 ± 63.5 (60.0 to 70.0)" in shown
    assert "+0.0 ± 0.0 (+0.0 to +0.0)" in shown
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line[:1] == "|"]
    assert {row[0]: row[1:] for row in rows}["minpro"] == ["2", "1", "0 of 2", "25.0", "0.69", "0.1"]  # of the second table
    assert (tmp_path / "results.md").read_text() in shown
    shutil.rmtree(tmp_path / "seed-2" / "gspo")
    ablate.main(methods="ctpo,gspo,cppo", seeds=3, out=tmp_path, report_only=True)
    assert starts == []
    assert [(run["method"], run["seed"]) for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == [
        ("ctpo", 1),
        ("gspo", 1),
        ("cppo", 1),
        ("ctpo", 2),
        ("cppo", 2),
    ]
    assert (tmp_path / "ablation.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
