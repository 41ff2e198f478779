"""The `ctpo` command. Exit codes: 0 done; 1 the run failed; 2 the input cannot be used; 75 stopped in order, to go on with
`--resume auto`; 130, 143 ended by Ctrl-C, SIGTERM.

An error is one message. `--debug`, anywhere on the command line, shows the traceback too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ctpo_megatron.cli_models import at_home, checkpoint_app, convert_app
from ctpo_megatron.cli_runs import alarms, ledger, report, watch
from ctpo_megatron.cluster.ray_token import require_token
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.nursery import Nursery
from ctpo_megatron.errors import BeginAgain, ConfigError, StoppedInOrder, told
from ctpo_megatron.imports import modules_stay
from ctpo_megatron.jobs.children import end_children
from ctpo_megatron.jobs.early import opened_nursery
from ctpo_megatron.jobs.serving import serve_sandbox
from ctpo_megatron.jobs.stop import StopSignal

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

DEBUG = "--debug"
RESUME = "--resume"
SITE_FILE = Path(typer.get_app_dir("ctpo")) / "site.yaml"  # what this user's cluster wants of every job
ERROR_FILE = "error.log"  # in RUN_DIR/logs: the traceback of what ended the run

Config = Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False, callback=at_home)]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, applied in order", show_default=False)]

Resuming = Annotated[
    Literal["no", "newest", "auto"],
    typer.Option(
        RESUME,
        metavar="[auto]",
        help="go on from the newest checkpoint of the run directory; auto: from whatever is there, also where nothing is",
        show_default=False,
    ),
]


@app.callback()
def options(
    _debug: Annotated[bool, typer.Option(DEBUG, help="show the traceback of an error; may stand anywhere")] = False,
) -> None:
    """Options of every command; `main` looks at them."""


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Resuming = "no",
) -> None:
    """Reinforcement learning: rollouts, CTPO, publication of weights, until train.steps."""
    loaded = _load(config, overrides)
    with opened_nursery(loaded) as nursery:
        with modules_stay():
            from ctpo_megatron.jobs.train import train_job

        _run(loaded, lambda stop: train_job(loaded, stop, resume=resume, nursery=nursery), nursery)


@app.command()
def sft(
    config: Config,
    overrides: Overrides = None,
    resume: Resuming = "no",
) -> None:
    """Supervised training on demonstrations (data.train with a `messages` column); writes a Hugging Face model."""
    loaded = _load(config, overrides)
    with modules_stay():
        from ctpo_megatron.jobs.sft import sft_job

    _run(loaded, lambda stop: sft_job(loaded, stop, resume=resume))


@app.command("eval")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    anew: Annotated[bool, typer.Option("--anew", help="sample all again, also what an earlier command has sampled")] = False,
) -> None:
    """avg@k, pass@k and maj@k of model.path on data.eval and eval.benchmarks, through SGLang. The same command goes on from an
    end before its time."""
    loaded = _load(config, overrides)
    with opened_nursery(loaded.without_trainer) as nursery:
        with modules_stay():
            from ctpo_megatron.jobs.evaluate import eval_job

        _run(loaded, lambda _stop: eval_job(loaded, anew=anew, nursery=nursery), nursery)


@app.command("serve-agents")
def serve_agents(config: Config, overrides: Overrides = None) -> None:
    """Serve model.path to agents from elsewhere, for which attempts are opened one by one, until a signal; what is sampled
    is kept with rewards in RUN_DIR/rollouts/agents.jsonl. The same command goes on with the attempts that are open."""
    loaded = _load(config, overrides)
    from ctpo_megatron.jobs.serve_agents import serve_agents_job

    _run(loaded, lambda stop: serve_agents_job(loaded, stop))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpu_gb: Annotated[float, typer.Option(min=1, help="memory of a GPU")] = 80.0,
    engine_gpu_gb: Annotated[float | None, typer.Option(min=1, help="of the servers' GPUs, where they differ")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="of the cluster's nodes")] = 8,
    host_gb: Annotated[float | None, typer.Option(min=1, help="memory of a node's host; default: not compared")] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="config.json of the model; default: that of model.path", callback=at_home)
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="take one step of one rank without memory")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="to rehearse; default: the first of the fullest stage")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="steps per hour too, from a run on a virtual clock")] = False,
    option: Annotated[list[str] | None, typer.Option("--with", help="of that: key=value, like run=RUN_DIR")] = None,
) -> None:
    """Memory, batches and groups of a run, from the configuration alone; exit code 2 when it cannot fit."""
    from ctpo_megatron.config.load import load_config
    from ctpo_megatron.jobs.plan import plan_job
    from ctpo_megatron.planning.plan import Hardware
    from ctpo_megatron.simulation.options import read_options

    hardware, loaded = Hardware(gpu_gb, engine_gpu_gb, gpus_per_node, host_gb), load_config(config, overrides or [])
    if rank is not None and not rehearse:
        raise ConfigError("--rank says which rank to rehearse; give --rehearse too.")
    options = read_options(option or [], asked=simulate)
    plan_job(loaded, config, model_config, hardware)
    if rehearse:
        from ctpo_megatron.jobs.rehearse import rehearse_job

        rehearse_job(loaded, config, model_config, rank)
    if simulate:
        from ctpo_megatron.jobs.simulate import simulate_job

        simulate_job(loaded, config, model_config, hardware, options)


@app.command()
def data(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="rows to show as the model sees them")] = 2,
    use: Annotated[
        Literal["train", "sft"] | None, typer.Option("--as", help="the command that is to read it; default: told by the columns")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print all that was found as JSON, and nothing else")] = False,
) -> None:
    """What a run would train on: rows, lengths, duplicates, known answers, samples as the model sees them; exit code 2 when it
    would be refused."""
    from ctpo_megatron.config.load import load_config
    from ctpo_megatron.jobs.data import data_job

    data_job(load_config(config, overrides or []), config, use=use, samples=samples, as_json=as_json)


app.add_typer(convert_app, name="convert")
app.add_typer(checkpoint_app, name="checkpoint")


@app.command()
def replay(
    dump: Annotated[
        Path, typer.Argument(help="RUN_DIR/dumps/step_*: a step that was not applied", show_default=False, callback=at_home)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="parallel.tp=2 ..., model.dtype=float32, cluster.device=cuda")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print all that was found as JSON, and nothing else")] = False,
) -> None:
    """Run a step with a non-finite loss or gradient again, at any layout, and say where the first such value arises; exit code 0
    where it is found or the step is finite here, 2 when the dump cannot be used."""
    from ctpo_megatron.jobs.replay import replay_job

    replay_job(dump, overrides or [], as_json=as_json)


app.command("serve-sandbox")(serve_sandbox)
for looks_at_a_run in (ledger, alarms, report, watch):
    app.command()(looks_at_a_run)


@app.command()
def doctor() -> None:
    """What this host has and lacks for a run; exit code 1 when a run cannot work here."""
    from ctpo_megatron.doctor import doctor_job

    raise typer.Exit(doctor_job())


@app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    submit: Annotated[bool, typer.Option("--submit", help="send it to SLURM, and say the job's id")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show job file, resolved configuration and plan")] = False,
    site: Annotated[
        Path | None,
        typer.Option(help=f"YAML file of the site's options; default: {SITE_FILE}", callback=at_home),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="without spare ones; default: as many as the configuration needs")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="of the partition's nodes; default: 8")] = None,
    time: Annotated[str | None, typer.Option(help="limit, as sbatch takes it; 24:00:00")] = None,
    partition: Annotated[str | None, typer.Option(help="default: the cluster's")] = None,
    account: Annotated[str | None, typer.Option(help="default: yours")] = None,
    qos: Annotated[str | None, typer.Option(help="quality of service")] = None,
    reservation: Annotated[str | None, typer.Option(help="name of one")] = None,
    spare_nodes: Annotated[int | None, typer.Option(help="to have beside those that the run needs")] = None,
    constraint: Annotated[str | None, typer.Option(help="features of the nodes")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="any other of the site's options: key=value, like signal_lead=900")
    ] = None,
) -> None:
    """Print a job file for SLURM that runs `ctpo train` on this configuration, requeues it and goes on; or submit it."""
    from ctpo_megatron.config.load import load_config
    from ctpo_megatron.config.sources import read_overrides
    from ctpo_megatron.jobs import slurm as job
    from ctpo_megatron.slurm.site import read_site

    if submit and dry_run:
        raise ConfigError("--submit sends the job, --dry-run does not; give one of them")
    named = {"gpus_per_node": gpus_per_node, "time": time, "partition": partition, "account": account}
    named |= {"qos": qos, "reservation": reservation, "constraint": constraint, "spare_nodes": spare_nodes}
    given = read_overrides(option or []).values | {key: value for key, value in named.items() if value is not None}
    source = site or (SITE_FILE if SITE_FILE.is_file() else None)
    options, loaded, words = read_site(source, given), load_config(config, overrides or []), overrides or []
    job.say_site(source, SITE_FILE)
    text = job.job_text(loaded, config, words, nodes, options, source)
    if dry_run:
        job.dry_run(loaded, config, text, options)
    elif submit:
        print(f"submitted: job {job.submit(text)}; `squeue -j` and slurm-<id>.out in this directory tell how it goes")
    else:
        print(text, end="")


@app.command()
def preflight(
    config: Config,
    overrides: Overrides = None,
    task: Annotated[bool, typer.Option("--task", hidden=True, help="this is one node's part, started by srun")] = False,
    meet: Annotated[str, typer.Option(hidden=True, help="HOST:PORT where the nodes' parts meet")] = "",
    ray: Annotated[str, typer.Option(hidden=True, help="HOST:PORT where Ray is going to listen")] = "",
    hosts: Annotated[str, typer.Option(hidden=True, help="the nodes' names")] = "",
) -> None:
    """Whether the nodes of this job can start a run; outside of a job, this machine. Exit code 2 names what is in the way."""
    from ctpo_megatron.config.load import load_config
    from ctpo_megatron.jobs.preflight import preflight_by_hand, preflight_task, this_machine
    from ctpo_megatron.slurm.allocation import allocation
    from ctpo_megatron.slurm.preflight.task import Task

    rank = int(os.environ.get("SLURM_PROCID", "0")) if task else 0
    try:
        loaded = load_config(config, overrides or [])
    except ConfigError:
        if rank == 0:
            raise
        raise typer.Exit(ConfigError.exit_code) from None  # the first node's part has said it
    if task:
        raise typer.Exit(preflight_task(loaded, Task(meet, ray, rank, hosts.split(","))))
    job = allocation(os.environ)
    if job is None:
        raise typer.Exit(preflight_task(loaded, this_machine()))
    raise typer.Exit(preflight_by_hand(job, [str(config), *(overrides or [])]))


def _load(path: Path, overrides: list[str] | None) -> RunConfig:
    """The configuration. Called before Ray is imported, which is when Ray reads who may use a cluster that it starts."""
    from ctpo_megatron.config.load import load_config

    config = load_config(path, overrides or [])
    if config.cluster.address is None:
        require_token()
    return config


def _run(config: RunConfig, job: Callable[[StopSignal], Coroutine[Any, Any, None]], nursery: Nursery | None = None) -> None:
    """Run a job to its end. A signal is the job's to answer, if it listens; otherwise, and the second time, it is cancelled.

    A cancelled job ends its processes first. What a run failed of is written with its traceback to RUN_DIR/logs/error.log, where
    that directory is there already.
    """
    received: list[int] = []
    stop = StopSignal()

    def hear(task: asyncio.Task[None], number: int) -> None:
        received.append(number)
        name = signal.Signals(number).name
        if len(received) == 1 and stop.tell(name):
            again = "; the same again ends it at once" if number == signal.SIGINT else ""
            print(f"{name}: stopping in order{again} ...", file=sys.stderr, flush=True)
        elif not task.cancelling():  # a further signal must not interrupt the cleaning up
            print(f"{name}: ending the run's processes ...", file=sys.stderr, flush=True)
            task.cancel()

    async def with_signals() -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(job(stop))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, hear, task, number)
        await task

    try:
        asyncio.run(with_signals())
    except asyncio.CancelledError:
        raise typer.Exit(128 + received[0]) from None
    except StoppedInOrder as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None
    except BeginAgain as error:
        print(error, file=sys.stderr, flush=True)
        if nursery is not None:
            nursery.close()  # the same command starts another one
        _begin_again()
    except Exception as error:
        if told(error)[1] == 1:
            with contextlib.suppress(OSError):  # no directory yet, or no room for more
                file = Path(config.run_dir) / "logs" / ERROR_FILE
                with file.open("a", encoding="utf-8") as log:  # behind those of earlier attempts
                    log.write(f"{''.join(traceback.format_exception(error))}--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
        raise


def _begin_again() -> None:
    """Replace this process by the same command, which goes on from what the run directory holds. Does not return."""
    end_children()
    words = [word for word in _with_mode(sys.argv[1:]) if not word.startswith(RESUME)]
    os.execv(sys.executable, [sys.executable, "-m", "ctpo_megatron.cli", *words, RESUME, "auto"])


def _with_mode(words: list[str]) -> list[str]:
    """Returns the command line with `--resume` and `--resume auto` as one word each: what follows may be an override."""
    joined: list[str] = []
    for word in words:
        if word == "auto" and joined and joined[-1] == f"{RESUME}=newest":
            joined[-1] = f"{RESUME}=auto"
        else:
            joined.append(f"{RESUME}=newest" if word == RESUME else word)
    return joined


def main() -> None:
    """Entry point: whatever goes wrong becomes one message on stderr and an exit code; `--debug` shows where."""
    words = [word for word in sys.argv[1:] if word != DEBUG]
    debug = len(words) < len(sys.argv) - 1
    try:
        app(_with_mode(words))
    except Exception as error:  # noqa: BLE001 - the last place where it can be told
        if debug:
            traceback.print_exception(error)
        message, code = told(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
