"""Whole runs in any order of events: killed, resumed with other settings, gone back from a spike, and made again from the record.

A model of what the controller decides, without tasks: attempts, weights and the journal are numbers, all else is the real thing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.rollout import DataConfig
from ctpo_megatron.data.mixture import new_sampler, restored_sampler
from ctpo_megatron.loop.admission import Admission, Admitted, Position
from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.loop.composition import StepRules, oldest_version
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.record.segments import Place
from ctpo_megatron.rollout.plans import Plans
from ctpo_megatron.types import (
    AttemptId,
    Composition,
    End,
    FailedAttempt,
    GroupId,
    Prompt,
    Status,
    Trajectory,
    TrajectoryGroup,
    Turn,
)
from tests.support.often import often

STEPS = 6
NOWHERE = Place(Path("memory"), 0, 0)
PROMPTS = [Prompt(i, ({"role": "user", "content": f"{s} {i}"},), "1", s) for s, n in (("", 9), ("hard", 7)) for i in range(n)]
MIXTURE = {"mixture": [{"name": "hard", "path": "b", "weight": 2.0}]}
DATA: list[dict[str, Any]] = [
    {},
    MIXTURE,
    MIXTURE | {"pools": {"borders": [0.3, 0.7], "weights": [1, 1, 3, 1]}},
    MIXTURE | {"curriculum": "tests.unit.data.curricula:counting"},
]
T = TypeVar("T")


def digest(*of: object) -> str:
    return hashlib.blake2b(repr(of).encode(), digest_size=6).hexdigest()


@dataclass
class Disk:
    """What outlives a process: publications and compositions in their order, and which weights sampled each group last."""

    records: list[tuple[int, str, Composition | None]] = field(default_factory=list)
    sampled: dict[int, tuple[int, str, str]] = field(default_factory=dict)  # version, weights, prompt


class Record(Plans):
    """The journal's account of decisions, read from the disk; `weights` are those that the run has, by their versions."""

    def __init__(self, disk: Disk, step: int) -> None:
        super().__init__()
        self.disk, weights = disk, {}
        for version, of, made in disk.records:
            if made is not None:
                self.add(made, of, NOWHERE)
                continue
            weights[version] = of
            super().published(version, of)
        self.weights = {version: of for version, of in weights.items() if version < step}

    def published(self, version: int, digest: str) -> None:
        self.weights[version] = digest
        super().published(version, digest)
        self.disk.records.append((version, digest, None))

    def decided(self, made: Composition) -> None:
        self.add(made, self.weights[made.step], NOWHERE)
        self.disk.records.append((made.step, self.weights[made.step], made))

    def drop_plans(self, step: int) -> None:
        self.drop(step)


@dataclass
class Begun:
    group: Admitted
    failed: tuple[FailedAttempt, ...]  # as it is on record
    version: int | None = None  # that samples it; None: it waits for its turn


