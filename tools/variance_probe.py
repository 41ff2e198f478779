"""Gradient variance of importance ratios by position, on held-out trajectories, with policies and data fixed.

    python tools/variance_probe.py runs/NAME                                the run's newest policy against the one before it
    python tools/variance_probe.py runs/NAME/checkpoints/step_00000008      that policy against the one before it

The behaviour policy mu samples the run's evaluation prompts several times each, through the run's own servers, tool and reward.
Training rollouts would not do: the target policy pi was fitted to them, so its ratios on them are not those of fresh data.
Both policies are then read with transformers in float32, which leaves out how servers and trainer round; the servers' own
log-probs serve to prove that the trajectories are mu's.

The variance at a position is the trace of the covariance, over the trajectories that reach it, of the gradient with respect to
the output layer: exact and cheap (tools/gradient_variance.py). Positions count policy tokens only, as CTPO
does. Intervals come from resampling whole prompts, since a prompt's trajectories share the baseline of their advantages; the
ratio of two variances is taken within a resample. docs/variance.md says how to read the result.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gradient_variance as gv
import torch
import typer
from torch import Tensor
from variance_report import plot, show

from ctpo_megatron.algorithms import group_advantages
from ctpo_megatron.checkpoints.files import MANIFEST, STEP_NAME
from ctpo_megatron.cluster.ray_token import require_token
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.data.samples import build_sample
from ctpo_megatron.errors import CtpoError, DataError, InputError, MismatchError
from ctpo_megatron.record import write_summary
from ctpo_megatron.record.trajectories import as_row
from ctpo_megatron.types import TrainSample, Turn

MIN_PROMPTS = 10  # that reach a position, for an interval to mean something
FORWARD_TOKENS = 16_384  # of one forward pass, padding included
LOGITS = 2**25  # held at a time


def main(
    source: Annotated[Path, typer.Argument(help="target policy: RUN, RUN/model or RUN/checkpoints/step_XXXXXXXX")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value on top of the run's configuration")] = None,
    behaviour: Annotated[Path | None, typer.Option(help="checkpoint or model; default: the next older one")] = None,
    trajectories: Annotated[Path | None, typer.Option(help="use these of the behaviour policy, sample none")] = None,
    prompts: Annotated[int, typer.Option(min=MIN_PROMPTS, help="held-out prompts; fewer where the file has fewer")] = 128,
    samples: Annotated[int, typer.Option(min=2, help="trajectories per prompt")] = 8,
    positions: Annotated[int, typer.Option(min=1, help="at most so many per bin, evenly spread")] = 32,
    resamples: Annotated[int, typer.Option(min=1, help="of the bootstrap")] = 2000,
    seed: Annotated[int, typer.Option(help="of the bootstrap; sampling uses the run's")] = 1,
    out: Annotated[Path | None, typer.Option(help="directory for the results; default: RUN/variance")] = None,
) -> None:
    """Print the table; write variance.json, variance.png and trajectories.jsonl."""
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError("matplotlib is not installed, and the plot needs it: pip install 'ctpo_megatron[dev]'")
        pair = find_policies(source, behaviour, overrides or [])
        out = out or pair.run_dir / "variance"
        target, mu, sampled = asyncio.run(prepare(pair, trajectories, out, prompts=prompts, samples=samples))
        packed = read_trajectories(sampled)
        bins = gv.position_bins(gv.last_position(packed.position, packed.prompt, MIN_PROMPTS), positions)
        result = measure(pair, target, mu, packed, bins, gv.bootstrap_draws(packed.prompts, resamples, seed))
    except CtpoError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    write_summary(out, result, name="variance.json")
    show(result)
    plot(result, out / "variance.png")
    print(f"{out / 'variance.json'}  {out / 'variance.png'}  {sampled}")


@dataclass(frozen=True)
class Pair:
    """Both policies, each a model directory in Hugging Face format or a checkpoint, and the run they are of."""

    run_dir: Path
    config: RunConfig
    target: Path
    behaviour: Path


def find_policies(source: Path, behaviour: Path | None, overrides: list[str]) -> Pair:
    """The policies that `source` and `behaviour` mean. Raises InputError where there is no run, or no older policy in it."""
    run_dir = next((place for place in (source, source.parent, source.parent.parent) if (place / "config.yaml").is_file()), None)
    if run_dir is None:
        raise InputError(f"{source}: neither a run (a directory with config.yaml) nor a checkpoint or model inside one")
    config = load_config(run_dir / "config.yaml", overrides)
    known, exported = {0: Path(config.model.path)}, run_dir / "model"
    for manifest in run_dir.glob(f"checkpoints/step_*/{MANIFEST}"):
        if name := STEP_NAME.fullmatch(manifest.parent.name):
            known[int(name[1])] = manifest.parent
    if (exported / "config.json").is_file() and (run_dir / "summary.json").is_file():
        last = json.loads((run_dir / "summary.json").read_text())["steps"]
        source = exported if source == known.get(last) else source  # the same weights
        known[last] = exported
    step = max(known) if source == run_dir else next((step for step, path in known.items() if path == source), None)
    if step is None:
        raise InputError(f"{source}: not a policy of this run; it has {', '.join(str(known[s]) for s in sorted(known))}")
    older = [s for s in known if s < step]
    if behaviour is None and not older:
        raise InputError(f"{source}: the run has no older policy; give one with --behaviour")
    return Pair(run_dir, config, known[step], behaviour or known[max(older)])


async def prepare(pair: Pair, trajectories: Path | None, out: Path, *, prompts: int, samples: int) -> tuple[Path, Path, Path]:
    """Target and behaviour policy as model directories, and the file with the trajectories."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    roles = {pair.target: "target", pair.behaviour: "behaviour"}
    exports = {path: out / "policies" / role for path, role in roles.items() if (path / MANIFEST).is_file()}
    if trajectories is None and pair.config.data.eval is None:
        raise InputError("the run has no held-out prompts; give some with data.eval=FILE")
    if exports or trajectories is None:
        require_token()
    if exports:
        await export(pair.config, exports, out)
    target, behaviour = (exports.get(path, path) for path in (pair.target, pair.behaviour))
    if trajectories is None:
        trajectories = out / "trajectories.jsonl"
        await sample(pair.config, behaviour, trajectories, out, prompts=prompts, samples=samples)
    return target, behaviour, trajectories


