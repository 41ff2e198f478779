"""Demonstrations on real ranks: packed ones at every axis against transformers, and a run that is gone on with."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import TokenMean
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.data.samples import build_sample
from ctpo_megatron.jobs.sft_start import checkpoint_of_sft, sft_start
from ctpo_megatron.loop.checkpoints import Checkpoints, restore
from ctpo_megatron.loop.sft import SftLoop, SftResult
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.record.events import discard
from ctpo_megatron.record.values import Values, scalar
from ctpo_megatron.types import TrainSample, Turn
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import VOCAB, write_model

pytestmark = pytest.mark.dist

LAYOUTS: list[dict[str, int]] = [{"cp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2}]
MAX_TOKENS = 48
AGREEMENT = 1e-5


def demonstrations() -> list[TrainSample]:
    """Of uneven lengths, with one to three answers, of which some have a tool's output between."""
    rng = np.random.default_rng(3)

    def ids(most: int) -> list[int]:
        return rng.integers(0, VOCAB, int(rng.integers(1, most))).tolist()

    def turn(role: Any) -> Turn:
        own = ids(9)
        return Turn(role, own, [0.0] * len(own), [-1] * len(own))

    return [
        build_sample(ids(12), [turn(role) for role in ("assistant", "tool") * 3][: 1 + 2 * (n % 3)], 1.0, n) for n in range(9)
    ]


def by_transformers(path: Path) -> tuple[float, int, float]:
    """Mean loss over taught tokens, how many these are, and the norm of its gradient; one demonstration at a time."""
    from transformers import AutoModelForCausalLM

    model, total, count = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), torch.zeros(()), 0
    for each in demonstrations():
        logp = model(torch.tensor([each.input_ids])).logits[0].log_softmax(-1)
        taught = torch.tensor(each.mask)
        total = total - logp.gather(-1, torch.tensor(each.labels)[:, None]).squeeze(-1)[taught].sum()
        count += int(taught.sum())
    (total / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return total.item() / count, count, norm.item()


def test_packed_demonstrations_are_taught_as_they_are_one_by_one(tmp_path: Path) -> None:
    path = write_model(tmp_path / "qwen3", "qwen3")
    loss, count, norm = by_transformers(path)
    ranks = run_ranks(2, teach, path, [free_port() for _ in LAYOUTS])
    for found in ranks:
        for layout, values in zip(LAYOUTS, found, strict=True):
            assert values["packs"] > 1, layout
            for when in ("before", "taught"):
                assert values[when]["tokens"] == count, (layout, when)
                assert values[when]["nll"] == pytest.approx(loss, abs=AGREEMENT), (layout, when)
            assert values["taught"]["grad_norm"] == pytest.approx(norm, rel=AGREEMENT), layout
            assert values["after"]["nll"] == pytest.approx(found[0]["after"]["nll"], abs=AGREEMENT), layout
            assert values["after"]["nll"] < loss - 0.01, layout


def test_a_run_that_goes_on_is_the_same_and_comes_back_to_its_best_weights(tmp_path: Path) -> None:
    """Two epochs at once, and in two processes' worth; then a learning rate that spoils the model, which patience undoes."""
    path = write_model(tmp_path / "qwen3", "qwen3")
    (found,) = run_ranks(1, whole_story, path, tmp_path, [free_port() for _ in range(4)])
    whole, cut, gone_on, spoilt = (found[name] for name in ("whole", "cut", "gone on", "spoilt"))
    assert (whole["end"], whole["steps"], cut["steps"], gone_on["steps"]) == ("steps", 5, 2, 5)
    assert cut["notes"] == [note for note in whole["notes"] if note[0] <= 2]
    assert gone_on["notes"] == [note for note in whole["notes"] if note[0] > 2], "bit for bit"
    assert gone_on["best_step"] == 5, "it learns"
    assert (spoilt["end"], spoilt["steps"], spoilt["best_step"]) == ("patience", 7, 5)
    losses = {step: metrics["sft/eval_loss"] for step, metrics in spoilt["notes"] if "sft/eval_loss" in metrics}
    assert min(losses.values()) > spoilt["best"] == gone_on["best"]
    assert spoilt["afterwards"] == pytest.approx(spoilt["best"], rel=1e-12), "the weights are those of the best measurement"


# ---- what runs in the ranks


def teach(rank: RankInfo, path: Path, ports: list[int]) -> list[dict[str, Any]]:
    """Measure, teach one step, measure again, at each layout."""
    from ctpo_megatron.mcore.policy import assess, supervise

    found = []
    for layout, port in zip(LAYOUTS, ports, strict=True):
        parallel = ParallelConfig(**layout)
        optimizer = OptimizerConfig(lr=1e-2)
        own = replace(rank, master_port=port)
        engine = TrainerRank(str(path), parallel, optimizer, own, device="cpu", dtype="float32", seed=1)
        batch = build_train_batch(demonstrations(), aggregation=TokenMean(), parallel=parallel, max_tokens=MAX_TOKENS)
        share = batch.micro_batches[engine.coords.dp_rank]
        steps = {"before": assess(engine, share), "taught": supervise(engine, share), "after": assess(engine, share)}
        numbers = {name: {key: scalar(value) for key, value in values.items()} for name, values in steps.items()}
        found.append({**numbers, "packs": len(share)})
        engine.close()
    return found


class OneRank:
    """The trainer of one rank, in this process."""

    def __init__(self, rank: TrainerRank) -> None:
        self.rank = rank

    async def supervise(self, batch: TrainBatch) -> Values:
        from ctpo_megatron.mcore.policy import supervise

        return supervise(self.rank, batch.micro_batches[0])

    async def assess(self, batch: TrainBatch) -> Values:
        from ctpo_megatron.mcore.policy import assess

        return assess(self.rank, batch.micro_batches[0])

    async def save(self, directory: Path, *, background: bool) -> None:
        self.rank.save(directory, background=background)

    async def settle(self) -> None:
        self.rank.settle(60.0)

    async def load(self, directory: Path) -> None:
        self.rank.load(directory)


class Notes:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))


