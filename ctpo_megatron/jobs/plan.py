"""`ctpo plan`: what a run will need and do, from its configuration and the model's config.json, before a GPU is taken."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctpo_megatron.agents.play.kinds import started_here
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.agents import FunctionAgent
from ctpo_megatron.errors import ConfigError, ModelError
from ctpo_megatron.jobs.agreement import check_training
from ctpo_megatron.jobs.knobs import helpful_changes
from ctpo_megatron.jobs.layouts import check_layouts, layouts_that_do_not_fit, smaller_plans
from ctpo_megatron.jobs.plan_agents import Row, agent_rows
from ctpo_megatron.jobs.plan_teachers import planned_teachers
from ctpo_megatron.jobs.topology import planned_run, teacher_servers
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import check_what_is_there, read_json
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.memory import GIB, Stage
from ctpo_megatron.planning.parameters import active_parameters, model_parameters
from ctpo_megatron.planning.plan import Hardware, Plan, make_plan
from ctpo_megatron.planning.servers import PlannedTeacher, Servers

WIDTH = 120  # of lines that do not go to a terminal
NUMBERS = ("size", "groups", "on nodes", "times", "MiB given")  # columns of numbers


def plan_job(
    config: RunConfig, where: Path, model_config: Path | None, hardware: Hardware, console: Console | None = None
) -> None:
    """Print the plan of `config`, read from the file `where`. Raises ConfigError, after printing, for what cannot run."""
    source = find_model_config(config, where, model_config)
    shape, absent = read_planned(config, source)
    plan, smaller = plan_of(config, shape, hardware), smaller_plans(config, shape, hardware)
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for part in _report(config, shape, plan, hardware, source):
        console.print(part, "")
    if smaller:
        console.print(_smaller(config, smaller, hardware), "")
    problems = plan.problems + ([] if config.cluster.device == "cpu" else layouts_that_do_not_fit(smaller, hardware))
    if problems:
        raise ConfigError(f"{where} cannot run:\n" + "\n".join(f"- {problem}" for problem in problems))
    console.print(_verdict(config, plan, hardware))
    lacking = f"; {' and '.join(absent)}, as there are none beside {source}" if absent else ""
    imported = ", whether the agent's function can be imported" if isinstance(config.rollout.agent, FunctionAgent) else ""
    console.print(Text(f"Not looked at: the data{imported}{lacking}.", style="dim"))


def read_planned(config: RunConfig, source: Path) -> tuple[ModelShape, list[str]]:
    """The shape that the config.json at `source` describes, and what of a model does not lie beside it.

    Raises InputError for all that `ctpo train` would refuse in the configuration and in what of the model is there.
    """
    shape = parse_config(read_json(source), str(source))
    check_layouts(shape, config)
    started_here(config.rollout.agent)
    absent = check_what_is_there(source.parent)
    check_training(config, shape, source.parent)
    return shape, absent


def plan_of(config: RunConfig, shape: ModelShape, hardware: Hardware) -> Plan:
    """The plan of `config` on `hardware`, with advice where it does not fit. Raises ConfigError for an impossible layout."""
    teachers = planned_teachers(config)
    return make_plan(planned_run(config), shape, hardware, lambda: helpful_changes(config, shape, hardware.gpu_gib), teachers)


def find_model_config(config: RunConfig, where: Path, given: Path | None) -> Path:
    """The config.json to plan with: the given one, the model's own, or the published one that lies beside the configuration."""
    if given is not None:
        return given / "config.json" if given.is_dir() else given
    own = Path(config.model.path) / "config.json"
    published = where.parent / "models" / where.stem / "config.json"
    for candidate in (own, published):
        if candidate.is_file():
            return candidate
    raise ModelError(f"neither {own} nor {published} is there; give the model's config.json with --model-config FILE.")


