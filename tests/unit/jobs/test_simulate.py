"""`ctpo plan --simulate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.simulate import simulate_job
from ctpo_megatron.planning.plan import Hardware
from ctpo_megatron.simulation.options import read_options
from tests.support.runs import ROOT
from tests.unit.simulation.test_calibrate import a_run

WHERE = ROOT / "configs" / "qwen3-4b.yaml"
SMALL = ("train.prompts_per_step=8", "train.optimizer_steps=2", "rollout.group_size=2", "rollout.engine.servers=12")


def printed(*options: str, overrides: tuple[str, ...] = SMALL, where: Path = WHERE, model: Path | None = None) -> str:
    told = io.StringIO()
    console = Console(file=told, width=160)
    simulate_job(load_config(where, list(overrides)), where, model, Hardware(), read_options(list(options)), console)
    return told.getvalue()


def test_it_says_where_time_goes_and_which_split_makes_the_most_steps(tmp_path: Path) -> None:
    text = printed("steps=1", f"json_file={tmp_path / 'found.json'}", "mtbf_hours=0.5")
    for words in (
        "trainer waits for rollouts",
        "steps per hour",
        "servers decode",
        "CPU of the controller",
        "this configuration",
    ):
        assert words in text
    assert text.count("the most") == 1
    found = json.loads((tmp_path / "found.json").read_text())
    steady = found["steady"]
    assert sum(steady["phases"].values()) == pytest.approx(steady["step_s"], rel=0.01)
    assert sum(steady["servers"].values()) == pytest.approx(1.0)
    assert {each["trainer"] + each["servers"] for each in found["splits"]} == {16}
    assert [each["dp"] for each in found["splits"]] == [2, 3]


@pytest.mark.thorough
def test_more_servers_make_rollouts_shorter_and_a_faster_gpu_training(tmp_path: Path) -> None:
    def phases(*options: str, servers: int) -> dict[str, float]:
        overrides = (*SMALL, f"rollout.engine.servers={servers}", "rollout.group_size=16")
        printed("steps=1", "splits=false", f"json_file={tmp_path / 'found.json'}", *options, overrides=overrides)
        return dict(json.loads((tmp_path / "found.json").read_text())["steady"]["phases"])

    few, many, faster = phases(servers=1), phases(servers=8), phases("teraflops=1978", servers=8)
    assert many["rollout"] < 0.8 * few["rollout"]
    assert faster["train"] < 0.7 * many["train"]


def test_a_run_on_cpus_is_measured_and_not_computed(tmp_path: Path) -> None:
    where, model = ROOT / "configs" / "quickstart.yaml", tmp_path / "config.json"
    published = json.loads((ROOT / "configs" / "models" / "qwen3-4b" / "config.json").read_text())
    model.write_text(json.dumps(published))
    on_cpu = ("cluster.device=cpu", "train.prompts_per_step=8")
    with pytest.raises(ConfigError, match="Give --with run=RUN_DIR"):
        printed(overrides=on_cpu, where=where, model=model)
    text = printed(f"run={a_run(tmp_path / 'run')}", "steps=1", overrides=on_cpu, where=where, model=model)
    assert "measured in" in text
    assert "Trainer GPUs" not in text


@pytest.mark.thorough
def test_what_parts_cost_each_other_is_not_counted_twice(tmp_path: Path) -> None:
    """On a host that they share, the trainer keeps all cores busy unless told otherwise; an overlapped run tells no speeds."""
    where, model, run_dir = ROOT / "configs" / "quickstart.yaml", tmp_path / "config.json", a_run(tmp_path / "run")
    model.write_text((ROOT / "configs" / "models" / "qwen3-4b" / "config.json").read_text())
    ahead = ("cluster.device=cpu", "train.prompts_per_step=8", "train.staleness=1", "rollout.tool=null")

    def decoding_s(*options: str) -> float:
        file = tmp_path / "found.json"
        printed(f"run={run_dir}", "steps=2", f"json_file={file}", *options, overrides=ahead, where=where, model=model)
        steady = json.loads(file.read_text())["steady"]
        return float(steady["servers"]["decode"] * steady["step_s"])

    alone, one, both = decoding_s(), decoding_s("cores=2", "trainer_cores=1"), decoding_s("cores=2")
    assert alone == pytest.approx(one)
    assert both > 1.2 * one
    assert both == pytest.approx(decoding_s("cores=2", "trainer_cores=2"))
    config = run_dir / "config.yaml"
    config.write_text(yaml.safe_dump({"train": {"optimizer_steps": 1, "staleness": 1}}))
    decoding_s()
    with pytest.raises(ConfigError, match=r"cores=2: .* it would count twice\. Measure in a run of train.staleness=0"):
        decoding_s("cores=2")


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("speed=3", "speed"),
        ("steps=0", "steps"),
        ("failing=1", "failing"),
        ("steps", "steps"),
        ("json_file=/no/such/place/found.json", "json_file=/no/such/place/found.json: its directory does not exist"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_name(option: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        read_options([option])


def test_options_without_a_simulation_are_refused() -> None:
    with pytest.raises(ConfigError, match="give --simulate too"):
        read_options(["steps=2"], asked=False)
