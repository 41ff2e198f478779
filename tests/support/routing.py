"""What a real server records besides tokens, judged by transformers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.data.samples import build_sample
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.types import Generation, TrainSample, Turn

MARGIN = 1e-4  # of router logits: closer ones are decided by rounding
TOP = 1e-4  # largest difference of a log-prob


@torch.no_grad()
def reference_experts(model: torch.nn.Module, ids: list[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts [tokens, layers, top_k], sorted, and whether the choice is clear [tokens, layers], of all but the last."""
    logits = torch.stack(model(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits, 1)
    best = logits.topk(top_k + 1, dim=-1)
    return best.indices[..., :top_k].sort(-1).values.numpy(), (best.values[..., -2] - best.values[..., -1] > MARGIN).numpy()


def check_experts(model: torch.nn.Module, ids: list[int], experts: np.ndarray) -> None:
    """Every token of `ids` but the last went where transformers sends it; -1 agrees with everything, if it stands for all."""
    expected, clear = reference_experts(model, ids, experts.shape[-1])
    assert experts.shape == expected.shape
    known = experts[..., 0] >= 0
    agrees = (np.sort(experts, -1) == expected).all(-1)
    assert (agrees | ~clear | ~known).all()
    assert (experts[~known] == -1).all()
    assert known.any()
    assert clear[known].mean() > 0.5, "hardly a token was compared"


@torch.no_grad()
def check_top(model: torch.nn.Module, prompt: list[int], generation: Generation, temperature: float) -> None:
    """The likeliest tokens and their log-probs at the sampling temperature."""
    logits = model(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1].float()
    logp, top = torch.log_softmax(logits / temperature, -1), generation.top_k
    found = logp.gather(1, torch.from_numpy(top.ids).long())
    assert np.abs(found.numpy() - top.logp).max() < TOP
    assert np.abs(logp.topk(top.ids.shape[1]).values.numpy() - top.logp).max() < TOP


async def sample(client: EngineClient, prompt: list[int], *, tokens: int = 40, session: int = 0, recorded: int = 0) -> Generation:
    return await client.generate(
        prompt, max_new_tokens=tokens, temperature=0.7, stop_token_ids=[], session=session, recorded=recorded
    )


async def check_record(client: EngineClient, model: torch.nn.Module, prompt: list[int]) -> None:
    """Of several requests at once, of a cached prefix, and of a second turn that asks only for what is new."""
    prompts = [prompt + [i] * i for i in range(4)]
    generations = await asyncio.gather(*(sample(client, each, session=i) for i, each in enumerate(prompts)))
    generations += [await sample(client, prompt)]
    for each, generation in zip([*prompts, prompt], generations, strict=True):
        ids = each + generation.token_ids
        check_experts(model, ids, generation.routed_experts)
        check_top(model, each, generation, 0.7)
        assert (generation.routed_experts >= 0).all()
    known = len(ids) - 1
    second = await sample(client, [*ids, 65, 66, 67], recorded=known)
    check_experts(model, [*ids, 65, 66, 67, *second.token_ids], np.concatenate([g.routed_experts for g in (generation, second)]))
    assert len(second.routed_experts) == 3 + len(second.token_ids)


def check_crossing(newer: torch.nn.Module, prompt: list[int], generations: list[Generation]) -> None:
    """Weights changed on the way: what the older ones sampled has no record, all else is the newer routing."""
    for generation in generations:
        last = generation.versions[-1]
        sampled_by_older = [False] * (len(prompt) - 1) + [version != last for version in generation.versions]
        assert ((generation.routed_experts[:, 0, 0] < 0) == np.array(sampled_by_older)).all()
        assert 0 < sum(sampled_by_older) < len(generation.versions), "it was not in flight during the update"
        check_experts(newer, prompt + generation.token_ids, generation.routed_experts)


async def train_samples(client: EngineClient, prompt: list[int], count: int) -> list[TrainSample]:
    """Generations as the trainer gets them."""
    generations = await asyncio.gather(*(sample(client, prompt, tokens=200, session=i) for i in range(count)))
    return [
        build_sample(prompt, [Turn("assistant", g.token_ids, g.rollout_logp, g.versions, g.top_k)], 1.0, 0, g.routed_experts)
        for g in generations
    ]


def drift(rank: RankInfo, path: Path, samples: list[TrainSample], dtype: str) -> dict[str, float]:
    """Mean and largest |log-prob difference| of a trainer in `dtype` to the engine that sampled, with replay and without."""
    engine = TrainerRank(str(path), ParallelConfig(), None, rank, device="cpu", dtype=dtype, seed=1)
    found: dict[str, float] = {}
    for name, chosen in {"with": samples, "without": [replace(s, routed_experts=None) for s in samples]}.items():
        (packs,) = pack(chosen, dp=1, max_tokens=1024)
        placed = engine.place(packs)
        pairs = [(mb.tokens, logp) for mb, logp in zip(placed, engine.logp(placed, 0.7), strict=True)]
        gaps = [(logp - tokens.rollout_logp)[tokens.mask].abs() for tokens, logp in pairs]
        found[f"mean {name}"], found[f"max {name}"] = float(torch.cat(gaps).mean()), float(torch.cat(gaps).max())
    engine.close()
    return found
