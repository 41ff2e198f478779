"""Evaluations beside training: never in its way, never lost, and of one version of the weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config.evaluation import BenchmarkSettings
from ctpo_megatron.errors import AsideLost, RolloutError
from ctpo_megatron.loop.checkpoints import newest, steps_in
from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
from ctpo_megatron.loop.evaluation.files import read_estimates
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.record.evaluation_events import EvaluationAwaited, EvaluationBegun, EvaluationLost, EvaluationPostponed
from ctpo_megatron.record.events import EvaluationDone, Event, StepTrained, discard
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.types import GroupId, Prompt, TrajectoryGroup, Turn
from tests.support.loops import Ranks, Sampled, config, train

BESIDE = ("rollout.engine.servers=3", "eval.servers=1", "train.prompts_per_step=2", "train.steps=6", "log.tensorboard=false")


class Servers(Ranks):
    """Ranks that note what they hold, which servers that are set aside take from them and keep."""

    def __init__(self) -> None:
        self.holds = self.trained = 0
        self.aside: int | None = None
        self.behind = False  # whether a server that was given back has not got the newest weights yet
        self.loaded: list[str] = []

    async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
        self.trained = version + 1
        await asyncio.sleep(0.01)
        return {}

    async def load(self, directory: Path) -> None:
        self.loaded.append(directory.name)

    async def publish(self, version: int) -> dict[str, float]:
        self.holds = version
        return await super().publish(version)

    async def heal(self) -> None:
        self.behind = False

    def set_aside(self, count: int) -> int:
        assert not self.behind, "it serves nobody yet, and is not there to be set aside"
        self.aside = self.holds
        return count

    def give_back(self) -> None:
        self.behind, self.aside = self.aside is not None, None


class Asked(Sampled):
    """Answers of the version that the servers hold; those that are set aside wait for `go_on`. `fails`: of which version."""

    def __init__(self, servers: Servers, *, go_on: bool = False, fails: int | None = None) -> None:
        super().__init__()
        self.servers, self.go_on, self.fails = servers, asyncio.Event(), fails
        self.interrupted = 0
        if go_on:
            self.go_on.set()

    async def group(self, prompt: Prompt, group: GroupId, **options: Any) -> TrajectoryGroup:
        made = await super().group(prompt, group, **options)
        if not options.get("aside"):
            return made
        held = self.servers.aside
        await asyncio.sleep(0)
        if held == self.fails:
            raise AsideLost("they died")
        await self.go_on.wait()
        for trajectory in made.trajectories:
            assert set(trajectory.turns[0].versions) == {held}, "they do not hold what is evaluated"
        return made

    async def interrupt(self) -> None:
        self.interrupted += 1


def of(kind: type[Event], events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, kind)]


def order(events: list[Event]) -> list[str]:
    """Steps and evaluations, by name and number, in the order in which they came to their ends."""
    kinds = {StepTrained: "s", EvaluationDone: "e", EvaluationBegun: "b"}
    return [f"{kinds[type(event)]}{event.step}" for event in events if type(event) in kinds]


def lines(run_dir: Path) -> list[int]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "eval/accuracy" in row]


def test_training_goes_on_meanwhile(tmp_path: Path) -> None:
    """The evaluation after step 2 lasts until step 3 is done; that after step 4 until the end, which waits for it."""
    servers = Servers()
    rollouts = Asked(servers)

    class Letting(Servers):
        async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
            if version == 3:
                rollouts.go_on.set()
                while self.aside is not None:
                    await asyncio.sleep(0.001)
                rollouts.go_on.clear()
            if version == 5:
                asyncio.get_running_loop().call_later(0.3, rollouts.go_on.set)
            return await super().update(batches, version)

    servers = rollouts.servers = Letting()
    _, loop, events = asyncio.run(train(config(*BESIDE), tmp_path, resume=False, ranks=servers, rollouts=rollouts))
    assert order(events) == ["e0", "s1", "b2", "s2", "s3", "e2", "b4", "s4", "s5", "e4", "e6", "s6"]
    assert sorted(loop.accuracies) == [0, 2, 4, 6]
    assert lines(tmp_path) == [0, 2, 4, 6], "each curve's steps in their order"
    stood_still = {event.step: event.seconds for event in of(EvaluationDone, events)}
    assert stood_still[2] == 0.0 < 0.2 < stood_still[4]
    assert (of(EvaluationAwaited, events), servers.aside) == ([], None)


def test_one_that_is_due_too_soon_is_waited_for_and_told(tmp_path: Path) -> None:
    servers = Servers()
    rollouts = Asked(servers)

    class Late(Servers):
        async def heal(self) -> None:
            await super().heal()
            if self.trained == 4:
                asyncio.get_running_loop().call_later(0.1, rollouts.go_on.set)

    servers = rollouts.servers = Late()
    _, _, events = asyncio.run(train(config(*BESIDE), tmp_path, resume=False, ranks=servers, rollouts=rollouts))
    assert of(EvaluationAwaited, events) == [EvaluationAwaited(4, 2)]
    assert order(events)[:8] == ["e0", "s1", "b2", "s2", "s3", "e2", "b4", "s4"]


def stopped(tmp_path: Path, every: int = 1) -> tuple[Servers, Asked, list[Event]]:
    """A run that is stopped in step 5, while what follows step 2 is evaluated; one checkpoint is kept."""
    orders, servers = Orders(), Servers()

    class Stopping(Servers):
        async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
            if version == 3:
                orders.stop(StopRequest("a test"))
            return await super().update(batches, version)

    servers = Stopping()
    rollouts = Asked(servers)
    sizes = (*BESIDE, f"checkpoint.every={every}", "checkpoint.keep=1")
    asyncio.run(train(config(*sizes), tmp_path, resume=False, ranks=servers, rollouts=rollouts, orders=orders))
    return servers, rollouts, []


@pytest.mark.parametrize("every", [1, 3])
def test_what_a_stopped_run_owes_is_made_up_for_from_its_checkpoint(tmp_path: Path, every: int) -> None:
    """Also where no checkpoint would have been due at its step."""
    _, rollouts, _ = stopped(tmp_path, every)
    assert rollouts.interrupted >= 1, "what was half said is kept"
    root = tmp_path / "checkpoints"
    assert steps_in(root) == [2, 4], "the one that is owed is kept besides the newest"
    assert newest(root, 9, discard).state.owed == (2,)
    servers = Servers()
    again = Asked(servers, go_on=True)
    _, loop, events = asyncio.run(train(config(*BESIDE), tmp_path, resume=True, ranks=servers, rollouts=again))
    assert servers.loaded == ["step_00000004", "step_00000002", "step_00000004"]
    assert order(events)[:3] == ["e2", "e4", "s5"]
    assert sorted(loop.accuracies) == [0, 2, 4, 6]
    assert lines(tmp_path) == [0, 2, 4, 6]
    assert sorted(read_estimates(tmp_path)["held_out"]) == [0, 2, 4, 6]
    assert newest(root, 9, discard).state.owed == ()


def test_what_was_done_after_the_checkpoint_is_not_done_again(tmp_path: Path) -> None:
    """The results lie in the run's directory; with other settings they are those of another evaluation."""
    stopped(tmp_path)
    keep, root = (*BESIDE, "checkpoint.keep=9"), tmp_path / "checkpoints"

    def go_on(*more: str) -> list[str]:
        servers = Servers()
        rollouts = Asked(servers, go_on=True)
        _, _, events = asyncio.run(train(config(*keep, *more), tmp_path, resume=True, ranks=servers, rollouts=rollouts))
        for step in (5, 6):
            shutil.rmtree(root / f"step_{step:08d}")
        return order(events)

    assert go_on()[:2] == ["e2", "e4"]
    assert go_on()[0] == "s5"
    assert go_on("eval.samples=3")[:2] == ["e2", "e4"]


