"""The tool that runs all examples: which it runs, what it reads of a run, and how its judge judges."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

import pytest
from examples_judge import is_faulty, verdict
from run_examples import EXAMPLES, FAULTS, HEADS, Came, collect, markdown

from ctpo_megatron.config.load import load_config
from ctpo_megatron.rollout.rewards.judge_model import PROMPT
from ctpo_megatron.rollout.rewards.verdict import last_number
from tests.support import examples

ELSEWHERE = {"verifiers.yaml", "guess_sft.yaml", "sums_sft.yaml"}  # needs a taskset; cold starts


def test_every_example_is_run() -> None:
    ran = {Path(case.config).name for case in EXAMPLES.values()}
    assert {path.name for path in examples.EXAMPLES.glob("*.yaml")} - ELSEWHERE == ran - {"quickstart_agent.yaml"}


@pytest.mark.parametrize("name", [*EXAMPLES, *FAULTS])
def test_a_run_is_a_configuration(name: str) -> None:
    case = (EXAMPLES | FAULTS)[name]
    load_config(examples.EXAMPLES / case.config, case.changed(Path("runs")))


def test_the_judge_compares_the_last_box() -> None:
    def worth(answer: str, response: str) -> float:
        return last_number(verdict(Template(PROMPT).substitute(question="1 + 1?", answer=answer, response=response)))

    assert worth("2", "\\boxed{3} or \\boxed{2}") == 1
    assert worth("2", "\\boxed{2} or \\boxed{3}") == 0
    assert worth("2", "2") == 0
    struck = [is_faulty(str(number), 0.25) for number in range(1000)]
    assert 200 < sum(struck) < 300
    assert struck == [is_faulty(str(number), 0.25) for number in range(1000)]


def test_what_is_read_of_a_run(tmp_path: Path) -> None:
    def came(wanted: int, code: int) -> Came:
        return collect(Came("judge down", "ctpo train examples/judge.yaml", wanted, code), tmp_path)

    assert not came(0, 0).as_expected, "it made no step"
    rows = [{"step": 0, "eval/accuracy": 1.0}]
    rows += [{"step": step, "reward/mean": step / 4, "reward/undecided": 2.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ledger.jsonl").write_text('{"end": "failed"}\n{"end": "trained"}\n')
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "error.log").write_text("Traceback\nRolloutError: too many failed\n--- 2026-01-01 00:00:00 +0000\n")
    found = came(0, 0)
    assert (found.steps, found.rewards, found.undecided, found.failed, found.said) == (2, [0.25, 0.5], 4, 1, "")
    assert found.as_expected
    assert came(1, 1).said == "RolloutError: too many failed"
    lines = markdown([came(0, 1)]).splitlines()
    assert [line.count("|") for line in lines[:3]] == [len(HEADS) + 1] * 3
    assert "| 1 (expected 0) |" in lines[2]
    assert lines[-1] == "- judge down: RolloutError: too many failed"
