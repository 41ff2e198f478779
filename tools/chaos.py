"""A run that is struck again and again: signals to each of its processes in each of its phases, and what came of it.

A small model is taught the form of answers, then trained with rewards while one process after the other is killed or stopped. The
command is started again as launch/ctpo.sbatch does it. In the end the run has to be done, with every group trained once, the
reward risen, no process left and nothing in shared memory; the table says how soon each fault was seen and mended.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
from chaos_faults import CALLED, RANKS, SERVERS, Fault, draw
from chaos_report import Struck, proofs, show
from chaos_run import Run
from commands import ROOT, ctpo, python
from leftovers import shared_memory
from run_ledger import Sizes

from ctpo_megatron.rollout.rewards.math import quick_verdict

START_S = 240.0
PHASE_S = 90.0  # for the run to come into a phase
SEEN_S = 60.0
MENDED_S = 240.0
LONGEST_START_S = 12.0  # after which a fault at the start strikes
EVALUATE_EVERY, SAVE_EVERY = 5, 2
PROMPTS, GROUP = 8, 8


def main(
    seed: Annotated[int, typer.Option(help="of the faults, the data and the training")] = 1,
    faults: Annotated[int, typer.Option(help="how many; 41 or more strike every kind of process in every phase")] = 44,
    steps: Annotated[int, typer.Option(help="training steps: each fault takes two or three")] = 150,
    run_dir: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/chaos"),
    taught: Annotated[bool, typer.Option(help="teach the model first, and want the reward to rise")] = True,
    model: Annotated[Path | None, typer.Option(help="sft/model of an earlier chaos run, instead of teaching anew")] = None,
) -> None:
    """Strike a run; exit code 0 where everything holds."""
    if run_dir.exists():
        if not (run_dir / "data" / "train.parquet").is_file():
            raise typer.BadParameter(f"{run_dir} exists and is not of an earlier chaos run; give another", param_hint="--run-dir")
        shutil.rmtree(run_dir)
    begun, memory = time.monotonic(), shared_memory()
    words = prepare(run_dir.absolute(), seed, taught=taught, model=model)
    run = Run([*words, f"train.steps={steps}"], run_dir.absolute() / "run", EVALUATE_EVERY, SAVE_EVERY)
    rng = random.Random(seed)
    struck: list[Struck] = []
    try:
        run.start()
        for number, fault in enumerate(draw(seed, faults), 1):
            found = strike(run, fault, rng)
            print(f"{number:3d}/{faults}  {time.monotonic() - begun:5.0f} s  {found.sentence}", flush=True)
            struck.append(found)
            if run.done or run.failed:
                break
        run.wait(lambda: False, MENDED_S + steps * 10.0)
        held = proofs(run, struck, Sizes(steps, PROMPTS, GROUP), memory, rises=taught)
    finally:
        run.end()
    held[f"{faults} faults"] = (len(struck) == faults, f"{len(struck)}")
    report = show(struck, held, time.monotonic() - begun, run)
    (run_dir / "chaos.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if all(ok for ok, _ in held.values()) else 1)


def prepare(root: Path, seed: int, *, taught: bool, model: Path | None) -> list[str]:
    """Make data and a model below `root`; returns the words of `ctpo train`."""
    data, base = root / "data", root / "base"
    python(ROOT / "tools" / "make_toy_data.py", data, "--seed", seed, "--train-rows", 4000, "--eval-rows", 64)
    for name in ("train", "eval"):
        hide_answers(data / f"{name}.parquet")
    if model is None:
        python(ROOT / "tools" / "make_toy_model.py", base, "--seed", seed)
        model = base
    if taught and model == base:
        given = (f"seed={seed}", f"run_dir={root}/sft", f"model.path={base}", f"data.train={data}/sft.parquet")
        ctpo("sft", "quickstart_sft.yaml", *given)
        model = root / "sft" / "model"
    sizes = [f"train.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}", "train.optimizer_steps=2", "eval.prompts=32"]
    keep = [f"checkpoint.every={SAVE_EVERY}", f"eval.every={EVALUATE_EVERY}", "checkpoint.keep=2", "log.save_rollouts=true"]
    last = ["parallel.dp=2", "rollout.engine.restarts=1000", "optimizer.schedule=constant", f"seed={seed}"]
    paths = [
        f"run_dir={root}/run",
        f"model.path={model.absolute()}",
        f"data.train={data}/train.parquet",
        f"data.eval={data}/eval.parquet",
    ]
    return [str(ROOT / "configs" / "quickstart.yaml"), *sizes, *keep, *last, *paths]


def hide_answers(file: Path) -> None:
    """Write every second answer as a fraction: whether it equals the model's is then a judge's question."""
    table = pq.read_table(file)
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows[::2]:
        truth = row["reward_model"]
        truth["ground_truth"] = rf"\frac{{{2 * int(truth['ground_truth'])}}}{{2}}"
    assert quick_verdict(rows[0]["reward_model"]["ground_truth"], "7") is None, "a judge is asked"
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), file)


def strike(run: Run, fault: Fault, rng: random.Random) -> Struck:
    """Bring the run into the phase, send the signal, and see the run come back."""
    if fault.phase == "start":
        await_start(run, rng)
    elif run.wait(lambda: run.is_in("rollout") or run.is_in("training"), START_S) is None:
        return Struck(fault)
    if fault.phase == "stopping":
        run.driver.send_signal(10)  # SIGUSR1
    starts, at = run.starts, run.wait(lambda: run.strike(fault) if run.is_in(fault.phase) else None, PHASE_S)
    if at is None:
        return Struck(fault)
    if fault.kind in CALLED:
        return Struck(fault, at, stepped=_stepped(run, at))
    seen = run.wait(lambda: _seen(run, fault, at, starts), SEEN_S)
    mended = run.wait(lambda: _mended(run, fault, at), MENDED_S) if seen else None
    return Struck(fault, at, seen, mended, _stepped(run, mended or at))


def await_start(run: Run, rng: random.Random) -> None:
    """Wait until the command is starting, for some seconds; one that trains is asked to stop, and comes again."""
    if not run.is_in("start"):
        run.driver.send_signal(10)
        run.wait(lambda: run.is_in("start"), START_S)
    until = time.monotonic() + rng.uniform(0.5, LONGEST_START_S)
    run.wait(lambda: time.monotonic() > until or not run.is_in("start"), LONGEST_START_S)


def _seen(run: Run, fault: Fault, at: float, starts: int) -> float | None:
    """Returns when the run, or whoever started it, noticed."""
    names = ["part lost", "incarnation ended", "incarnation began"]
    names += ["trainer restarting"] if fault.kind in RANKS else []
    names += ["server lost"] if fault.kind in SERVERS else []
    names += ["stop requested"] if fault.kind == "GCS" and fault.phase != "stopping" else []
    names += ["stall"] if fault.by == "STOP" else []
    event = run.event_after(at, tuple(names))
    if event is not None:
        return float(event["time"])
    run.attend()
    return time.time() if run.starts > starts else None


def _mended(run: Run, fault: Fault, at: float) -> float | None:
    """Returns when what was struck was back."""
    names = ["ready"]
    if fault.kind in RANKS:
        names.append("trainer restarted")
    if fault.kind in SERVERS:
        names.append("server serving")
    event = run.event_after(at, tuple(names))
    return None if event is None else float(event["time"])


def _stepped(run: Run, since: float) -> float | None:
    event = run.wait(lambda: run.event_after(since, ("step",)), MENDED_S)
    return None if event is None else float(event["time"])


if __name__ == "__main__":
    typer.run(main)