async def export(config: RunConfig, targets: dict[Path, Path], out: Path) -> None:
    """Write checkpoints as model directories: `targets` maps the one to the other."""
    from ctpo_megatron.cluster.runtime import Runtime
    from ctpo_megatron.jobs.inputs import read_model
    from ctpo_megatron.jobs.topology import topology_of

    steps, shape = config.train.steps * config.train.optimizer_steps, read_model(config)
    async with Runtime(config, shape, topology_of(config, engines=False), out.resolve(), total_steps=steps) as runtime:
        for checkpoint, directory in targets.items():
            await runtime.guard(runtime.trainer.load(checkpoint.resolve()))
            await runtime.guard(runtime.trainer.save_hf(directory.resolve()))


async def sample(config: RunConfig, model: Path, file: Path, out: Path, *, prompts: int, samples: int) -> None:
    """Sample the held-out prompts at the run's training temperature, into a file like those in RUN/rollouts."""
    from ctpo_megatron.cluster.runtime import Runtime
    from ctpo_megatron.config.evaluation import BenchmarkSettings
    from ctpo_megatron.jobs.inputs import load_prompts, read_model
    from ctpo_megatron.jobs.rollouts import open_rollouts
    from ctpo_megatron.jobs.topology import topology_of
    from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
    from ctpo_megatron.rollout.chat import ChatTokenizer
    from ctpo_megatron.rollout.tools import make_tool

    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model)})})
    shape = read_model(config)
    chat = ChatTokenizer(config.model.path, config.model)
    if config.data.eval is None:
        raise InputError("the run has no held-out prompts; give some with data.eval=FILE")
    held_out, tool = load_prompts(config.data.eval, config, chat), make_tool(config.rollout.tool)
    rollout = config.rollout
    settings = BenchmarkSettings(
        "held_out", config.data.eval, 0, prompts, samples, rollout.temperature, rollout.max_turns, rollout.max_response_tokens
    )
    async with (
        Runtime(config, shape, topology_of(config, trainer=False), out.resolve()) as runtime,
        open_rollouts(runtime, chat, tool) as rollouts,
    ):
        evaluator = Evaluator(rollouts.rollouter, rollouts.grader, config.seed)
        result = await runtime.guard(evaluator.evaluate([Benchmark(settings, held_out)], step=0))
    found = [as_row(group.prompt, each) for group in result.groups for each in group.trajectories]
    file.write_text("".join(json.dumps(each) + "\n" for each in found))


