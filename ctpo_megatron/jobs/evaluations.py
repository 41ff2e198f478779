"""The benchmarks of a run, read and checked, and the evaluations that training makes on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.evaluation import benchmarks_of
from ctpo_megatron.config.tools import UNSAID
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.jobs.inputs import OpenModel, load_prompts
from ctpo_megatron.jobs.journal import reward_recipe
from ctpo_megatron.jobs.resume import Start
from ctpo_megatron.jobs.rollouts import OpenRollouts
from ctpo_megatron.loop.checkpoints import checkpoint_directory
from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
from ctpo_megatron.loop.evaluation.evaluations import Evaluations
from ctpo_megatron.loop.evaluation.files import read_accuracies
from ctpo_megatron.loop.protocols import Publisher, Trainer
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.report import RunTotals
from ctpo_megatron.record.events import Emit


def load_benchmarks(config: RunConfig, model: OpenModel, emit: Emit) -> list[Benchmark]:
    """Returns all that a run is evaluated on. Raises DataError; `emit` hears what was read."""
    settings = benchmarks_of(config.data, config.eval, config.rollout)
    return [Benchmark(each, load_prompts(each.file, config, model.chat, emit, model.shape)) for each in settings]


def recipes(config: RunConfig, benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """Returns for each benchmark, by what `GroupId.benchmark` says, a digest of all that an attempt depends on.

    Weights, and the prompts themselves, are compared besides. Numbers of problems and samples leave the digest as it is, so
    that a larger evaluation goes on from a smaller one.
    """
    found = {}
    for each in benchmarks:
        settings = {
            "sampling": asdict(each.sampling),
            "answers": [prompt.answer for prompt in each.prompts],
            "rollout": config.rollout.model_dump(mode="json", include={"tool", "agent"}, exclude={"tool": UNSAID}),
            "reward": reward_recipe(config.rollout.reward),
            "chat": config.model.model_dump(mode="json", exclude={"path"}),
        }
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        found[each.key] = digest
    return found


def make_evaluations(
    config: RunConfig,
    benchmarks: Sequence[Benchmark],
    rollouts: OpenRollouts,
    fleet: Fleet,
    start: Start,
    run_dir: Path,
    record: RunRecord,
    totals: RunTotals,
    emit: Emit,
) -> Evaluations:
    """Returns the evaluations of a run that begins at `start`; those that `run_dir` has the results of are done."""
    last = config.train.steps
    known = known_accuracies(run_dir, [*start.owed, start.step], benchmarks, last) if start.step else {}
    return Evaluations(
        benchmarks=benchmarks,
        last=last,
        evaluator=Evaluator(rollouts.rollouter, rollouts.grader, config.seed),
        record=record,
        totals=totals,
        accuracies=start.accuracies | known,
        owed=set(start.owed) - set(known),
        servers=config.eval.servers,
        aside=fleet,
        emit=emit,
    )


async def bring_back(
    trainer: Trainer, publisher: Publisher, root: Path, published: Callable[[int, str], None], step: int
) -> None:
    """Let trainer and servers hold the weights after `step` training steps, which are in a checkpoint below `root`."""
    await trainer.load(checkpoint_directory(root, step))
    await publisher.publish(step)
    published(step, publisher.digest)


def known_accuracies(run_dir: Path, steps: Sequence[int], benchmarks: Sequence[Benchmark], last: int) -> dict[int, float]:
    """Returns the accuracies of those of `steps` whose results are in `run_dir`, by evaluations like the ones that are due.

    An evaluation beside training may have come to its end after the checkpoint that the run goes on from.
    """
    found = {}
    for step in steps:
        due = [each.settings for each in benchmarks if each.settings.due(step, last)]
        known = read_accuracies(run_dir, step, due)
        if due and len(known) == len(due):
            found[step] = sum(known) / len(known)
    return found