class Process:
    """One process of a run, from a checkpoint on; what it may do next is asked for, one thing at a time."""

    def __init__(
        self,
        directory: Path,
        rules: StepRules,
        data: dict[str, Any],
        disk: Disk,
        step: int = 0,
        position: Position | None = None,
        weights: dict[int, str] | None = None,
        *,
        passed_over: bool = False,
    ) -> None:
        config, prompts = DataConfig.model_validate({"train": "a", **data}), PROMPTS if data else PROMPTS[:9]
        sampler = new_sampler(prompts, config, 1) if position is None else restored_sampler(prompts, config, 1, position.cursor)
        self.rules, self.disk, self.step, self.version = rules, disk, step, step
        self.admission = Admission(sampler) if position is None else Admission(sampler, position.groups, position.open)
        self.record = Record(disk, step)
        self.buffer = GroupBuffer(rules, first_step=step, last_step=STEPS, admitted=self.admission.groups, decisions=self.record)
        self.ledger = Ledger(directory / "ledger.jsonl", step=step, position=position, passed_over=passed_over)
        self.weights = {0: "first"} if weights is None else dict(weights)
        self.record.published(step, self.weights[step])
        self.running: dict[int, Begun] = {}
        self.steps: dict[int, list[int]] = {}
        self.position, self.positions = position, dict[int, Position]()
        self.aborted: list[int] = []
        self.loop = asyncio.new_event_loop()
        for group in self.admission.reopened:
            self._begin(group, group.version)

    def close(self) -> None:
        self.ledger.close()
        self.loop.close()

    def play(self, order: random.Random, moves: int) -> bool:
        """Let `moves` things happen, in any order; returns whether the run is done. Something can always happen."""
        for _ in range(moves):
            if self.step == STEPS:
                return True
            possible = [self.admit, self.take, self.publish, lambda: self.sample(order), lambda: self.finish(order)]
            order.shuffle(possible)
            # twice: whoever finds that a plan cannot be followed drops it, and those who waited for its weights go on
            happened = any(move() for _ in range(2) for move in possible)
            assert happened, f"nothing can happen in step {self.step}, open: {self.buffer.open}"
        return self.step == STEPS

    def admit(self) -> bool:
        if not self._now(self.buffer.room(self.admission.groups)):
            return False
        group = self.admission.next(self.version)
        self.ledger.admit(group)
        self._begin(group)
        return True

    def sample(self, order: random.Random) -> bool:
        """A group gets its turn; what was kept of it is used where the weights that sampled it are the run's."""
        waiting = [each for each in self.running.values() if each.version is None and not each.failed]
        return any(self._sampled(each) for each in order.sample(waiting, len(waiting)))

    def _sampled(self, begun: Begun) -> bool:
        number = begun.group.id.number
        version, of, prompt = self.disk.sampled.get(number, (0, "", ""))
        if prompt == begun.group.prompt.key:
            if version > max(self.record.weights) and self.record.planned(version - 1) is not None:
                return False
            if self.record.weights.get(version) == of:
                begun.version = version
                return True
        begun.version = self.version
        self.disk.sampled[number] = (self.version, self.weights[self.version], begun.group.prompt.key)
        return True

    def finish(self, order: random.Random) -> bool:
        ready = [each for each in self.running.values() if each.version is not None or each.failed]
        if not ready:
            return False
        begun = order.choice(ready)
        group, failed, attempts = begun.group, list(begun.failed), list[Trajectory]()
        del self.running[group.id.number]
        if not failed:
            assert begun.version is not None
            what = digest(group.id, group.prompt.key, self.weights[begun.version])[0]
            turns = [Turn("assistant", [1], [-1.0], [begun.version])]
            rewards = (0.0, 0.0) if what in "01234" else (0.0, 1.0)
            if what == "5":
                failed = [FailedAttempt(AttemptId(group.id, 0), "broken")]
            else:
                names = [AttemptId(group.id, number) for number in range(2)]
                attempts = [
                    Trajectory(group.prompt.index, [3], turns, Status.FINISHED, reward=reward, id=name)
                    for name, reward in zip(names, rewards, strict=True)
                ]
        self.buffer.put(TrajectoryGroup(group.prompt, attempts, id=group.id, failed=failed))
        return True

    def take(self) -> bool:
        made = None if self.step != self.version else self._now(self.buffer.take(self.step))
        if made is None:
            return False
        assert len(made.groups) == self.rules.groups
        for group in made.groups:
            assert (oldest_version(group) or 0) + self.rules.staleness >= self.step, f"{group.id} is too old"
            assert not group.failed
        self.aborted += [each.number for each in made.ended if each.end is End.ABORTED]
        self.ledger.settle(self.step + 1, made)
        assert self.ledger.unbalanced() == []
        self.admission.observe([*made.groups, *(each.made for each in made.ended if each.made and each.made.trajectories)])
        self.position = kept(self.admission.position(self.ledger.open))
        self.steps[self.step] = sorted(group.id.number for group in made.groups)
        self.weights[self.step + 1] = digest(self.weights[self.step], [(g.id, g.prompt.key) for g in made.groups])
        self.step += 1
        self.positions[self.step] = self.position
        return True

    def publish(self) -> bool:
        if self.version == self.step:
            return False
        self.version += 1
        self.record.published(self.version, self.weights[self.version])
        self.buffer.published(self.version)
        return True

    def _begin(self, group: Admitted, version: int | None = None) -> None:
        self.running[group.id.number] = Begun(group, self.buffer.begin(group.id.number, group.prompt, version))

    def _now(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` returns where it need not wait; None where it does."""

        async def tried() -> T | None:
            task = asyncio.ensure_future(work)
            for _ in range(3):
                await asyncio.sleep(0)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return None

        return self.loop.run_until_complete(tried())


def kept(position: Position) -> Position:
    """A position as a checkpoint gives it back."""
    return Position(position.groups, json.loads(json.dumps(position.cursor, allow_nan=False)), position.open)


def drawn_rules(order: random.Random) -> StepRules:
    groups, staleness = order.randint(1, 3), order.randint(0, 3)
    oversample = order.randint(0, groups) if staleness else 0
    return StepRules(groups, staleness, oversample, order.choice([None, 1, 3]))


def ended(path: Path) -> Counter[str]:
    """How often each group has ended, by the lines that count."""
    counted: list[tuple[int, str]] = []
    for line in map(json.loads, path.read_text().splitlines()):
        if "back" in line:
            counted = [each for each in counted if each[0] <= line["back"]]
        else:
            counted.append((line["step"], line["group"]))
    return Counter(group for _, group in counted)


@settings(deadline=None, max_examples=often(50), phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(seed=st.integers(0, 2**32), changes=st.sampled_from([0.0, 0.0, 0.4]), spikes=st.sampled_from([0.0, 0.0, 0.3]))
def test_a_run_that_is_killed_as_often_as_one_likes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, changes: float, spikes: float
) -> None:
    """No group ends twice or never, none is too old, nothing waits without end, and steps that are made again are the same.

    `changes`: how often settings are others on a resume; `spikes`: how often the run passes over what it had learned from.
    """
    order, directory, disk = random.Random(seed), tmp_path_factory.mktemp("run"), Disk()
    rules, data = drawn_rules(order), order.choice(DATA)
    process = Process(directory, rules, data, disk)
    steps: dict[int, list[int]] = {}
    positions: dict[int, Position] = {}
    for killed in range(5):
        done = process.play(order, 100_000 if killed == 4 else order.randint(1, 120))
        assert changes or spikes or all(made == steps.get(step, made) for step, made in process.steps.items())
        assert changes or spikes or process.aborted == [], "what was admitted in time became too old"
        steps |= process.steps
        positions |= process.positions
        process.close()
        if done:
            break
        back = order.choice([0, *positions])
        positions = {step: position for step, position in positions.items() if step <= back}
        position, passed_over = positions.get(back), order.random() < spikes and process.position is not None
        rules = drawn_rules(order) if order.random() < changes else rules
        position = process.position if passed_over else position
        process = Process(directory, rules, data, disk, back, position, process.weights, passed_over=passed_over)
    last = Ledger(directory / "ledger.jsonl", step=STEPS, position=process.position)
    last.end_all(STEPS)
    last.close()
    assert last.unbalanced() == []
    assert ended(directory / "ledger.jsonl") == {str(GroupId(number)): 1 for number in range(process.admission.groups)}
    if not changes and not spikes:
        (directory / "again").mkdir()
        again = Process(directory / "again", rules, data, disk)
        assert again.play(order, 100_000)
        assert again.steps == steps
        again.close()
