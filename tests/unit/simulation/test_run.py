"""The real loop on the virtual clock: closed forms, the same again by the seed, and nothing lost whatever fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.simulation.account import account, steps_to_simulate
from ctpo_megatron.simulation.clock import NothingLeft
from ctpo_megatron.simulation.run import Simulated, Troubles, simulate
from ctpo_megatron.simulation.server import SimulatedServer
from ctpo_megatron.simulation.speeds import ServerSpeed, Speeds, TrainerSpeed
from ctpo_megatron.simulation.workload import LogNormal, Said, Script, prompt_of
from ctpo_megatron.types import Prompt
from tests.support.often import often
from tests.support.runs import ROOT

PROMPT, ANSWER = 20, 101  # tokens of each prompt and each answer
SERVER = ServerSpeed(0.01, 1e-3, prefill_s=0.1)
SPEEDS = Speeds(SERVER, TrainerSpeed(token_s=0.0, step_s=2.0), publish_s=0.5, paused_s=0.0)


class Equal:
    """Attempts that are all alike. `calls`: of a tool, between turns of ANSWER tokens each."""

    def __init__(self, calls: int = 0) -> None:
        self._turns = (Said(ANSWER, 5),) * calls + (Said(ANSWER),)

    def prompts(self) -> list[Prompt]:
        return [prompt_of(number, PROMPT) for number in range(10)]

    def script(self, prompt: int, group: int, attempt: int) -> Script:
        return Script(self._turns, attempt % 2)


def config(*overrides: str) -> RunConfig:
    small = ("train.prompts_per_step=4", "train.optimizer_steps=2", "rollout.group_size=2", "rollout.max_response_tokens=4096")
    return load_config(ROOT / "configs" / "quickstart.yaml", [*small, *overrides])


def rollout_s(running: int) -> float:
    """How long `running` equal attempts take that begin at once on one server."""
    return 0.1 + (ANSWER - 1) * (0.01 + 1e-3 * running)


def steady_s(config: RunConfig, speeds: Speeds, workload: Any, steady: int = 3) -> float:
    steps, first, last = steps_to_simulate(config, steady)
    return account(simulate(config, speeds, workload, steps=steps), first, last).step_s


def test_synchronous_a_step_takes_the_sum_of_rollout_training_and_publication() -> None:
    made = simulate(config(), SPEEDS, Equal(), steps=3)
    for step in made.steps:
        assert step.seconds == pytest.approx(rollout_s(8) + 2.0 + 0.5, abs=1e-6)
        assert step.phases["rollout"] == pytest.approx(rollout_s(8), abs=1e-6)
        assert step.metrics["rollout/staleness_max"] == 0
    assert (made.trajectories, made.sampled, made.left, made.unbalanced) == (24, 24 * ANSWER, 0, [])


@pytest.mark.parametrize("train_s", [0.3, 1.2, 5.0])
def test_one_step_ahead_takes_the_longer_of_both_where_one_step_fits_on_the_server(train_s: float) -> None:
    """The server has room for the attempts of one step, so those of two steps follow each other."""
    speeds = replace(SPEEDS, trainer=TrainerSpeed(0.0, step_s=train_s), server=replace(SERVER, prefill_s=0.0))
    found = steady_s(config("train.staleness=1", "rollout.concurrency=8"), speeds, Equal())
    assert found == pytest.approx(max(rollout_s(8) - 0.1, train_s + 0.5), rel=0.01)


def test_each_publication_lets_the_servers_read_again_what_is_in_flight() -> None:
    speeds = replace(SPEEDS, trainer=TrainerSpeed(0.0, step_s=0.3))
    found = steady_s(config("train.staleness=1", "rollout.concurrency=8"), speeds, Equal())
    assert found == pytest.approx(rollout_s(8) + 0.1, rel=2e-3)


@pytest.mark.parametrize("train_s", [0.6, 0.9, 5.0])
def test_with_room_for_two_steps_each_rollout_has_two_steps_to_be_done_in(train_s: float) -> None:
    """Attempts that are as fast together as alone begin when a version is published and are due a step later."""
    speeds = replace(SPEEDS, trainer=TrainerSpeed(0.0, step_s=train_s - 0.5), server=ServerSpeed(0.01))
    took = (ANSWER - 1) * 0.01
    found = steady_s(config("train.staleness=1", "rollout.concurrency=64"), speeds, Equal(), steady=4)
    assert found == pytest.approx(max(train_s, (took + train_s) / 2), rel=0.01)


def test_turns_wait_for_their_tools() -> None:
    speeds = replace(SPEEDS, server=ServerSpeed(0.01), tool_s=0.7, tool_slots=4)
    made = simulate(config(), speeds, Equal(calls=1), steps=1)
    # 8 attempts, 4 calls at a time; the first four go on while the others wait for the tool
    assert made.steps[0].phases["rollout"] == pytest.approx(2 * 0.7 + 2 * (ANSWER - 1) * 0.01, abs=0.02)
    assert made.sampled == 2 * 8 * ANSWER


def test_more_cores_than_are_wanted_change_nothing_and_fewer_slow_everybody_down() -> None:
    def step_s(cores: float | None) -> float:
        return simulate(config(), replace(SPEEDS, cores=cores), Equal(), steps=1).steps[0].seconds - 0.5

    assert step_s(2.0) == pytest.approx(step_s(None))
    assert step_s(0.5) == pytest.approx(2 * step_s(None), rel=0.01)


BAD = Troubles(mtbf_s=4.0, failing=0.1)


def troubled(seed: int, staleness: int = 2, oversample: int = 2, **more: Any) -> Simulated:
    keys = (f"train.staleness={staleness}", f"train.oversample={oversample if staleness else 0}", "rollout.engine.servers=3")
    bounds = ("rollout.engine.restarts=1000", "rollout.failed_share=0.99", "rollout.retries=1", "rollout.concurrency=12")
    speeds = replace(SPEEDS, start_s=1.5, paused_s=0.2)
    return simulate(
        config(*keys, *bounds, *more.pop("keys", ())), speeds, LogNormal(120, 0.9, PROMPT, seed=seed), seed=seed, steps=6, **more
    )


@settings(max_examples=often(6), deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3), st.booleans())
def test_whatever_fails_each_group_ends_once_and_no_token_is_too_old(seed: int, staleness: int, auto: bool) -> None:
    traffic = ("rollout.engine.traffic.per_server=auto", "rollout.engine.traffic.moving.least_s=0.5") if auto else ()
    made = troubled(seed, staleness, troubles=BAD, keys=traffic)
    ends = made.ledger["groups"]
    assert made.unbalanced == []
    assert made.left == 0
    assert made.ledger["open"] == 0
    assert sum(ends.values()) == made.ledger["admitted"]
    assert ends["trained"] * 2 == made.trajectories == 6 * 4 * 2
    assert max(step.metrics["rollout/staleness_max"] for step in made.steps) <= staleness


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    one, again, other = (troubled(seed, troubles=BAD) for seed in (1, 1, 2))
    assert one.failures > 0
    assert [step.ended for step in one.steps] == [step.ended for step in again.steps]
    assert [step.metrics for step in one.steps] == [step.metrics for step in again.steps]
    assert one.ledger == again.ledger
    assert [step.ended for step in one.steps] != [step.ended for step in other.steps]


def test_failures_cost_time() -> None:
    assert troubled(1, troubles=BAD).ended > 1.1 * troubled(1).ended


def test_more_failures_than_the_configuration_allows_end_the_run_as_they_end_a_real_one() -> None:
    with pytest.raises(RolloutError, match="a simulated failure"):
        troubled(1, troubles=Troubles(failing=0.8), keys=("rollout.failed_share=0.05",))


def test_a_controller_that_admits_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a buffer that lets in a step too many, and takes what is too old."""
    room = StepRules.room
    monkeypatch.setattr(StepRules, "room", lambda self, **at: room(self, **at) + self.groups)
    monkeypatch.setattr(StepRules, "too_old", lambda *_: False)
    made = simulate(config("train.staleness=1"), SPEEDS, Equal(), steps=4)
    assert max(step.metrics["rollout/staleness_max"] for step in made.steps) > 1


def test_a_server_that_forgets_a_request_is_seen_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimulatedServer._answer
    forgotten = []

    def forget_one(self: SimulatedServer, request: Any, sampled: int) -> None:
        if request.session == 3 and not forgotten:
            forgotten.append(request)
            self._remove(request)
        else:
            answer(self, request, sampled)

    monkeypatch.setattr(SimulatedServer, "_answer", forget_one)
    # the loop looks after servers that come late as long as it waits, so its clock goes on: the bound of this test ends it
    monkeypatch.setattr("ctpo_megatron.simulation.clock.MOST_SECONDS", 1000.0)
    with pytest.raises(NothingLeft, match="1,000 s"):
        simulate(config(), SPEEDS, Equal(), steps=1)