def _report(config: RunConfig, shape: ModelShape, plan: Plan, hardware: Hardware, source: Path) -> Iterable[Table | Text | str]:
    yield _headline(config, shape, source)
    yield _gpus(config, plan, hardware)
    yield _memory(config, plan, hardware)
    yield _batches(config, plan)
    yield _groups(plan, hardware, shape.experts is not None)
    yield _servers("Servers", plan.servers, f"rollout.concurrency {config.rollout.concurrency:,}")
    for teacher in planned_teachers(config):
        yield _teacher(teacher, plan.teachers[teacher.name])
    if rows := agent_rows(config):
        yield _agents(rows)
    if config.cluster.device != "cpu":
        yield _checkpoints(config, plan, hardware)
        if plan.host.is_notable or hardware.host_gib is not None:
            yield _host(plan, hardware)
        yield _bounds(config, shape, plan)


def _headline(config: RunConfig, shape: ModelShape, source: Path) -> Text:
    total, active = model_parameters(shape), active_parameters(shape)
    words = f"{_billions(total.total)} parameters"
    if shape.experts:
        words += f", {_billions(active)} active; experts on {len(shape.expert_layers)} of {shape.num_layers} layers, "
        words += f"{shape.experts.top_k} of {shape.experts.count} per token"
    else:
        words += f", {shape.num_layers} layers"
    text = Text(f"{config.name}: ", style="bold")
    return text.append(words, style="not bold").append(f"\nfrom {source}", style="dim not bold")


def _gpus(config: RunConfig, plan: Plan, hardware: Hardware) -> Table:
    parallel, servers = config.parallel, plan.servers
    sizes = {name: getattr(parallel, name) for name in ("tp", "cp", "dp", "pp")}
    experts = f"; experts ep {parallel.ep} x etp {parallel.etp}" if parallel.ep * parallel.etp > 1 else ""
    unit = "CPU processes" if config.cluster.device == "cpu" else "GPUs"
    table = plain_table(unit, "", "")
    table.add_row("trainer", str(plan.trainer_gpus), " x ".join(f"{name} {size}" for name, size in sizes.items()) + experts)
    shared = "" if plan.server_gpus else ", on the trainer's GPUs"
    spread = f", each on {servers.nodes_each} nodes" if servers.nodes_each > 1 else ""
    table.add_row("servers", str(plan.server_gpus), f"{servers.servers} of tp {servers.gpus_each}{spread}{shared}")
    if plan.teacher_gpus:
        sets = [f"{each.servers} of tp {each.tp}" for each in teacher_servers(config)]
        table.add_row("teachers", str(plan.teacher_gpus), ", ".join(sets))
    if unit == "GPUs":
        table.add_row(
            "together",
            str(plan.trainer_gpus + plan.server_gpus + plan.teacher_gpus),
            f"{plan.nodes} node{'s' if plan.nodes > 1 else ''} of {hardware.gpus_per_node}",
        )
    return table