@dataclass(frozen=True)
class Packed:
    """The M policy tokens of N trajectories, one trajectory after another; prompt and tool tokens are left out."""

    samples: list[TrainSample]
    rewards: list[float]  # of the trajectories
    lengths: Tensor  # [N]
    position: Tensor  # [M], from 1
    prompt: Tensor  # [M], number of the token's prompt
    labels: Tensor  # [M]
    advantages: Tensor  # [M] float64
    engine_logp: Tensor  # [M] float64

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return self.samples[-1].group + 1


def read_trajectories(path: Path) -> Packed:
    """The trajectories of a .jsonl file, by prompt, with GRPO's advantages (reward less mean, by standard deviation).

    Raises DataError where there are too few prompts or attempts, or where no prompt was answered both right and wrong.
    """
    attempts: dict[int, list[dict[str, Any]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            attempts.setdefault(record["prompt_index"], []).append(record)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a file of trajectories as runs write them ({error})") from error
    fewest = min(map(len, attempts.values()), default=0)
    if len(attempts) < MIN_PROMPTS or fewest < 2:
        raise DataError(f"{path}: {len(attempts)} prompts, {fewest} attempts at one; needed: {MIN_PROMPTS} or more, 2 or more")
    samples, rewards = [], []
    for number, (_, records) in enumerate(sorted(attempts.items())):
        rewards += [record["reward"] for record in records]
        for record, advantage in zip(records, group_advantages(rewards[-len(records) :]), strict=True):
            samples.append(build_sample(record["prompt_ids"], [Turn(**turn) for turn in record["turns"]], advantage, number))
    if not any(any(sample.advantages) for sample in samples):
        raise DataError(f"{path}: all attempts at each prompt got the same reward, so every gradient is zero; use other prompts")
    return pack(samples, rewards)


def pack(samples: list[TrainSample], rewards: list[float]) -> Packed:
    """The policy tokens of `samples`, which are in the order of their groups."""

    def stream(name: str, dtype: torch.dtype) -> Tensor:
        values = (v for s in samples for v, wrote in zip(getattr(s, name), s.mask, strict=True) if wrote)
        return torch.tensor(list(values), dtype=dtype)

    lengths = torch.tensor([sum(sample.mask) for sample in samples])
    return Packed(
        samples=samples,
        rewards=rewards,
        lengths=lengths,
        position=torch.cat([torch.arange(1, length + 1) for length in lengths.tolist()]),
        prompt=torch.tensor([sample.group for sample in samples]).repeat_interleave(lengths),
        labels=stream("labels", torch.int64),
        advantages=stream("advantages", torch.float64),
        engine_logp=stream("rollout_logp", torch.float64),
    )


@dataclass(frozen=True)
class Reading:
    """A policy's view of the packed tokens."""

    logp: Tensor  # [M] float64, at the sampling temperature
    hidden: Tensor  # [K, H] last hidden states of the kept tokens
    head: torch.nn.Linear  # output layer, [n, H] -> [n, V]; still on the device


@torch.no_grad()
def read_policy(path: Path, packed: Packed, temperature: float, keep: Tensor | None = None) -> Reading:
    """Teacher forcing of a model directory. `keep` [M] bool: of which tokens the hidden states are wanted."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
    head = model.get_output_embeddings()
    logps, hidden, first = [], [], 0
    for batch in batches(packed.samples):
        width = max(map(len, batch))
        ids = torch.tensor([s.input_ids + [0] * (width - len(s)) for s in batch], device=device)
        wrote = torch.tensor([s.mask + [False] * (width - len(s)) for s in batch], device=device)
        rows = model.base_model(input_ids=ids).last_hidden_state[wrote]  # padding comes last: causal attention never sees it
        labels = packed.labels[first : first + len(rows)].to(device)
        for part, label in zip(*(x.split(max(1, LOGITS // head.weight.shape[0])) for x in (rows, labels)), strict=True):
            logps.append(torch.log_softmax(head(part).double() / temperature, -1).gather(1, label[:, None])[:, 0].cpu())
        if keep is not None:
            hidden.append(rows[keep[first : first + len(rows)].to(device)].cpu())
        first += len(rows)
    return Reading(torch.cat(logps), torch.cat(hidden) if hidden else torch.empty(0), head)


def batches(samples: Sequence[TrainSample]) -> Iterator[list[TrainSample]]:
    """`samples` in order, cut so that a padded batch holds at most FORWARD_TOKENS tokens (or one sample)."""
    batch: list[TrainSample] = []
    for sample in samples:
        if batch and max(map(len, [*batch, sample])) * (len(batch) + 1) > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def check_behaviour(engine_logp: Tensor, logp: Tensor, config: RunConfig) -> dict[str, float]:
    """Largest and mean distance between what the servers said and what the behaviour policy says.

    Raises MismatchError where the run's own bounds (drift.max, drift.mean, as numbers) are passed; NaN passes every bound.
    """
    gap = (engine_logp - logp).abs()
    found = {"max": float(gap.max()), "mean": float(gap.mean())}
    for kind, value in found.items():
        bound = getattr(config.drift, kind)
        if isinstance(bound, float) and not value <= bound:
            raise MismatchError(
                f"these trajectories are not the behaviour policy's: {kind} |difference of log-probs| is {value:.3g}, "
                f"drift.{kind} allows {bound:.3g}. Was another policy or another rollout.temperature used to sample them?"
            )
    return found


def measure(pair: Pair, target: Path, behaviour: Path, packed: Packed, bins: list[gv.Bin], draws: Tensor) -> dict[str, Any]:
    """Content of variance.json."""
    config, temperature = pair.config, pair.config.rollout.temperature
    objective = config.algorithm.objective
    clipped = objective if objective.type == "ctpo" and objective.ratio == "cumulative" else {"type": "ctpo"}
    keep = torch.isin(packed.position, torch.tensor([t for each in bins for t in each.positions]))
    old = read_policy(behaviour, packed, temperature)
    drift = check_behaviour(packed.engine_logp, old.logp, config)
    new = read_policy(target, packed, temperature, keep)
    log_ratio = gv.prefix_log_ratios(new.logp, old.logp, packed.lengths)[keep]
    scales = gv.gradient_scales(new.logp, old.logp, packed.advantages, packed.lengths, clipped)[:, keep]
    position, prompt, labels = packed.position[keep], packed.prompt[keep], packed.labels[keep]
    device = new.head.weight.device
    by_bin, by_position = [], []
    for each in bins:
        squares, freedom, norms = torch.zeros(()), torch.zeros(()), []
        for t in each.positions:
            here = (position == t).nonzero()[:, 0]
            kernel = gv.gradient_kernel(new.hidden[here].to(device), labels[here].to(device), new.head, temperature).cpu()
            more, count = gv.scatter(kernel, scales[:, here], prompt[here], draws)
            squares, freedom = squares + more, freedom + count
            norms.append(kernel.diagonal() * scales[0, here].square())
            values = dict(zip(gv.ESTIMATORS, (more[:, 0] / count[0]).tolist(), strict=True))
            by_position.append({"position": t, "tokens": len(here), "variance": values})
        inside = torch.isin(position, torch.tensor(each.positions))
        about: dict[str, float] = {"first": each.first, "last": each.last, "positions": len(each.positions)}
        about |= {"tokens": int(inside.sum())}
        about |= {"effective_tokens": gv.effective_number(torch.cat(norms)), "prompts": len(prompt[inside].unique())}
        about |= {"log_ratio_rms": float(log_ratio[inside].square().mean().sqrt())}
        by_bin.append(about | gv.intervals(squares / freedom))
    return {
        "target": str(pair.target),
        "behaviour": str(pair.behaviour),
        "prompts": packed.prompts,
        "trajectories": len(packed.samples),
        "reward": sum(packed.rewards) / len(packed.rewards),
        "drift": drift,
        "bins": by_bin,
        "by_position": by_position,
    }


if __name__ == "__main__":
    typer.run(main)
