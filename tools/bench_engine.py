"""Two parts of tools/bench_train.py: one trainer rank against the same model of transformers with padding, and against itself
where groups read their prompts once."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_loss import Check
from torch import Tensor

from ctpo_megatron.algorithms import Scan, Stats, nll_loss
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.mcore.host import megatron_region
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.ports import free_port
from ctpo_megatron.record.values import scalar
from ctpo_megatron.types import TrainSample

BUDGET = 2048  # positions of a micro-batch, padding included, on both sides
TOKENS = 4096  # of a step
GROUP = 8
VOCAB = 4096  # a quarter of all parameters, as in Qwen3-0.6B; what the head computes twice weighs accordingly
SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
}


def long_tail() -> list[int]:
    """Lengths with a log-normal tail, of TOKENS in all."""
    generator = torch.Generator().manual_seed(13)
    lengths, left = [], TOKENS
    while left:
        drawn = math.exp(5.0 + 1.0 * torch.randn((), generator=generator).item())
        lengths.append(min(left, max(8, min(BUDGET, int(drawn)))))
        left -= lengths[-1]
    return lengths


CASES = {"long tail": long_tail(), "equal, 256": [256] * (TOKENS // 256), "equal, 2048": [2048] * (TOKENS // 2048)}


def write_model(directory: Path) -> Path:
    """A model with random weights in Hugging Face format."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE), dtype=torch.float32)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def make_samples(lengths: list[int]) -> list[TrainSample]:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for length in lengths:
        ids = torch.randint(0, VOCAB, (length + 1,), generator=generator).tolist()
        samples.append(TrainSample(ids[:-1], ids[1:], [True] * length, [0.0] * length, [0] * length, [0.0] * length))
    return samples


def rank_step(trainer: TrainerRank, samples: list[TrainSample], share_from: int | None = None) -> Callable[[], float]:
    """Mean negative log-likelihood and its gradients by the trainer rank, without the optimizer's step."""
    weights = [1 / sum(len(s) for s in samples)] * len(samples)
    (packs,) = pack(samples, dp=1, max_tokens=BUDGET, weights=weights, share_from=share_from)
    placed = trainer.place(packs)

    def share(logp: Tensor, mb: MicroBatch, scan: Scan) -> tuple[Tensor, Stats]:
        sequences = mb.sequences
        out = nll_loss(logp=logp, mask=mb.tokens.mask, cu_seqlens=sequences.cu_seqlens, weights=sequences.weights, scan=scan)
        return out.loss, Stats()

    def step() -> float:
        with megatron_region(trainer.device):
            return scalar(trainer._stepper.forward_backward(placed, share, 1.0)["loss"])

    return step


def padded_step(model: torch.nn.Module, samples: list[TrainSample]) -> Callable[[], float]:
    """The same by transformers: batches in the order of arrival, each padded to its longest sequence."""
    batches: list[list[TrainSample]] = [[]]
    for sample in samples:
        longest = max(len(s) for s in (*batches[-1], sample))
        if batches[-1] and longest * (len(batches[-1]) + 1) > BUDGET:
            batches.append([])
        batches[-1].append(sample)
    tokens = sum(len(sample) for sample in samples)

    def padded(batch: list[TrainSample], stream: str) -> Tensor:
        longest = max(len(sample) for sample in batch)
        return torch.tensor([getattr(s, stream) + [0] * (longest - len(s)) for s in batch])

    inputs = [(padded(b, "input_ids"), padded(b, "mask").bool(), padded(b, "labels")) for b in batches]

    def step() -> float:
        model.zero_grad()
        total = 0.0
        for ids, mask, labels in inputs:
            logits = model(ids, attention_mask=mask.long(), use_cache=False).logits
            logp = torch.log_softmax(logits.float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            loss = -torch.where(mask, logp, 0.0).sum() / tokens
            loss.backward()
            total += loss.item()
        return total

    return step


def engine_rows(
    repeats: int, median_ratio: Callable[..., float], least_long: float, least_equal: float
) -> tuple[list[dict[str, Any]], list[Check]]:
    """Tokens per second over those of transformers, for each distribution of lengths; both losses must agree."""
    from transformers import AutoModelForCausalLM

    rows, checks = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        rank = RankInfo(0, 1, "127.0.0.1", free_port("127.0.0.1"))
        trainer = TrainerRank(str(path), ParallelConfig(), OptimizerConfig(), rank, device="cpu", seed=1)
        for name, lengths in CASES.items():
            samples = make_samples(lengths)
            ours, theirs = rank_step(trainer, samples), padded_step(model, samples)
            gap = abs(ours() - theirs())
            ratio = 1 / median_ratio(ours, theirs, repeats)
            least = least_long if name == "long tail" else least_equal
            rows.append({"lengths": name, "sequences": len(lengths), "tokens/s over transformers": ratio, "losses differ": gap})
            checks.append(Check(f"{name}: {ratio:.2f} times the tokens/s of transformers (at least {least})", ratio >= least))
            checks.append(Check(f"{name}: losses differ by {gap:.1e}", gap < 1e-5))
        trainer.close()
    return rows, checks


def in_groups(prompt: int, response: int) -> list[TrainSample]:
    """Samples of groups of GROUP whose prompts and responses have these lengths, of 2 * TOKENS in all."""
    generator, samples = torch.Generator().manual_seed(7), []
    for group in range(2 * TOKENS // (GROUP * (prompt + response))):
        common = torch.randint(0, VOCAB, (prompt,), generator=generator).tolist()
        for _ in range(GROUP):
            ids = common + torch.randint(0, VOCAB, (response,), generator=generator).tolist()
            mask, nothing = [False] * (prompt - 1) + [True] * response, [0.0] * (len(ids) - 1)
            samples.append(TrainSample(ids[:-1], ids[1:], mask, nothing, [0] * len(mask), nothing, group=group))
    return samples


def prompt_rows(repeats: int, median_ratio: Callable[..., float], least_equal: float) -> tuple[list[dict[str, Any]], list[Check]]:
    """Tokens per second of groups that read their prompts once over those of samples that read their own."""
    rows, checks = [], []
    with tempfile.TemporaryDirectory() as folder:
        rank = RankInfo(0, 1, "127.0.0.1", free_port("127.0.0.1"))
        path = write_model(Path(folder))
        trainer = TrainerRank(str(path), ParallelConfig(), OptimizerConfig(), rank, device="cpu", seed=1)
        for prompt, response in ((200, 200), (50, 200), (400, 100)):
            samples = in_groups(prompt, response)
            shared, apart = rank_step(trainer, samples, share_from=16), rank_step(trainer, samples)
            gap = abs(shared() - apart())
            ratio = 1 / median_ratio(shared, apart, repeats)
            rows.append(
                {"prompt": prompt, "response": response, "group": GROUP, "tokens/s over unshared": ratio, "losses differ": gap}
            )
            if prompt == response:
                checks.append(
                    Check(f"prompts as long as responses: {ratio:.2f} times (at least {least_equal})", ratio >= least_equal)
                )
            checks.append(Check(f"{prompt} and {response} tokens: losses differ by {gap:.1e}", gap < 1e-5))
        trainer.close()
    return rows, checks
