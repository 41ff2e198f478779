"""`ctpo eval`: a model on data.eval and on benchmarks, through the same servers and environment as training.

What is sampled is kept in a journal of its own, RUN_DIR/evals/model/journal, as it comes. The same command goes on from there,
also with more samples or further benchmarks; other weights, another seed or other sampling begin anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.nursery import Nursery
from ctpo_megatron.errors import ConfigError, storing
from ctpo_megatron.jobs.evaluations import load_benchmarks, recipes
from ctpo_megatron.jobs.inputs import open_model, prepare_run_dir
from ctpo_megatron.jobs.rollouts import OpenRollouts, checked_tool, open_rollouts
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
from ctpo_megatron.loop.evaluation.files import DIRECTORY, write_results
from ctpo_megatron.loop.evaluation.results import Evaluation
from ctpo_megatron.loop.evaluation.table import as_table
from ctpo_megatron.models.files import weight_files
from ctpo_megatron.record import write_summary
from ctpo_megatron.record.events import print_sentence
from ctpo_megatron.record.recorder import TABLE_WIDTH
from ctpo_megatron.rollout.journal import Journal

OF_MODEL = "model"  # the place of these results, beside those of a run's steps
JOURNAL = "journal"


async def eval_job(config: RunConfig, *, anew: bool = False, nursery: Nursery | None = None) -> None:
    """Print the results and write RUN_DIR/eval.json; `anew`: without what an earlier command has sampled.

    `nursery`: the process that servers are forked from, if any.
    """
    if config.data.eval is None and not config.eval.benchmarks:
        raise ConfigError("neither data.eval nor eval.benchmarks is set; give at least one file to evaluate on")
    if config.model.adapter is not None and config.model.adapter.path is not None:
        raise ConfigError(
            "model.adapter.path: `ctpo eval` asks the model in model.path as it is; evaluate RUN_DIR/model, which has them "
            "merged, or merge a checkpoint's by `ctpo convert to-hf`."
        )
    model = open_model(config, "eval")
    benchmarks = load_benchmarks(config, model, print_sentence)
    tool = checked_tool(config.rollout)
    run_dir = prepare_run_dir(config)
    directory = run_dir / DIRECTORY / OF_MODEL
    if anew:
        with storing(directory):
            shutil.rmtree(directory, ignore_errors=True)
    journal = _open_journal(config, benchmarks, directory)
    try:
        async with (
            Runtime(
                config, model.shape, topology_of(config, trainer=False), run_dir, emit=print_sentence, nursery=nursery
            ) as runtime,
            open_rollouts(runtime, model.chat, tool, journal) as rollouts,
        ):
            made = await runtime.guard(_evaluate(config, benchmarks, rollouts))
    finally:
        journal.close()
    write_results(directory, made.results)
    summary = {each.settings.name: each.summary() for each in made.results}
    write_summary(run_dir, made.metrics() | {"benchmarks": summary}, name="eval.json")
    _tell(made)


def weights_identity(model: Path, seed: int) -> str:
    """Returns what tells the weights in a model's directory from others: names, sizes and times of their files, not the content.

    `seed`: of the sampling, as another one asks for other attempts. Raises ModelError where the directory has no weights.
    """
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(model)]
    return hashlib.blake2b(repr((found, seed)).encode(), digest_size=16).hexdigest()


def _open_journal(config: RunConfig, benchmarks: Sequence[Benchmark], directory: Path) -> Journal:
    with storing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory / JOURNAL, "", recipes=recipes(config, benchmarks), emit=print_sentence)
    journal.published(0, weights_identity(Path(config.model.path), config.seed))
    return journal


async def _evaluate(config: RunConfig, benchmarks: Sequence[Benchmark], rollouts: OpenRollouts) -> Evaluation:
    evaluator = Evaluator(rollouts.rollouter, rollouts.grader, config.seed)
    work = asyncio.ensure_future(evaluator.evaluate(benchmarks, step=0))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:  # by a signal: what is half said is kept before the attempts end
        await rollouts.rollouter.interrupt()
        raise
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def _tell(made: Evaluation) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=TABLE_WIDTH)
    if made.has_more_to_tell:
        console.print(as_table(made))
    for each in made.results:
        tool_rate = each.summary()["tool_rate"]
        print(
            f"eval: accuracy {each.accuracy:.1%} on {len(each.problems)} prompts x {each.settings.samples}"
            f"{f' of {each.settings.name}' if len(made.results) > 1 else ''}, tool used in {tool_rate:.0%}, {made.seconds:.1f} s"
        )