def test_without_a_checkpoint_of_its_step_it_is_lost_and_said_to_be(tmp_path: Path) -> None:
    stopped(tmp_path, every=0)
    servers = Servers()
    again = Asked(servers, go_on=True)
    _, loop, events = asyncio.run(train(config(*BESIDE), tmp_path, resume=True, ranks=servers, rollouts=again))
    assert of(EvaluationLost, events) == [EvaluationLost(2, "there is no checkpoint of that step")]
    assert sorted(loop.accuracies) == [0, 4, 6]
    assert servers.loaded == ["step_00000004"]


def test_with_nothing_to_come_back_to_it_is_made_up_for_at_the_end(tmp_path: Path) -> None:
    stopped(tmp_path)

    class Forgetting(Servers):
        async def load(self, directory: Path) -> None:
            await super().load(directory)
            if directory.name == "step_00000004":
                shutil.rmtree(directory)

    servers = Forgetting()
    again = Asked(servers, go_on=True)
    _, loop, events = asyncio.run(train(config(*BESIDE), tmp_path, resume=True, ranks=servers, rollouts=again))
    assert servers.loaded == ["step_00000004", "step_00000002", "step_00000006"]
    assert order(events) == ["e4", "s5", "e6", "s6", "e2"]
    assert sorted(loop.accuracies) == [0, 2, 4, 6]


