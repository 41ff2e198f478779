"""Servers of teachers in a plan: the arithmetic of servers that sample, with the teacher's own shape and settings."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.plan import plan_job, plan_of
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.memory import GIB
from ctpo_megatron.planning.plan import Hardware, Plan
from ctpo_megatron.planning.servers import server_weights

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
WHERE = CONFIGS / "qwen3-4b.yaml"
MODELS = CONFIGS / "models"


def shape_of(name: str) -> ModelShape:
    return parse_config(json.loads((MODELS / name / "config.json").read_text()))


def overrides(path: Path, engine: str = "{}", concurrency: int = 32) -> list[str]:
    """Settings of a run with one teacher whose servers it starts, the second of two."""
    near = "{name: near, type: copied, path: m, sources: [train]}"
    far = f"{{name: far, type: started, path: {path}, engine: {engine}, concurrency: {concurrency}}}"
    return [f"algorithm.distillation.teachers=[{near}, {far}]"]


def planned(path: Path, engine: str = "{}", **options: int) -> Plan:
    return plan_of(load_config(WHERE, overrides(path, engine, **options)), shape_of("qwen3-4b"), Hardware())


def told(path: Path, engine: str = "{}") -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    plan_job(load_config(WHERE, overrides(path, engine)), WHERE, None, Hardware(), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    return [" ".join(line.split()) for line in lines]


def test_they_are_planned_as_servers_of_the_same_model_that_sample() -> None:
    """Which this run's are: of one and the same shape both have the same memory, but for who asks them."""
    plan = planned(MODELS / "qwen3-4b", concurrency=33)
    servers, sampling = plan.teachers["far"], plan.servers
    assert servers is not None
    same = ("weights", "budget", "bytes_per_token", "cache_tokens", "longest", "samples", "missing")
    assert [getattr(servers, name) for name in same] == [getattr(sampling, name) for name in same]
    assert (servers.asked, servers.communicators) == (33, 0), "nothing is published to them"
    two = planned(MODELS / "qwen3-4b", "{servers: 2, max_total_tokens: 50000}", concurrency=33).teachers["far"]
    assert two is not None
    assert (two.asked, two.cache_tokens) == (17, 50000)


def test_one_that_does_not_fit_is_refused_by_its_own_keys() -> None:
    (small,) = planned(MODELS / "qwen3-235b-a22b", "{tp: 4}").problems
    assert small.startswith("teacher 'far': a server's GPU needs 1")
    assert "a larger algorithm.distillation.teachers[1].engine.tp, GPUs with more memory (--engine-gpu-gb)" in small
    wide = planned(MODELS / "qwen3-235b-a22b", "{tp: 16}").problems
    assert [each.partition(":")[2].strip()[:47] for each in wide] == ["algorithm.distillation.teachers[1].engine.tp=16"]
    assert planned(MODELS / "qwen3-235b-a22b", "{tp: 8}").problems == []
    with pytest.raises(ConfigError, match="teacher 'far': a server's GPU needs"):
        told(MODELS / "qwen3-235b-a22b", "{tp: 4}")


def test_the_servers_of_a_teacher_have_a_table() -> None:
    lines = told(MODELS / "qwen3-235b-a22b", "{tp: 8}")
    weights = server_weights(shape_of("qwen3-235b-a22b"), 8, 2, quantised=False)
    at = lines.index("Teacher far")
    assert lines[at + 2].startswith(f"weights {weights / GIB:.1f} GiB per GPU")
    assert lines[at + 5].startswith("asked for 32 samples per server concurrency 32")


def test_weights_in_fp8_blocks_and_what_is_not_known(tmp_path: Path) -> None:
    """DeepSeek-V3 as it is published; a family that is served and not trained; a teacher that is elsewhere."""
    published = json.loads((MODELS / "deepseek-v3" / "config.json").read_text())
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(published | {"quantization_config": blocks}))
    shape = parse_config(published)
    servers = planned(tmp_path, "{tp: 16, nodes: 2}").teachers["far"]
    assert servers is not None
    assert servers.weights == server_weights(shape, 16, 2, quantised=True) < server_weights(shape, 16, 2, quantised=False)
    for content, reason in (
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        (published | {"quantization_config": {"quant_method": "awq"}}, "quantised (awq)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        plan = planned(tmp_path)
        assert (plan.teachers, plan.problems, plan.teacher_gpus) == ({"far": None}, [], 1)
        text = " ".join(told(tmp_path))
        assert "memory not planned" in text
        assert reason in text
    assert planned(tmp_path / "nowhere").teachers == {"far": None}