def whole_story(rank: RankInfo, path: Path, root: Path, ports: list[int]) -> dict[str, dict[str, Any]]:
    ports, once = list(ports), ("sft.epochs=2", "checkpoint.every=2")

    def run(name: str, lr: float, *words: str) -> dict[str, Any]:
        return asyncio.run(one_command(replace(rank, master_port=ports.pop()), path, root / name, lr, words))

    found = {"whole": run("whole", 1e-3, *once), "cut": run("cut", 1e-3, *once, "sft.steps=2")}
    found["gone on"] = run("cut", 1e-3, *once)
    found["spoilt"] = run("cut", 0.5, "sft.epochs=9")
    return found


async def one_command(rank: RankInfo, path: Path, run_dir: Path, lr: float, words: tuple[str, ...]) -> dict[str, Any]:
    """What `ctpo sft --resume auto` does, without Ray."""
    given = ["sft.steps=null", "sft.batch_size=4", "sft.eval=x.jsonl", "sft.eval_every=1", "sft.patience=2", *words]
    common = [f"run_dir={run_dir}", "optimizer.warmup_steps=0", "optimizer.schedule=constant", "checkpoint.background=false"]
    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart_sft.yaml", [*common, *given])
    samples = demonstrations()
    chosen = checkpoint_of_sft(config, "auto", discard)
    start = sft_start(config, {"": samples}, chosen)
    optimizer = OptimizerConfig(lr=lr)
    engine = TrainerRank(str(path), config.parallel, optimizer, rank, device="cpu", dtype="float32", seed=1)
    trainer, notes = OneRank(engine), Notes()
    if chosen is not None:
        assert await restore(trainer, chosen, discard) is chosen  # type: ignore[arg-type]
    loop = SftLoop(config, start.demonstrations, trainer, notes, held_out=samples[:3])  # type: ignore[arg-type]
    loop.first_step, loop.drawn, loop.state = start.step, start.drawn, start.state
    root = run_dir / "checkpoints"
    loop.checkpoints = Checkpoints(trainer, root, config.checkpoint, discard, needed=loop.needed)  # type: ignore[arg-type]
    result: SftResult = await loop.run()
    afterwards = await trainer.assess(loop._batch(samples[:3]))
    engine.close()
    best = {"best": result.eval_loss, "best_step": result.eval_step, "afterwards": scalar(afterwards["nll"])}
    return {"end": result.end, "steps": result.steps, "notes": notes.lines, **best}
