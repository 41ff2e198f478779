"""`ctpo plan --rehearse`: one training step of one rank of the whole layout, on tensors without memory, beside the plan."""

from __future__ import annotations

import resource
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctpo_megatron.cluster.local_ranks import run_local_ranks
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import ConfigError, CtpoError, ProcessDied, RehearsalError
from ctpo_megatron.jobs.plan import WIDTH, find_model_config, plain_table
from ctpo_megatron.jobs.topology import planned_run
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.mcore.rehearsal.rank import Rehearsal, Rehearsed, rehearse
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.batches import plan_batches
from ctpo_megatron.planning.memory import GIB, StageMemory, plan_stages
from ctpo_megatron.planning.rehearsal import PARTS, compare, not_rehearsed, rehearsed_micro_batches, rehearsed_tokens

TIMEOUT_S = 3600.0
MEMORY = 8 * GIB  # of the process that rehearses
NEVER = {
    "the pass that finds the old policy's log-probs": "the rehearsed step is given them",
    "samples of several lengths": "one sequence fills each micro-batch",
    "publication, checkpoints": "nothing is sent to servers or written",
}


def rehearse_job(
    config: RunConfig, where: Path, model_config: Path | None, rank: int | None, console: Console | None = None
) -> None:
    """Print what `rank` of the trainer of `config`, read from the file `where`, does in one step.

    None: the first rank of the fullest stage. Raises ConfigError for a rank that the layout does not have, and RehearsalError
    where the step fails or takes too long or too much memory.
    """
    source = find_model_config(config, where, model_config)
    shape = parse_config(read_json(source), str(source))
    what, planned = rehearsal_of(config, shape, rank)
    found = in_own_process(what)
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for part in report(what, planned, found, left_out(config)):
        console.print(part, "")


def rehearsal_of(config: RunConfig, shape: ModelShape, rank: int | None) -> tuple[Rehearsal, StageMemory]:
    """What to rehearse of `config`, and the plan of the same: as many micro-batches, on the same pipeline stage."""
    run, parallel = planned_run(config), config.parallel
    check_layout(shape, parallel)
    if run.model.adapter is not None:
        raise ConfigError("model.adapter: a rehearsal knows no adapters; without --rehearse the plan counts them.")
    if config.algorithm.critic is not None:
        raise ConfigError("algorithm.advantage.type=gae: a rehearsal knows no critic; without --rehearse the plan counts it.")
    micro_batches = rehearsed_micro_batches(run, plan_batches(run).packings[0].micro_batches)
    stages = plan_stages(run, shape, micro_batches)
    each = parallel.world_size // parallel.pp
    if rank is None:
        rank = each * max(range(parallel.pp), key=lambda stage: stages[stage].memory.total)
    if rank >= parallel.world_size:
        raise ConfigError(f"--rank {rank}, but the trainer has ranks 0 to {parallel.world_size - 1}.")
    what = Rehearsal(
        shape=shape,
        parallel=parallel,
        moe=config.moe,
        optimizer=config.optimizer.model_copy(update={"precision_aware": False, "cpu_offload": 0.0}),
        algorithm=config.algorithm,
        recompute=config.train.recompute,
        dtype=run.model.dtype_on("cpu" if run.on_cpu else "cuda"),
        tokens=rehearsed_tokens(run),
        micro_batches=micro_batches,
        rank=rank,
        fused=not run.on_cpu,
    )
    return what, stages[rank // each].memory


def in_own_process(what: Rehearsal, timeout_s: float = TIMEOUT_S, memory: int = MEMORY) -> Rehearsed:
    """`rehearse` in a new process, which takes its fake groups with it. Raises RehearsalError where it fails."""
    try:
        (found,) = run_local_ranks(1, _bounded, what, memory, timeout_s=timeout_s)
    except ProcessDied as error:
        raise RehearsalError(
            f"rank {what.rank} could not be rehearsed within {timeout_s:g} s and {memory / GIB:g} GiB of this machine: {error}"
        ) from error
    return found


def _bounded(_info: RankInfo, what: Rehearsal, memory: int) -> Rehearsed:
    """`rehearse` with a bound on memory and without megatron's advice for real runs."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    warnings.simplefilter("ignore")
    try:
        return rehearse(what)
    except CtpoError:
        raise
    except Exception as error:
        raise RehearsalError(
            f"rank {what.rank} could not be rehearsed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        ) from error


def left_out(config: RunConfig) -> dict[str, str]:
    """What of `config` a rehearsal leaves out, and what it does instead."""
    found = dict(NEVER)
    if config.optimizer.precision_aware or config.optimizer.cpu_offload:
        found["optimizer.precision_aware, optimizer.cpu_offload"] = "the plain optimizer runs, with all state on the device"
    if config.train.fp8 is not None:
        found["train.fp8"] = "products are in the weights' own format, without the copies that TransformerEngine keeps"
    if config.train.recompute == "selective" and config.cluster.device != "cpu":
        found["train.recompute: selective"] = "attention is computed again, not what TransformerEngine's layers would"
    return found


def report(what: Rehearsal, planned: StageMemory, found: Rehearsed, left: dict[str, str]) -> Iterable[Table | Text]:
    """What is printed: memory beside the plan, the groups' traffic, and what was not rehearsed."""
    headline = f"Rehearsal of rank {what.rank} of {what.parallel.world_size}, pipeline stage {found.stage}: "
    headline += f"{what.micro_batches} micro-batches of {what.tokens:,} tokens, in {found.seconds:.0f} s"
    text = Text(headline, style="bold")
    yield text.append(
        "\nWhat lives at the fullest moment. batch: micro-batches, replayed routes; step: the rest", style="not bold"
    )
    yield _memory(planned, found)
    yield _traffic(found)
    table = plain_table("Not rehearsed", "")
    for name, size in not_rehearsed(planned).items():
        table.add_row(name, f"{size / GIB:.1f} GiB in the plan")
    for name, instead in (*found.made_up, *left.items()):
        table.add_row(name, instead)
    yield table


def _memory(planned: StageMemory, found: Rehearsed) -> Table:
    table = plain_table("GiB", "planned", "rehearsed", "difference", "", right=True)
    for part in compare(planned, {name: getattr(found, name) for name in PARTS}):
        share = f"{part.difference / part.planned:+.0%}" if part.planned else ""
        numbers = (f"{size / GIB:.2f}" for size in (part.planned, part.rehearsed))
        table.add_row(part.name, *numbers, f"{part.difference / GIB:+.2f}", Text(share, style="" if part.is_near else "red"))
    return table


def _traffic(found: Rehearsed) -> Table:
    table = plain_table("Group", "size", "call", "times", "MiB given")
    shared = [each for each in found.traffic if each.size > 1]  # alone, a rank copies
    for each in sorted(shared, key=lambda each: (each.group, -each.bytes)):
        table.add_row(each.group, str(each.size), each.kind, f"{each.calls:,}", f"{each.bytes / 2**20:,.1f}")
    if not shared:
        table.add_row("none", "", "", "", "")
    return table
