"""Real training of a policy that is small enough for seconds: rows of metrics of runs that learn, and of runs that go wrong.

The policy is a network of some thousand parameters that writes digits until it ends; what is right is a digit for each prompt, in
the last place. Losses, ratios and the health panel are the product's (`policy_loss`, `train_metrics`); sampling, optimizer and
rewards are here. It shows what the alarms say of dynamics that nobody drew; there are no servers, no engine and no drift.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctpo_megatron.algorithms import Stats, policy_loss
from ctpo_megatron.algorithms.advantages.group import group_advantages
from ctpo_megatron.algorithms.statistics import merge
from ctpo_megatron.loop.statistics import train_metrics
from ctpo_megatron.record.values import Max, Mean, Min, Sum, Value

PROMPTS, END, LONGEST = 48, 9, 16
GROUPS, SIZE, PARTS = 32, 8, 4  # groups of a step, attempts of a group, optimizer steps
ANSWERS = GROUPS * SIZE
EVAL_EVERY, EVAL_SAMPLES = 4, 16


@dataclass(frozen=True)
class Setting:
    """How a run is made. What is None is not wrong with it; faults begin at step `begin`."""

    name: str
    lr: float = 2e-3
    begin: int = 1
    lr_then: float | None = None  # learning rate from `begin` on
    pay_length: float = 0.0  # of the reward for the longest response, from `begin` on
    undecided: float = 0.0  # share of answers without a verdict that is added with every step from `begin` on


class Policy(nn.Module):
    """Log-probs of the next token, given the prompt, the place and the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.place, self.before = nn.Embedding(PROMPTS, 32), nn.Embedding(LONGEST, 32), nn.Embedding(END + 2, 32)
        self.out = nn.Sequential(nn.Tanh(), nn.Linear(32, END + 1))

    def forward(self, prompt: Tensor, place: Tensor, before: Tensor) -> Tensor:
        """Returns log-probs [..., END + 1] of inputs of one shape."""
        return self.out(self.prompt(prompt) + self.place(place) + self.before(before)).log_softmax(-1)


@dataclass
class Attempts:
    """What was sampled: [N, LONGEST], where `mask` says which tokens were written."""

    prompt: Tensor
    place: Tensor
    before: Tensor
    token: Tensor
    logp: Tensor
    mask: Tensor


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor) -> Attempts:
    """Returns an attempt at each of `prompts` [N]."""
    before, going = torch.full_like(prompts, END + 1), torch.ones_like(prompts, dtype=torch.bool)
    columns: list[list[Tensor]] = [[], [], [], []]
    for place in range(LONGEST):
        logp = policy(prompts, torch.full_like(prompts, place), before)
        token = torch.distributions.Categorical(logits=logp).sample()
        for column, value in zip(columns, (before, token, logp.gather(-1, token[:, None])[:, 0], going), strict=True):
            column.append(value)
        going, before = going & (token != END), token
    before_, token_, logp_, mask = (torch.stack(column, 1) for column in columns)
    places = torch.arange(LONGEST).expand_as(token_)
    return Attempts(prompts[:, None].expand_as(token_), places, before_, token_, logp_, mask)


def judge(made: Attempts) -> tuple[Tensor, Tensor]:
    """Returns whether each attempt is right, and its length: [N] each. Right is the prompt's digit right before the end."""
    length = made.mask.sum(1)
    last = made.token.gather(1, (length - 2).clamp(min=0)[:, None])[:, 0]
    ended = made.token.gather(1, (length - 1)[:, None])[:, 0] == END
    return (ended & (length > 1) & (last == (made.prompt[:, 0] * 7 + 3) % END)).double(), length


def run(setting: Setting, seed: int, steps: int = 300) -> list[dict[str, float]]:
    """Returns the rows of a run."""
    torch.manual_seed(seed)
    draw, policy, rows = random.Random(seed), Policy(), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=setting.lr)
    for step in range(1, steps + 1):
        since = max(0, step - setting.begin + 1)
        if since and setting.lr_then is not None:
            optimizer.param_groups[0]["lr"] = setting.lr_then
        prompts = torch.tensor(draw.choices(range(PROMPTS), k=GROUPS)).repeat_interleave(SIZE)
        made = sample(policy, prompts)
        right, length = judge(made)
        lost = torch.tensor([draw.random() < setting.undecided * since for _ in range(ANSWERS)])
        reward = right * ~lost + (setting.pay_length * length / LONGEST if since else 0.0)
        stats = train(policy, optimizer, made, reward)
        row = {"step": float(step), "time": float(step), **numbers(made, right, reward, length, lost), **stats}
        rows.append(row | ({"eval/accuracy": accuracy(policy)} if step % EVAL_EVERY == 0 else {}))
    return rows


def accuracy(policy: Policy) -> float:
    """Returns the share of right answers to all prompts, without what a reward may pay besides."""
    return float(judge(sample(policy, torch.arange(PROMPTS).repeat(EVAL_SAMPLES)))[0].mean())


def train(policy: Policy, optimizer: torch.optim.Optimizer, made: Attempts, reward: Tensor) -> dict[str, float]:
    """Make the optimizer steps of a batch; returns the metrics of training."""
    groups = reward.view(GROUPS, SIZE).tolist()
    advantages = torch.tensor([each for group in groups for each in group_advantages(group)])
    found, entropies = [], []
    for rows in torch.arange(ANSWERS).chunk(PARTS):
        mask = made.mask[rows]
        logp = policy(made.prompt[rows], made.place[rows], made.before[rows])
        chosen = logp.gather(-1, made.token[rows][..., None])[..., 0]
        entropies.append(float(-(logp.exp() * logp).detach().sum(-1)[mask].mean()))
        lengths = mask.sum(1)
        result = policy_loss(
            {"type": "ctpo"},
            logp=chosen[mask],
            old_logp=made.logp[rows][mask],
            advantages=advantages[rows].repeat_interleave(lengths),
            mask=torch.ones(int(lengths.sum()), dtype=torch.bool),
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        found.append(result.stats)
    return train_metrics(values(merge(found))) | {"train/entropy": statistics.fmean(entropies)}


def numbers(made: Attempts, right: Tensor, reward: Tensor, length: Tensor, lost: Tensor) -> dict[str, float]:
    """Returns the metrics of what was sampled."""
    groups = reward.view(GROUPS, SIZE)
    return {
        "reward/mean": float(reward.mean()),
        "reward/term/answer": float(right.mean()),
        "reward/mixed_groups": float((groups.amax(1) > groups.amin(1)).double().mean()),
        "reward/undecided": float(lost.sum()),
        "rollout/response_tokens": float(length.double().mean()),
        "rollout/truncated": float((made.mask[:, -1] & (made.token[:, -1] != END)).double().mean()),
    }


def values(stats: Stats) -> dict[str, Value]:
    """Returns the statistics of a loss as values of the record."""

    def plain(value: Tensor) -> object:
        return value.double().numpy() if value.ndim else float(value)

    found: dict[str, Value] = {name: Sum(plain(each)) for name, each in stats.sums.items()}  # type: ignore[arg-type]
    found |= {name: Mean(plain(each.total), plain(each.weight)) for name, each in stats.means.items()}  # type: ignore[arg-type]
    found |= {name: Max(plain(each)) for name, each in stats.maxima.items()}  # type: ignore[arg-type]
    return found | {name: Min(plain(each)) for name, each in stats.minima.items()}  # type: ignore[arg-type]
