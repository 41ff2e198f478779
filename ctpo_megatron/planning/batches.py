"""From prompts to optimizer steps: the numbers of a run's batches, and how many micro-batches they come to."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config import RunConfig


@dataclass(frozen=True, slots=True)
class Packing:
    """An optimizer step, if every sample had one and the same length."""

    tokens: int  # of each sample
    per_pack: int  # samples in one micro-batch of one data-parallel rank
    micro_batches: int  # per data-parallel rank and optimizer step
    bubble: float  # share of the step that a pipeline stage waits


@dataclass(frozen=True, slots=True)
class Batches:
    """The batch arithmetic of a run."""

    rollout_steps: int
    prompts: int  # of a rollout step
    samples: int  # of a rollout step
    optimizer_steps: int  # per rollout step
    mini_prompts: int  # of one optimizer step
    mini_samples: int
    per_replica: float  # samples of one optimizer step on one data-parallel replica
    pack_tokens: int  # of one micro-batch, over all its context-parallel ranks
    longest: int  # prompt and response at their limits
    packings: list[Packing]  # for the longest sample, and shorter ones

    @property
    def total_samples(self) -> int:
        """Of the whole run."""
        return self.rollout_steps * self.samples

    @property
    def total_optimizer_steps(self) -> int:
        """Of the whole run."""
        return self.rollout_steps * self.optimizer_steps


def plan_batches(config: RunConfig) -> Batches:
    """The batch arithmetic of `config`. Padding to multiples of 2 * cp is left out: it is at most 2 * cp - 1 tokens a sample."""
    train, parallel = config.train, config.parallel
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    samples = train.prompts_per_step * config.rollout.group_size
    mini = samples // train.optimizer_steps
    pack_tokens = train.max_tokens_per_micro_batch * parallel.cp
    lengths = dict.fromkeys(max(longest // part, 1) for part in (1, 4, 16))
    return Batches(
        rollout_steps=train.steps,
        prompts=train.prompts_per_step,
        samples=samples,
        optimizer_steps=train.optimizer_steps,
        mini_prompts=train.prompts_per_step // train.optimizer_steps,
        mini_samples=mini,
        per_replica=mini / parallel.dp,
        pack_tokens=pack_tokens,
        longest=longest,
        packings=[_packing(length, mini, pack_tokens, parallel.dp, parallel.pp, parallel.vpp) for length in lengths],
    )


def _packing(tokens: int, samples: int, pack_tokens: int, dp: int, pp: int, vpp: int) -> Packing:
    per_pack = pack_tokens // tokens
    micro_batches = -(-samples // (per_pack * dp))
    # Narayanan et al., arXiv 2104.04473, section 2.2: (pp - 1) / (vpp * m) of the useful time
    wait = (pp - 1) / (vpp * micro_batches)
    return Packing(tokens, min(per_pack, -(-samples // dp)), micro_batches, wait / (1 + wait))
