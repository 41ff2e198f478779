"""The host's memory in a plan: an optimizer of a real size that is offloaded, weights that wait, and saves."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron import cli
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.plan import plan_job, plan_of
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.planning.memory import GIB
from ctpo_megatron.planning.plan import Hardware, Plan

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LARGE = ["qwen3-30b-a3b", "qwen3-235b-a22b"]


def planned(name: str, *overrides: str, host_gib: float | None = None) -> Plan:
    shape = parse_config(json.loads((CONFIGS / "models" / name / "config.json").read_text()))
    return plan_of(load_config(CONFIGS / f"{name}.yaml", list(overrides)), shape, Hardware(host_gib=host_gib))


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_offloaded_optimizer_moves_to_the_host(name: str, share: float) -> None:
    """Twelve bytes of a number leave the GPU, and nothing else changes there; with its gradient, twenty come to the host."""
    plain, offloaded = planned(name, "optimizer.cpu_offload=0"), planned(name, f"optimizer.cpu_offload={share}")
    for before, after in zip(plain.stages, offloaded.stages, strict=True):
        moved = before.memory.optimizer - after.memory.optimizer
        assert moved == before.memory.total - after.memory.total == pytest.approx(share * before.memory.optimizer, abs=1)
        assert before.host_optimizer == 0
        assert after.host_optimizer == pytest.approx(moved / 12 * 20, abs=2)
    assert offloaded.host.optimizer > plain.host.optimizer == 0
    assert offloaded.host.saving == plain.host.saving


@pytest.mark.parametrize("name", LARGE)
def test_a_host_that_is_too_small_is_refused_with_the_shortage(name: str) -> None:
    needed = 8 * planned(name, "optimizer.cpu_offload=1.0").host.total / GIB
    assert planned(name, "optimizer.cpu_offload=1.0").problems == [], "the host's memory is not known"
    assert planned(name, "optimizer.cpu_offload=1.0", host_gib=needed + 0.1).problems == []
    (problem,) = planned(name, "optimizer.cpu_offload=1.0", host_gib=needed - 10.0).problems
    assert f"the 8 ranks of a node need {needed:.1f} GiB of their host's memory, 10.0 GiB more than --host-gb" in problem
    assert "GiB: " in problem
    assert "the offloaded optimizer" in problem
    assert "optimizer.cpu_offload below 1" in problem
    assert planned(name, "optimizer.cpu_offload=0.5", host_gib=needed - 10.0).problems == [], "as it says"


def test_weights_that_wait_and_copies_of_the_state() -> None:
    name, plain = "qwen3-30b-a3b", planned("qwen3-30b-a3b")
    (stage,) = plain.stages
    assert plain.host.total == stage.saving.gathering
    guided = planned(name, "algorithm.reference={coeff: 0.01}")
    teachers = "algorithm.distillation={teachers: [{name: a, type: copied, path: m, sources: [train]}]}"
    assert [planned(name, each).host.copies for each in ("name=x", teachers)] == [0, 2 * stage.memory.weights]
    assert planned(name, "algorithm.reference={coeff: 0.01}", teachers).host.copies == 2 * guided.host.copies > 0
    adapted = ["model.adapter={rank: 8}", "algorithm.reference={coeff: 0.01}"]
    assert planned(name, *adapted).host.copies == 0, "it is the model without its adapters"
    kept = planned(name, "checkpoint.memory.every=1").host
    assert kept.kept == 2 * stage.saving.writing
    (problem,) = planned(name, "checkpoint.memory.every=1", host_gib=8 * plain.host.total / GIB).problems
    assert problem.endswith(" a model in more parts (parallel.pp, ep), checkpoint.memory.every=0.")


def test_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table comes with what it is for; the smaller layouts are compared too."""
    where = CONFIGS / "qwen3-30b-a3b.yaml"

    def lines(*overrides: str, host_gib: float | None = None) -> list[str]:
        console = Console(file=io.StringIO(), width=120)
        plan_job(load_config(where, list(overrides)), where, None, Hardware(host_gib=host_gib), console)
        return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]

    assert not [line for line in lines() if line.startswith("Host's memory")]
    told = lines("optimizer.cpu_offload=1.0")
    host = planned("qwen3-30b-a3b", "optimizer.cpu_offload=1.0").host
    assert "Host's memory per rank 8 ranks on a node" in told
    assert f"offloaded optimizer {host.optimizer / GIB:.1f} GiB {8 * host.optimizer / GIB:.1f} GiB" in told
    assert f"together {host.total / GIB:.1f} GiB {8 * host.total / GIB:.1f} GiB" in told
    assert "the host has not known: --host-gb" in told
    assert "the host has 2048.0 GiB" in lines(host_gib=2048.0), "saves alone are compared too, where it is asked for"
    with pytest.raises(ConfigError, match=r"elastic.layouts\[0\]: the ranks of a node need .* of their host's memory"):
        lines("optimizer.cpu_offload=1.0", "elastic.layouts=[{dp: 2}]", host_gib=8 * host.total / GIB + 1.0)
    words = ["ctpo", "plan", str(where), "optimizer.cpu_offload=1.0", "--host-gb", "512"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "more than --host-gb 512" in capsys.readouterr().err
