"""The evaluations of a run: which are due, the one that goes on beside training, and which are owed.

    due, first or last step ----> standing still: all servers evaluate
    due, in between -----------> beside: servers that are set aside keep the weights; training goes on with the others
                                   | done                 | the run ends before it is, or its servers are lost
                                   v                      v
                                 recorded               owed: from the checkpoint of its step, when the run goes on, or at its end

Without servers to set aside, training stands still for each. What was sampled is in the journal, so what is owed goes on where
it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ctpo_megatron.errors import AsideLost
from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
from ctpo_megatron.loop.evaluation.results import Evaluation
from ctpo_megatron.loop.protocols import ServersAside
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.report import RunTotals
from ctpo_megatron.record.evaluation_events import EvaluationAwaited, EvaluationBegun, EvaluationLost, EvaluationPostponed
from ctpo_megatron.record.events import Emit, EvaluationDone, discard


@dataclass
class Evaluations:
    """All evaluations of a run of `last` training steps. `accuracies`: of those that are done, by the steps before them.

    `aside`: can set servers aside, `servers` of them; None: training stands still for each evaluation.
    """

    benchmarks: Sequence[Benchmark]
    last: int
    evaluator: Evaluator
    record: RunRecord
    totals: RunTotals
    accuracies: dict[int, float] = field(default_factory=dict)
    owed: set[int] = field(default_factory=set)  # whose steps are done, and they are not
    servers: int = 0
    aside: ServersAside | None = None
    emit: Emit = discard
    running: int | None = None  # the step before the evaluation that goes on beside training
    _beside: asyncio.Task[None] | None = None
    _awaited_since: float | None = None  # from when on training has stood still for that one

    def due(self, step: int) -> list[Benchmark]:
        """Returns what the policy after `step` training steps is to be evaluated on, and was not."""
        done = step in self.accuracies or step == self.running
        return [] if done else [each for each in self.benchmarks if each.settings.due(step, self.last)]

    def unfinished(self) -> tuple[int, ...]:
        """Returns the steps before the evaluations that are owed, if the run ended now. Their checkpoints are needed."""
        return tuple(sorted(self.owed | ({self.running} if self.running is not None else set())))

    async def evaluate(self, step: int) -> None:
        """Evaluate what the servers hold, the policy after `step` training steps, while training stands still."""
        begun = time.monotonic()
        made = await self._evaluate(step, aside=False)
        await self.settled()  # TensorBoard wants the steps of a curve in their order
        self._done(step, replace(made, stood_still_s=time.monotonic() - begun))

    def begin(self, step: int) -> bool:
        """Set servers aside and begin to evaluate beside training. Returns False, doing nothing, where no server can be."""
        count = 0 if self.aside is None or step == self.last else self.aside.set_aside(self.servers)
        if not count:
            return False
        self.running, self._awaited_since = step, None
        self._beside = asyncio.ensure_future(self._to_its_end(step))
        self.emit(EvaluationBegun(step, count))
        return True

    async def make_room(self, step: int) -> None:
        """Wait until the servers that were set aside are free for the evaluation after `step`. Raises what failed."""
        if self.running is not None:
            self.emit(EvaluationAwaited(step, self.running))
        await self.settled()

    async def settled(self) -> None:
        """Wait until nothing is evaluated beside training. Raises what failed."""
        if self._beside is None:
            return
        self._awaited_since = time.monotonic()
        await asyncio.wait([self._beside])
        self.check()

    def check(self) -> None:
        """Raise what the evaluation beside training failed with, if it has failed."""
        if self._beside is not None and self._beside.done():
            beside, self._beside = self._beside, None
            beside.result()

    async def abandon(self) -> None:
        """End the evaluation beside training, if there is one; it is owed then. Safe to call twice."""
        beside, self._beside = self._beside, None
        if beside is not None:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
        if self.running is not None:  # it was cancelled before it had begun
            self.owed.add(self.running)
            self._free_servers()

    def lose(self, step: int, reason: str) -> None:
        """Give up an evaluation that is owed, and say why."""
        self.owed.discard(step)
        self.emit(EvaluationLost(step, reason))

    async def _to_its_end(self, step: int) -> None:
        try:
            made = await self._evaluate(step, aside=True)
        except AsideLost as error:
            self.owed.add(step)
            self.emit(EvaluationPostponed(step, str(error)))
        except BaseException:
            self.owed.add(step)
            raise
        else:
            waited = 0.0 if self._awaited_since is None else time.monotonic() - self._awaited_since
            self._done(step, replace(made, stood_still_s=waited))
        finally:
            self._free_servers()

    def _free_servers(self) -> None:
        self.running = None
        if self.aside is not None:
            self.aside.give_back()

    async def _evaluate(self, step: int, *, aside: bool) -> Evaluation:
        benchmarks = [each for each in self.benchmarks if each.settings.due(step, self.last)]
        whole = len(benchmarks) == len(self.benchmarks)
        return await self.evaluator.evaluate(benchmarks, step=step, whole=whole, aside=aside)

    def _done(self, step: int, made: Evaluation) -> None:
        late = any(other > step for other in self.accuracies)
        self.accuracies[step] = made.accuracy
        self.owed.discard(step)
        self.record.evaluation(step, made, late=late)
        self.totals.add_evaluation(made.stood_still_s)
        each = {result.settings.name: result.accuracy for result in made.results}
        self.emit(EvaluationDone(step, made.accuracy, made.stood_still_s, made.seconds, each))