def _memory(config: RunConfig, plan: Plan, hardware: Hardware) -> Table:
    title = f"Memory of a trainer rank, GiB (recompute {config.train.recompute}"
    title += f", {config.train.max_tokens_per_micro_batch:,} tokens per micro-batch)"
    columns = ("stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "working", "head", "other")
    table = plain_table("stage", *columns[1:], "total", "free", right=True)
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    on_cpu = config.cluster.device == "cpu"
    for number, stage in enumerate(plan.stages):
        free = "" if on_cpu else _gib(hardware.gpu_gib * GIB - stage.memory.total)
        style = "red" if free.startswith("-") else ""
        table.add_row(*_memory_row(number, stage), Text(free, style=style))
    offloaded = max(stage.host_optimizer for stage in plan.stages)
    table.caption = (
        "other: micro-batches and replayed routes of a step, buckets of weights under publication, a reserve for CUDA, NCCL,"
    )
    table.caption += " fragments"
    if copies := max(stage.memory.fp8_copies for stage in plan.stages):
        table.caption += f"; weights: {_gib(copies)} GiB of them copies in fp8"
    if offloaded:
        table.caption += f"; {_gib(offloaded)} GiB of an offloaded optimizer per rank in the host's memory"
    table.caption_justify = "left"
    return table


def _memory_row(number: int, stage: Stage) -> list[str]:
    m = stage.memory
    other = m.micro_batches + m.replay + m.contexts + m.publication + m.reserve
    parts = (m.weights + m.fp8_copies, m.gradients, m.optimizer, m.activations, m.working, m.head, other, m.total)
    return [str(number), str(stage.layers), _billions(stage.parameters.total), *map(_gib, parts)]


def _batches(config: RunConfig, plan: Plan) -> Table:
    b, parallel = plan.batches, config.parallel
    table = plain_table("Batches", "", "")
    table.add_row("rollout step", f"{b.prompts:,} prompts x {config.rollout.group_size} = {b.samples:,} samples", "")
    table.add_row(
        "optimizer step",
        f"{b.mini_prompts:,} prompts, {b.mini_samples:,} samples",
        f"{b.optimizer_steps} per rollout step; {b.per_replica:g} samples per replica (dp {parallel.dp})",
    )
    ranks = f"; {config.train.max_tokens_per_micro_batch:,} on each of {parallel.cp} ranks" if parallel.cp > 1 else ""
    table.add_row("micro-batch", f"up to {b.micro_batch_tokens:,} tokens", f"whole samples, packed{ranks}")
    for packing in b.packings:
        bubble = f"; pipeline idle {packing.bubble:.0%}" if parallel.pp > 1 else ""
        each = f"{packing.per_micro_batch} sample{'s' if packing.per_micro_batch > 1 else ''}"
        table.add_row(
            f"at {packing.tokens:,} tokens",
            f"{packing.micro_batches} micro-batches of {each}",
            f"per replica, if all are as long{bubble}",
        )
    table.add_row(
        "whole run",
        f"{b.rollout_steps:,} rollout steps, {b.total_optimizer_steps:,} optimizer steps",
        f"{b.total_samples:,} samples",
    )
    return table


def _groups(plan: Plan, hardware: Hardware, has_experts: bool) -> Table:
    table = plain_table("Groups", "size", "groups", "on nodes", "ranks", "what they share out")
    for group in plan.groups:
        if group.size == 1 or (group.of_experts and not has_experts):
            continue
        shown = ["{" + ranges(ranks) + "}" for ranks in group.ranks[:3]]
        dots = ["..."] if len(group.ranks) > 2 else []
        row = (group.name, str(group.size), str(len(group.ranks)), str(group.nodes(hardware.gpus_per_node)))
        table.add_row(*row, " ".join(shown[: 2 if max(map(len, shown)) > 12 else 3] + dots), group.purpose)
    if not table.row_count:
        table.add_row("none", "", "", "", "", "one rank")
    return table


def _smaller(config: RunConfig, plans: list[Plan], hardware: Hardware) -> Table:
    """What the trainer may go on as when nodes are lost: elastic.layouts, the best first."""
    table = plain_table(
        "Smaller layouts", "ranks", "nodes in all", "fullest rank, GiB", "free", "samples per replica", right=True
    )
    for layout, plan in zip(config.layouts[1:], plans, strict=True):
        sizes = " x ".join(f"{name} {getattr(layout, name)}" for name in ("tp", "cp", "dp", "pp"))
        free = "" if config.cluster.device == "cpu" else _gib(hardware.gpu_gib * GIB - plan.fullest)
        style = "red" if free.startswith("-") else ""
        nodes = "" if config.cluster.device == "cpu" else str(plan.nodes)
        replica = f"{plan.batches.per_replica:g}"
        table.add_row(sizes, str(plan.trainer_gpus), nodes, _gib(plan.fullest), Text(free, style=style), replica)
    return table


def _teacher(teacher: PlannedTeacher, servers: Servers | None) -> Table:
    title = f"Teacher {teacher.name}"
    if servers is None:
        table = plain_table(title, "", "")
        table.add_row("memory", "not planned", teacher.unplanned)
        return table
    return _servers(title, servers, f"concurrency {teacher.concurrency:,}")


def _servers(title: str, s: Servers, asked: str) -> Table:
    """Servers of one model; `asked`: what says how many samples all of them are given at once."""
    table = plain_table(title, "", "")
    table.add_row("weights", f"{_gib(s.weights)} GiB per GPU", f"{_gib(s.budget)} GiB for weights and cache")
    table.add_row("cache", f"{s.cache_tokens:,} tokens per server", f"{s.bytes_per_token / 1024:.0f} KiB per token and GPU")
    table.add_row("at once", f"{s.samples:,} samples of {s.longest:,} tokens per server", f"{s.samples * s.servers:,} in all")
    if s.communicators:
        count = f"{s.communicators} communicator{'s' if s.communicators > 1 else ''} on each GPU"
        table.add_row("senders", count, f"{_gib(s.communicator_bytes)} GiB, an estimate, of {_gib(s.spare)} left free")
    wait = f"; longer than {s.cache_tokens // s.asked:,} tokens each, some wait" if s.samples < s.asked else ""
    table.add_row("asked for", f"{s.asked:,} samples per server", asked + wait)
    return table


def _agents(rows: list[Row]) -> Table:
    table = plain_table("Agents", "", "")
    for row in rows:
        table.add_row(*row)
    return table


def _checkpoints(config: RunConfig, plan: Plan, hardware: Hardware) -> Table:
    saving = max((stage.saving for stage in plan.stages), key=lambda saving: saving.gathering)
    ranks = plan.ranks_on_node(hardware)
    table = plain_table("Checkpoints", "host, per rank", f"host, {ranks} ranks on a node", "GPU")
    rows = {"gathering": (saving.gathering, f"{_gib(saving.gpu)} GiB, without activations"), "writing": (saving.writing, "")}
    if config.checkpoint.memory.every:
        rows |= {"handing over": (saving.writing, ""), "two copies, kept": (saving.kept, "")}
    for name, (each, on_gpu) in rows.items():
        table.add_row(name, f"{_gib(each)} GiB", f"{_gib(ranks * each)} GiB", on_gpu)
    return table


def _host(plan: Plan, hardware: Hardware) -> Table:
    """What a node's host has to have for the ranks on it."""
    host, ranks = plan.host, plan.ranks_on_node(hardware)
    table = plain_table("Host's memory", "per rank", f"{ranks} ranks on a node")
    parts = {"offloaded optimizer": host.optimizer, "reference policy, copied teachers": host.copies, "saving": host.saving}
    for name, size in (parts | {"copies of the state": host.kept, "together": host.total}).items():
        if size:
            table.add_row(name, f"{_gib(size)} GiB", f"{_gib(ranks * size)} GiB")
    table.add_row("the host has", "", "not known: --host-gb" if hardware.host_gib is None else f"{hardware.host_gib:.1f} GiB")
    return table


def _bounds(config: RunConfig, shape: ModelShape, plan: Plan) -> Table:
    """What must be reached for the configured bounds on time to hold."""
    engine, whole = config.rollout.engine, model_parameters(shape).total * planned_run(config).element_bytes
    table = plain_table("Bounds on time", "", "at least", "seconds")
    start, request, tokens = engine.start_timeout_s, engine.request_timeout_s, config.rollout.max_response_tokens
    reading = f"{whole / GIB / start:.2g} GiB/s"
    table.add_row("start", f"{_gib(whole)} GiB, read on every node", reading, f"rollout.engine.start_timeout_s {start:,.0f}")
    asked = plan.servers.asked
    writing = f"{asked * tokens / request:,.0f} tokens/s per server"  # also where some of them wait in its queue
    size = f"{asked:,} of {tokens:,} tokens per server"
    table.add_row("generation", size, writing, f"rollout.engine.request_timeout_s {request:,.0f}")
    return table


def _verdict(config: RunConfig, plan: Plan, hardware: Hardware) -> Text:
    if config.cluster.device == "cpu":
        return Text("A run on CPUs: its memory is the host's, and is not checked.")
    free = hardware.gpu_gib - plan.fullest / GIB
    text = Text(f"Fits: the trainer's fullest GPU has {free:.1f} of {hardware.gpu_gib:g} GiB to spare.", style="green")
    return text.append(" Computed, not measured: docs/plan.md has the formulas.", style="default")


def plain_table(title: str, *columns: str, right: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right" if right or name in NUMBERS else "left")
    return table


def ranges(ranks: list[int]) -> str:
    """`0-3`, or `0 2 4 6`, or `0 4 ... 28` for more than four: ranks of a group are evenly spaced or runs of neighbours."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    even = all(b - a == step for a, b in pairwise(ranks))
    if even and step == 1 and len(ranks) > 2:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) > 4:
        return f"{ranks[0]} {ranks[1]} ... {ranks[-1]}"
    return " ".join(map(str, ranks))


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e7 else f"{count:,}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
