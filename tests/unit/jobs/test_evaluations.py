"""What an evaluation's attempts depend on, which results count, and what is refused before anything starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.evaluation import BenchmarkSettings, benchmarks_of
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.evaluate import weights_identity
from ctpo_megatron.jobs.evaluations import known_accuracies, recipes
from ctpo_megatron.loop.evaluation.evaluate import Benchmark
from ctpo_megatron.loop.evaluation.files import ResultFiles, read_estimates
from ctpo_megatron.loop.evaluation.results import BenchmarkResult, Problem
from ctpo_megatron.loop.evaluation.votes import Votes
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Status, Trajectory, TrajectoryGroup
from tests.support.runs import ROOT

PROMPTS = [Prompt(n, ({"role": "user", "content": str(n)},), str(n)) for n in range(3)]
AIME = BenchmarkSettings("aime", "aime.parquet", 2, None, 2, 0.7, 5, 80)


def config(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml", list(overrides))


def test_a_benchmark_says_what_differs_from_the_rest() -> None:
    words = ("eval.samples=4", "eval.temperature=0.5", "eval.benchmarks.aime.file=aime.parquet", "eval.benchmarks.aime.every=3")
    found = config(
        *words, "eval.benchmarks.aime.max_turns=2", "eval.benchmarks.aime.temperature=0", "eval.max_response_tokens=50"
    )
    held_out, aime = benchmarks_of(found.data, found.eval, found.rollout)
    assert held_out == BenchmarkSettings("held_out", found.data.eval, 0, 128, 4, 0.5, 3, 50)
    assert aime == BenchmarkSettings("aime", "aime.parquet", 3, 128, 4, 0.0, 2, 50)
    assert [step for step in range(9) if aime.due(step, 8)] == [0, 3, 6, 8]
    assert [step for step in range(9) if held_out.due(step, 8)] == [0, 8]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("eval.servers=1",), "eval.servers=1 leaves none of rollout.engine.servers=1 to train with"),
        (
            ("eval.servers=1", "rollout.engine.servers=2", "weights.type=colocated"),
            "set eval.servers=0, or weights.release=false",
        ),
        (("eval.benchmarks.held_out.file=x",), "'held_out' is what the file of data.eval is called"),
        (("eval.benchmarks.a.samples=2",), "eval.benchmarks.a.file: missing"),
        (("eval.benchmarks.a={file: x, sample: 2}",), "Did you mean 'samples'?"),
        (("eval.samples=2000",), "at most 1024"),
        (("eval.benchmarks={a/b: {file: x}}",), "a/b"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*words)
    assert told in str(caught.value)


def test_attempts_are_used_again_under_all_that_they_depend_on_and_no_more() -> None:
    def of(settings: BenchmarkSettings, prompts: list[Prompt] = PROMPTS, *words: str) -> dict[str, str]:
        return recipes(config(*words), [Benchmark(settings, prompts)])

    first = of(AIME)
    assert first.keys() == {"aime"}
    assert of(replace(AIME, name="held_out")) == {"": first["aime"]}
    assert of(replace(AIME, samples=8, prompts=2, every=0, file="moved.parquet"), PROMPTS, "rollout.concurrency=3") == first
    others = [of(replace(AIME, **change)) for change in ({"temperature": 0.8}, {"max_turns": 4}, {"max_response_tokens": 81})]
    others += [of(AIME, [*PROMPTS[:2], replace(PROMPTS[2], answer="7")]), of(AIME, PROMPTS, "rollout.tool=null")]
    assert len({each["aime"] for each in [first, *others]}) == 6


def test_other_weights_or_another_seed_are_told(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    found = {weights_identity(tmp_path, 1), weights_identity(tmp_path, 2)}
    os.utime(weights, ns=(0, 0))
    found.add(weights_identity(tmp_path, 1))
    assert weights_identity(tmp_path, 1) in found
    assert len(found) == 3


def result(settings: BenchmarkSettings, step: int, right: int) -> BenchmarkResult:
    made = [
        Trajectory(0, [1], [], Status.FINISHED, reward=float(n < right), given="1", id=AttemptId(GroupId(0), n)) for n in (0, 1)
    ]
    votes = Votes(tuple(0 if each.reward else 1 for each in made))
    return BenchmarkResult.of(settings, step, [Problem(TrajectoryGroup(PROMPTS[0], made, id=GroupId(0)), votes)], seed=1)


def test_results_on_disk_count_where_they_are_of_the_same_evaluation(tmp_path: Path) -> None:
    files, held_out = ResultFiles(tmp_path), replace(AIME, name="held_out", every=4)
    files.write(2, [result(AIME, 2, 1)])
    files.write(4, [result(AIME, 4, 2), result(held_out, 4, 1)])
    both = [Benchmark(AIME, PROMPTS), Benchmark(held_out, PROMPTS)]
    assert known_accuracies(tmp_path, [2, 4, 6], both, 8) == {2: 0.5, 4: 0.75}
    more = [Benchmark(replace(AIME, samples=4), PROMPTS)]
    assert known_accuracies(tmp_path, [2, 4], more, 8) == {}
    (tmp_path / "evals" / "step_00000004" / "held_out.json").write_text('{"half')
    assert known_accuracies(tmp_path, [2, 4], both, 8) == {2: 0.5}
    assert read_estimates(tmp_path)["aime"][4]["pass_at_2"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    ResultFiles(tmp_path, first_step=3)
    assert [path.name for path in (tmp_path / "evals").iterdir()] == ["step_00000002"]