def test_one_whose_servers_are_lost_is_made_up_for_at_the_end(tmp_path: Path) -> None:
    """Its point comes behind that of a later step: only metrics.jsonl has it, as TensorBoard would drop the later one."""
    servers = Servers()
    rollouts = Asked(servers, go_on=True, fails=2)
    _, loop, events = asyncio.run(train(config(*BESIDE), tmp_path, resume=False, ranks=servers, rollouts=rollouts))
    assert of(EvaluationPostponed, events) == [EvaluationPostponed(2, "they died")]
    assert servers.loaded == ["step_00000002", "step_00000006"], "and the trainer holds the last weights in the end"
    assert sorted(loop.accuracies) == [0, 2, 4, 6]
    assert lines(tmp_path) == [0, 4, 6, 2]


def test_what_goes_wrong_beside_training_ends_the_run(tmp_path: Path) -> None:
    servers = Servers()

    class Wrong(Asked):
        async def group(self, prompt: Prompt, group: GroupId, **options: Any) -> TrajectoryGroup:
            if options.get("aside"):
                raise RolloutError("a defect")
            return await super().group(prompt, group, **options)

    with pytest.raises(RolloutError, match="a defect"):
        asyncio.run(train(config(*BESIDE), tmp_path, resume=False, ranks=servers, rollouts=Wrong(servers)))
    assert newest(tmp_path / "checkpoints", 9, discard).state.owed == (2,)


def test_weights_that_are_mixed_are_not_evaluated() -> None:
    class Mixed(Sampled):
        async def group(self, prompt: Prompt, group: GroupId, **options: Any) -> TrajectoryGroup:
            made = await super().group(prompt, group, **options)
            made.trajectories[1].turns = [Turn("assistant", [1, 2], [-1.0, -1.0], [4, 5])]
            return made

    settings = BenchmarkSettings("aime", "aime.parquet", 0, None, 2, 1.0, 1, 8)
    prompt = Prompt(0, ({"role": "user", "content": "?"},), "1")
    words = "e00000004-aime-g00000000.1: version 4 of the weights is evaluated, but tokens of it were sampled by version 5"
    with pytest.raises(RolloutError, match=words):
        asyncio.run(Evaluator(Mixed(), None, 1).evaluate([Benchmark(settings, [prompt])], step=4))


class Answering(Sampled):
    """Right at the first of two attempts, and silent at the other; notes how it was asked to sample."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, tuple[int, Sampling]] = {}

    async def group(self, prompt: Prompt, group: GroupId, **options: Any) -> TrajectoryGroup:
        made = await super().group(prompt, group, **options)
        self.asked[str(group)] = (options["size"], options["sampling"])
        for number, trajectory in enumerate(made.trajectories):
            trajectory.reward, trajectory.given = float(number == 0), "1" if number == 0 else None
        return made


def test_each_benchmark_is_sampled_and_counted_in_its_own_way() -> None:
    prompts = [Prompt(n, ({"role": "user", "content": str(n)},), "1") for n in range(3)]
    one = Benchmark(BenchmarkSettings("held_out", "a", 0, 2, 1, 0.0, 1, 8), prompts)
    two = Benchmark(BenchmarkSettings("aime", "b", 0, None, 4, 0.7, 5, 99), prompts)
    rollouts = Answering()
    made = asyncio.run(Evaluator(rollouts, None, 1).evaluate([one, two], step=3))
    assert rollouts.asked == {
        **{f"e00000003-g0000000{n}": (1, Sampling(0.0, 1, 8)) for n in range(2)},
        **{f"e00000003-aime-g0000000{n}": (4, Sampling(0.7, 5, 99)) for n in range(3)},
    }
    metrics = made.metrics()
    assert metrics["eval/accuracy/held_out"] == 1.0
    assert metrics["eval/accuracy/aime"] == metrics["eval/accuracy_low/aime"] == metrics["eval/accuracy_high/aime"] == 0.25
    assert metrics["eval/accuracy"] == (1.0 + 0.25) / 2
    assert (metrics["eval/pass_at_2/aime"], metrics["eval/pass_at_4/aime"]) == (0.5, 1.0)
    assert (metrics["eval/maj_at_2/aime"], metrics["eval/maj_at_4/aime"]) == (0.5, 1.0), "who is silent does not vote"
    assert made.results[1].as_json()["by_problem"][2]["attempts"][1]["vote"] is None
