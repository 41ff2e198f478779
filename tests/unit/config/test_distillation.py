"""Who teaches what, and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.config.distillation import DistillationConfig, ServedTeacher
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.planning.topology import ServerSet

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart_distill.yaml"
MIX = "data.mixture=[{name: code, path: c.parquet}, {name: math, path: m.parquet}]"


def teachers(*given: str) -> str:
    return f"algorithm.distillation.teachers=[{', '.join(given)}]"


def copied(name: str, **more: Any) -> str:
    words = [f"name: {name}", "type: copied", "path: t", *(f"{key}: {value}" for key, value in more.items())]
    return "{" + ", ".join(words) + "}"


def served(name: str, **more: Any) -> str:
    return copied(name, **{"urls": "['http://h:1']", **more}).replace("type: copied", "type: served")


def test_each_source_has_its_teacher() -> None:
    overrides = [MIX, teachers(copied("a", sources="[code]"), served("b"))]
    distillation = load_config(CONFIG, overrides).algorithm.distillation
    assert distillation is not None
    assert [distillation.teacher_of(source) for source in ("", "code", "math")] == [1, 0, 1]
    assert (list(distillation.copied), list(distillation.asked), list(distillation.started)) == ([0], [1], [])


def test_what_nobody_teaches_may_learn_from_rewards_alone() -> None:
    overrides = [MIX, teachers(copied("a", sources="[train, code]")), "algorithm.distillation.objective_coeff=0.5"]
    distillation = load_config(CONFIG, overrides).algorithm.distillation
    assert distillation is not None
    assert [distillation.teacher_of(source) for source in ("", "code", "math")] == [0, 0, None]


def test_an_address_ends_without_a_slash() -> None:
    distillation = load_config(CONFIG, [teachers(served("b", urls="['https://h:1/x/']"))]).algorithm.distillation
    assert distillation is not None
    (teacher,) = distillation.teachers
    assert isinstance(teacher, ServedTeacher)
    assert teacher.urls == ("https://h:1/x",)


def test_servers_that_the_run_starts_have_places_and_settings_of_their_own() -> None:
    started = copied("a", engine="{servers: 2, tp: 4, nodes: 2, extra_args: [--context-length, '4096']}").replace(
        "copied", "started"
    )
    config = load_config(CONFIG, [teachers(started), "rollout.engine.tp=1"])
    assert config.algorithm.distillation is not None
    (teacher,) = config.algorithm.distillation.started.values()
    engine = teacher.engine.as_engine()
    assert (engine.servers, engine.tp, engine.extra_args) == (2, 4, ("--context-length", "4096"))
    assert topology_of(config).teachers == (ServerSet(2, 4, 2),)
    assert topology_of(config, trainer=False).teachers == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([teachers()], "at least 1 item"),
        ([teachers(copied("a"), copied("a"))], "each teacher needs a name of its own; found: ['a', 'a']"),
        ([teachers(copied("a"), copied("b"))], "teachers ['a', 'b'] name no sources"),
        ([teachers(copied("a", sources="[]"))], "sources=[], and so nobody to teach"),
        ([teachers(copied("a", sources="[train]"), copied("b", sources="[train]"))], "'train' has two teachers: 'a' and 'b'"),
        (
            [MIX, teachers(copied("a", sources="[cod]"))],
            "teaches 'cod', which is no source of prompts; there are train, code, math",
        ),
        ([MIX, teachers(copied("a", sources="[code]"))], "nobody teaches train, math, and with objective_coeff=0 rewards do not"),
        ([teachers(served("a", urls="[]"))], "one address at least"),
        ([teachers(served("a", urls="['http://h:1', 'http://h:1']"))], "each once"),
        ([teachers(served("a", urls="['http://key@h:1']"))], "without a key"),
        ([teachers(served("a", urls="['http://h:1/generate']"))], "without /generate"),
        ([teachers(served("a")), "rollout.temperature=0.7"], "teacher 'a' at temperature 1"),
        ([teachers(served("a")), "rollout.top_k=20"], "but rollout.top_k has other ones sampled"),
        ([teachers(copied("a", engine="{tp: 3, nodes: 2}").replace("copied", "started"))], "does not divide"),
        (["rollout.dynamic.max_refills=2"], "max_refills=2 replaces groups whose rewards are all equal"),
        (["algorithm.distillation.gamma=-1"], "found -1; must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(CONFIG, overrides)
    assert message in " ".join(str(refused.value).split())


def test_a_copied_teacher_follows_any_sampling() -> None:
    config = load_config(CONFIG, ["rollout.temperature=0.7", "rollout.top_k=20", "rollout.top_p=0.9"])
    assert isinstance(config.algorithm.distillation, DistillationConfig)
