"""Which settings differ from a checkpoint's, and what is said about each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from ctpo_megatron.config.explain import dotted_keys
from ctpo_megatron.config.load import dump_config, load_config
from ctpo_megatron.loop.differences import _WHY, Difference, dtype_that_differs, settings_that_differ, shapes_that_differ, shown
from ctpo_megatron.models.config import parse_config
from tests.support.qwen import QWEN3
from tests.support.runs import ROOT


def resolved(*overrides: str) -> dict[str, Any]:
    return yaml.safe_load(dump_config(load_config(ROOT / "configs" / "quickstart.yaml", list(overrides))))


def differences(*overrides: str) -> dict[str, Difference]:
    found = settings_that_differ(resolved(), resolved(*overrides))
    assert len({each.key for each in found}) == len(found)
    return {each.key: each for each in found}


def test_a_setting_that_the_checkpoints_release_did_not_know_has_its_default() -> None:
    """Also one of a section that is left out by default."""
    adapter = "model.adapter={rank: 4}"
    earlier = resolved(adapter)
    del earlier["model"]["adapter"]["use_dora"], earlier["train"]["fp8"]
    assert settings_that_differ(earlier, resolved(adapter)) == []
    (lost,) = settings_that_differ(earlier, resolved("model.adapter={rank: 4, use_dora: true}"))
    assert (lost.key, lost.effect) == ("model.adapter.use_dora", "refused")


def test_a_critic_stays_what_it_is() -> None:
    gae = "algorithm.advantage={type: gae}"
    (lost,) = settings_that_differ(resolved(gae), resolved())
    assert (lost.effect, lost.why) == ("refused", "the model in the checkpoint has a value head")
    changed = settings_that_differ(resolved(gae), resolved("algorithm.advantage={type: gae, lam: 0.9, critic: {lr: 1}}"))
    assert [(each.key, each.effect) for each in changed] == [
        ("algorithm.advantage.lam", "applies"),
        ("algorithm.advantage.critic.lr", "applies"),
    ]
    assert "the schedule is the present one" in changed[1].event.sentence


@pytest.mark.parametrize(
    ("override", "effect", "words"),
    [
        (
            "optimizer.lr=5e-5",
            "applies",
            "optimizer.lr: 0.00015 in the checkpoint, 5e-05 now: applies from now on: the schedule is",
        ),
        ("optimizer.beta2=0.95", "applies", "optimizer.beta2: 0.999 in the checkpoint, 0.95 now: applies from now on"),
        ("train.prompts_per_step=64", "applies", "none is repeated or left out"),
        ("rollout.group_size=16", "applies", "whatever the size of their groups"),
        ("seed=7", "applies", "come in another order, each once"),
        ("parallel.dp=2", "applies", "cut in another way"),
        ("rollout.tool=null", "applies", "rollout.tool: {type: python, timeout_s: 10"),
        ("algorithm.objective.type=grpo", "applies", "algorithm.objective: {type: ctpo, ratio: cumulative"),
        ("algorithm.reference.coeff=0.5", "applies", "algorithm.reference: null in the checkpoint, {coeff: 0.5"),
        ("rollout.engine.extra_args=[--x, b]", "applies", 'rollout.engine.extra_args: [] in the checkpoint, ["--x", "b"] now'),
        ("sft.steps=3", "none", "has no effect on a resume: it belongs to `ctpo sft`"),
        ("eval.prompts=5", "applies", "not of the same evaluation"),
        ("algorithm.advantage={type: gae}", "refused", "refused: the model in the checkpoint has no value head"),
        ("model.path=elsewhere", "applies", "model.path: runs/quickstart/sft/model in the checkpoint, elsewhere now"),
    ],
)
def test_a_setting_that_differs_is_told_with_what_it_means(override: str, effect: str, words: str) -> None:
    (found,) = differences(override).values()
    assert found.effect == effect
    assert words in found.event.sentence
    assert found.event.effect == effect


def test_settings_that_are_the_same_are_not_told() -> None:
    assert differences() == {}
    assert differences("eval.every=100").keys() == {"eval.every"}
    assert differences("data.train=other", "data.system_prompt=x", "model.dtype=float32") == {}  # they have their own words


def test_what_the_checkpoints_release_did_not_know_is_told_where_it_is_used() -> None:
    before = resolved()
    del before["data"]["allow_change"], before["attest"]
    assert settings_that_differ(before, resolved()) == []
    (found,) = settings_that_differ(before, resolved("data.allow_change=true"))
    assert "data.allow_change: absent in the checkpoint, true now" in found.event.sentence
    (gone,) = settings_that_differ(resolved() | {"old": 3}, resolved())
    assert "old: 3 in the checkpoint, absent now" in gone.event.sentence


def test_words_are_for_settings_that_exist() -> None:
    assert set(_WHY) <= set(dotted_keys())


MIXTURE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.01,
}


def test_another_architecture_is_refused_field_by_field() -> None:
    shape = parse_config(QWEN3)
    assert shapes_that_differ(shape, replace(shape, dtype="bfloat16", mtp_layers=1)) == []
    other = replace(shape, num_layers=7, rope=replace(shape.rope, theta=5.0), max_positions=9)
    found = {each.key: each.effect for each in shapes_that_differ(shape, other)}
    where = "config.json in model.path, "
    assert found == {f"{where}num_layers": "refused", f"{where}rope.theta": "refused", f"{where}max_positions": "applies"}
    mixture = parse_config(MIXTURE)
    experts = shapes_that_differ(shape, mixture)
    assert {each.key: each.effect for each in experts} == {f"{where}family": "refused", f"{where}experts": "refused"}
    balanced = parse_config(MIXTURE | {"router_aux_loss_coef": 0.5})
    (coefficient,) = shapes_that_differ(mixture, balanced)
    assert (coefficient.key, coefficient.effect) == (f"{where}experts.aux_loss_coeff", "applies")


@pytest.mark.parametrize(
    ("stored", "before", "overrides", "effect"),
    [
        ("float32", "auto", ["model.dtype=bfloat16"], "refused"),
        ("bfloat16", "bfloat16", ["cluster.device=cpu"], "refused"),  # auto is float32 there
        ("bfloat16", None, ["model.dtype=float32"], "refused"),
        ("float32", "auto", ["model.dtype=float32"], "none"),
        ("float32", "float32", ["cluster.device=cpu"], "none"),
        ("float32", "auto", ["cluster.device=cpu"], None),
        ("bfloat16", "auto", [], None),  # the device is not known yet: the ranks compare
    ],
)
def test_number_formats_are_compared_where_they_are_known(
    stored: str, before: str | None, overrides: list[str], effect: str | None
) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["model.dtype=auto", *overrides])
    assert [each.effect for each in dtype_that_differs(stored, before, config)] == ([effect] if effect else [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5e-5, "5e-05"),
        (0.123456789, "0.123456789"),
        (True, "true"),
        (None, "null"),
        ("a\nb", '"a\\nb"'),
        ("", '""'),
        ([1], "[1]"),
    ],
)
def test_values_are_shown_as_in_yaml(value: Any, text: str) -> None:
    assert shown(value) == text
