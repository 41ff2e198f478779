"""From prompts to optimizer steps: the numbers of a run's batches, and how many micro-batches they come to."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.planning.run import PlannedRun


@dataclass(frozen=True, slots=True)
class Packing:
    """An optimizer step, if every sample had one and the same length."""

    tokens: int  # of each sample
    per_micro_batch: int  # samples in one micro-batch of one data-parallel rank
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
    micro_batch_tokens: int  # of one micro-batch, over all its context-parallel ranks
    longest: int  # prompt and response at their limits
    packings: list[Packing]  # for the longest sample, and shorter ones

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.rollout_steps * self.samples

    @property
    def total_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.rollout_steps * self.optimizer_steps


def plan_batches(run: PlannedRun) -> Batches:
    """The batch arithmetic of `run`. Padding to multiples of 2 * cp is left out: it is at most 2 * cp - 1 tokens a sample."""
    train, parallel, longest = run.train, run.parallel, run.longest
    samples = train.prompts_per_step * run.rollout.group_size
    mini = samples // train.optimizer_steps
    micro_batch_tokens = train.max_tokens_per_micro_batch * parallel.cp
    lengths = dict.fromkeys(max(longest // part, 1) for part in (1, 4, 16))
    return Batches(
        rollout_steps=train.steps,
        prompts=train.prompts_per_step,
        samples=samples,
        optimizer_steps=train.optimizer_steps,
        mini_prompts=train.prompts_per_step // train.optimizer_steps,
        mini_samples=mini,
        per_replica=mini / parallel.dp,
        micro_batch_tokens=micro_batch_tokens,
        longest=longest,
        packings=[_packing(length, mini, micro_batch_tokens, parallel.dp, parallel.pp, parallel.vpp) for length in lengths],
    )


def _packing(tokens: int, samples: int, micro_batch_tokens: int, dp: int, pp: int, vpp: int) -> Packing:
    per_micro_batch = micro_batch_tokens // tokens
    micro_batches = -(-samples // (per_micro_batch * dp))
    # Narayanan et al., arXiv 2104.04473, section 2.2: (pp - 1) / (vpp * m) of the useful time
    wait = (pp - 1) / (vpp * micro_batches)
    return Packing(tokens, min(per_micro_batch, -(-samples // dp)), micro_batches, wait / (1 + wait))
