"""A task of hundreds of tokens whose one reward comes at the end and hangs on the first as on the last, and a policy for it.

A machine has STATES states and MOVES moves; each move is a permutation of the states, drawn from the seed. A prompt is a first
state and BLOCK moves. The policy first writes the state that these lead to. Then it goes on in blocks: BLOCK moves, which it may
choose, and the state that they have led to. The reward is 1 if every token is of its kind (move or state) and every written state
is the one that all moves up to it have led to, else 0: a proof of many lines that holds or does not. It comes once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STATES, MOVES, BLOCK = 8, 4, 3
VOCABULARY = MOVES + STATES  # tokens: moves, then states
WEIGHTS, DEMONSTRATIONS = 6_000_011, 8_000_009  # added to a seed, as in ablate_long_run.py
HABIT = 0.85  # how often a demonstration takes the first move without a choice


@dataclass(frozen=True)
class World:
    """A machine: `after` [MOVES, STATES] is the state after a move in a state."""

    after: Tensor

    @classmethod
    def drawn(cls, seed: int) -> World:
        """The machine of a seed."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.stack([torch.randperm(STATES, generator=generator) for _ in range(MOVES)]))

    def prompts(self, number: int, generator: torch.Generator) -> Tensor:
        """Prompts [number, 1 + BLOCK], each a state and the first moves."""
        state = torch.randint(STATES, (number, 1), generator=generator) + MOVES
        return torch.cat([state, torch.randint(MOVES, (number, BLOCK), generator=generator)], 1)

    def rewards(self, prompts: Tensor, written: Tensor) -> Tensor:
        """1.0 where a trajectory is right, else 0.0: [N], of `prompts` [N, 1 + BLOCK] and the policy's tokens [N, T]."""
        places = state_places(written.shape[1])
        in_form = ((written >= MOVES) == places).all(1)
        moves = torch.cat([prompts[:, 1:], written[:, ~places]], 1).clamp(max=MOVES - 1)
        state, right = prompts[:, 0] - MOVES, in_form
        for line, block in zip(written[:, places].unbind(1), moves.split(BLOCK, 1), strict=True):
            for move in block.unbind(1):
                state = self.after[move, state]
            right = right & (line == state + MOVES)
        return right.float()

    def demonstrations(self, number: int, blocks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Prompts and faultless trajectories of `blocks` blocks; with HABIT a move is the first, else any."""
        prompts = self.prompts(number, generator)
        written = torch.randint(MOVES, (number, length_of(blocks)), generator=generator)
        written[torch.rand(written.shape, generator=generator) < HABIT] = 0
        state, moves = prompts[:, 0] - MOVES, prompts[:, 1:]
        for place in range(0, written.shape[1], BLOCK + 1):
            for move in moves.unbind(1):
                state = self.after[move, state]
            written[:, place] = state + MOVES
            moves = written[:, place + 1 : place + 1 + BLOCK]
        return prompts, written


def length_of(blocks: int) -> int:
    """Tokens that the policy writes: the state of the prompt's moves, then `blocks` blocks."""
    return 1 + blocks * (BLOCK + 1)


def state_places(length: int) -> Tensor:
    """Which of a trajectory's places [length] are for states."""
    return torch.arange(length) % (BLOCK + 1) == 0


class Recurrence(torch.autograd.Function):
    """h_t = tanh(x_t + U h_{t-1}) of x [T, N, H] and U [H, H], from h_0 = 0. As nn.RNN, in half its time: one product a step."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        out, hidden, transposed = torch.empty_like(inputs), torch.zeros_like(inputs[0]), weight.T.contiguous()
        for each, place in zip(inputs.unbind(0), out.unbind(0), strict=True):
            hidden = torch.addmm(each, hidden, transposed, out=place).tanh_()
        ctx.save_for_backward(out, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, weight = ctx.saved_tensors
        slopes, found, later = 1 - out.square(), torch.empty_like(out), torch.zeros_like(out[0])
        for each, slope, place in zip(*(reversed(part.unbind(0)) for part in (grad, slopes, found)), strict=True):
            later = torch.mul(torch.addmm(each, later, weight), slope, out=place)
        return found, found[1:].flatten(0, 1).T @ out[:-1].flatten(0, 1)


class Policy(nn.Module):
    """A recurrent net over prompt and written tokens: h = tanh(w(token) + U h), and an output layer."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + WEIGHTS)
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.recurrent = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))
            self.head = nn.Linear(width, VOCABULARY)

    def hidden(self, prompts: Tensor, written: Tensor) -> Tensor:
        """What the output layer sees at each written token: [N, T, width]."""
        tokens = torch.cat([prompts, written[:, :-1]], 1)
        out: Tensor = Recurrence.apply(self.embedding(tokens.T), self.recurrent)
        return out[prompts.shape[1] - 1 :].transpose(0, 1)

    def logp(self, prompts: Tensor, written: Tensor) -> Tensor:
        """Log-prob of each written token, with grad: [N, T]."""
        logits = self.head(self.hidden(prompts, written))
        return -nn.functional.cross_entropy(logits.flatten(0, 1), written.flatten(), reduction="none").view(written.shape)

    @torch.no_grad()
    def sample(self, prompts: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens at temperature 1 and their log-probs: [N, length] each."""
        hidden = Recurrence.apply(self.embedding(prompts.T), self.recurrent)[-1]
        recurrent, head = self.recurrent.T.contiguous(), self.head.weight.T.contiguous()
        noise = torch.empty(length, len(prompts), VOCABULARY).exponential_(generator=generator).log_()
        written, logp = torch.empty(len(prompts), length, dtype=torch.int64), torch.empty(len(prompts), length)
        for place in range(length):
            each = torch.log_softmax(torch.addmm(self.head.bias, hidden, head), -1)
            token = (each - noise[place]).argmax(-1)  # Gumbel's way to draw from a softmax
            written[:, place] = token
            logp[:, place] = each.gather(1, token[:, None])[:, 0]
            hidden = torch.addmm(self.embedding(token), hidden, recurrent).tanh_()
        return written, logp


@dataclass(frozen=True)
class ColdStart:
    """How a policy is taught the task until it is right now and then."""

    width: int = 64
    blocks: int = 32  # of a demonstration
    batch: int = 64
    rate: float = 3e-3
    check: int = 20  # steps between two looks
    most: int = 4000
    goal: float = 0.1  # share of right trajectories at which it ends


def cold_start(how: ColdStart, seed: int, blocks: int) -> tuple[Policy, dict[str, float]]:
    """A policy that first gets `how.goal` of its trajectories of `blocks` blocks right, and how long that took.

    Supervised on demonstrations. Raises RuntimeError where it does not get there.
    """
    world, policy = World.drawn(seed), Policy(how.width, seed)
    generator = torch.Generator().manual_seed(seed + DEMONSTRATIONS)
    optimizer = torch.optim.Adam(policy.parameters(), lr=how.rate)
    for step in range(1, how.most + 1):
        loss = -policy.logp(*world.demonstrations(how.batch, how.blocks, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % how.check == 0:
            prompts = world.prompts(512, generator)
            right = float(world.rewards(prompts, policy.sample(prompts, length_of(blocks), generator)[0]).mean())
            if right >= how.goal:
                return policy, {"steps": step, "reward": right}
    raise RuntimeError(f"seed {seed}: {how.most} supervised steps ended below {how.goal:.0%} right; last {right:.1%}")
