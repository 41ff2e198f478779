"""What `ctpo plan` says of the layouts that a trainer may go on as, and what it and `ctpo train` refuse."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.layouts import check_layouts
from ctpo_megatron.jobs.plan import plan_job
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.rules import SHARED_FROM, check_shared_prompts, shared_prompts
from ctpo_megatron.planning.plan import Hardware

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
WHERE = CONFIGS / "qwen3-4b.yaml"


def planned(*overrides: str, gpu_gib: float = 80.0) -> list[str]:
    """The lines of a plan, with single spaces."""
    console = Console(file=io.StringIO(), width=120)
    plan_job(load_config(WHERE, list(overrides)), WHERE, None, Hardware(gpu_gib), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    return [" ".join(line.split()) for line in lines]


def test_a_plan_shows_each_smaller_layout() -> None:
    """The optimizer of fewer replicas is cut into fewer parts, so each rank has more of it."""
    lines = planned("parallel.dp=4", "elastic.layouts=[{dp: 2}, {dp: 1}]")
    first = lines.index("Smaller layouts ranks nodes in all fullest rank, GiB free samples per replica")
    rows = [line.rsplit(" ", 5) for line in lines[first + 2 : first + 4]]
    assert [(row[0], row[1], row[2], row[5]) for row in rows] == [
        ("tp 2 x cp 2 x dp 2 x pp 1", "8", "2", "128"),
        ("tp 2 x cp 2 x dp 1 x pp 1", "4", "1", "256"),
    ]
    assert float(rows[0][3]) < float(rows[1][3])
    assert [float(row[3]) + float(row[4]) for row in rows] == pytest.approx([80.0, 80.0], abs=0.11)


def test_a_layout_that_does_not_fit_is_refused_by_its_name() -> None:
    """The preferred one fits on these GPUs."""
    planned("parallel.dp=4", gpu_gib=30.0)
    with pytest.raises(ConfigError, match=r"- elastic.layouts\[1\]: a rank needs 3\d.\d GiB, \d.\d GiB more than --gpu-gb 30"):
        planned("parallel.dp=4", "elastic.layouts=[{dp: 2}, {dp: 1}]", gpu_gib=30.0)


def test_a_layout_that_does_not_divide_the_model_is_refused_by_its_name() -> None:
    published = CONFIGS / "models" / WHERE.stem / "config.json"
    shape = parse_config(read_json(published), str(published))
    run = load_config(WHERE, ["parallel.dp=4", "elastic.layouts=[{dp: 2}, {tp: 3, dp: 1}]"])
    with pytest.raises(ConfigError, match=r"^elastic.layouts\[1\].tp = 3 does not divide the model's 32 attention heads"):
        check_layouts(shape, run)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3-30b-a3b", "train.share_prompts: qwen3_moe is a mixture of experts"),
        ("deepseek-v3", "train.share_prompts: deepseek_v3 is a mixture of experts"),
    ],
)
def test_a_model_that_cannot_share_prompts_is_refused(name: str, reason: str) -> None:
    published = CONFIGS / "models" / name / "config.json"
    shape = parse_config(read_json(published), str(published))
    run = load_config(WHERE, ["train.share_prompts=64", "cluster.device=cpu"])
    with pytest.raises(ConfigError, match=reason):
        check_layouts(shape, run)


def test_latent_attention_cannot_share_prompts() -> None:
    published = CONFIGS / "models" / "deepseek-v3" / "config.json"
    with pytest.raises(ConfigError, match="deepseek_v3 has latent attention"):
        check_shared_prompts(replace(parse_config(read_json(published), str(published)), experts=None))


def test_prompts_are_shared_on_cpus_only() -> None:
    with pytest.raises(ConfigError, match=r"train\.share_prompts=64 needs cluster.device=cpu, and it is cuda"):
        load_config(WHERE, ["train.share_prompts=64", "cluster.device=cuda"])
    late = load_config(WHERE, ["train.share_prompts=64", "cluster.device=auto"])
    with pytest.raises(ConfigError, match=r"train\.share_prompts=64 needs cluster.device=cpu, and it is cuda"):
        late.check_device("cuda")
    late.check_device("cpu")
    load_config(WHERE, ["train.share_prompts=auto", "cluster.device=cuda"]).check_device("cuda")


def test_prompts_are_shared_by_default_where_they_can_be() -> None:
    shapes = {}
    for name in ("qwen3-4b", "qwen3-30b-a3b", "deepseek-v3"):
        published = CONFIGS / "models" / name / "config.json"
        shapes[name] = parse_config(read_json(published), str(published))
    shapes["latent"] = replace(shapes["deepseek-v3"], experts=None)
    assert load_config(WHERE, []).train.share_prompts == "auto"
    found = {name: shared_prompts("auto", shape, "cpu") for name, shape in shapes.items()}
    assert found == {"qwen3-4b": SHARED_FROM, "qwen3-30b-a3b": None, "deepseek-v3": None, "latent": None}
    dense = shapes["qwen3-4b"]
    assert shared_prompts("auto", dense, "cuda") is None
    assert [shared_prompts(wanted, dense, "cpu") for wanted in (64, None)] == [64, None]
