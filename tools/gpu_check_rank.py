"""Rows of tools/gpu_check.py about a trainer rank: what it computes on the device against the same on the CPU.

python tools/gpu_check_rank.py FOLDER       compute all cases on the CPU and leave FOLDER/KIND-DTYPE.pt; a row starts it
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_check_rows import COMPARED, Found, Place
from torch import Tensor

from ctpo_megatron.batch import MicroBatch, Sequences, TokenStreams
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.ports import free_port
from ctpo_megatron.record.values import scalar

HOST = "127.0.0.1"
VOCAB = 1000
LENGTHS = ([96, 32, 160], [64, 200])  # of the sequences of each micro-batch
LR = 3e-4
REFERENCE_S = 80.0
# of float32: log-probs in nats, all else as parts of what it is
FLOAT32 = {"logp": 1e-4, "loss": 1e-5, "grad_norm": 1e-4, "CTPO's grad_norm": 1e-2, "moved": 0.02, "logp after": 1e-3}
BFLOAT16_LEAST = 1e-4
COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "tie_word_embeddings": True, **COMMON},
    "mixture": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        **COMMON,
    },
}
Outcome = dict[str, Any]  # what a trainer rank computed: tensors and numbers


def write_model(directory: Path, config: dict[str, Any], device: str = "cpu") -> Path:
    """A model with random weights in Hugging Face format, without transformers; drawn on `device`. Returns its directory."""
    from safetensors.torch import save_file

    if directory.exists():
        return directory
    generator = torch.Generator(device).manual_seed(11)
    tensors = {}
    for tensor in hf_tensors(parse_config(config)):
        drawn = torch.randn(*tensor.shape, generator=generator, device=device)
        drawn = drawn * 0.08 if len(tensor.shape) > 1 else 1 + drawn * 0.2  # a matrix; a norm's weight
        tensors[tensor.name] = drawn.to(getattr(torch, config["dtype"])).cpu()
    part = directory.with_name(f"{directory.name}.{os.getpid()}")  # two processes may write it at once
    part.mkdir(parents=True)
    for name, content in {"config.json": config, "tokenizer.json": {}, "tokenizer_config.json": {}}.items():
        (part / name).write_text(json.dumps(content))
    save_file(tensors, part / "model.safetensors")
    with contextlib.suppress(OSError):  # the other was first
        part.rename(directory)
    return directory


def packed(lengths: list[int], vocab: int, seed: int) -> MicroBatch:
    """A micro-batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) < 0.8
    ids = torch.randint(0, vocab, (total + 1,), generator=generator)
    advantages = torch.randn(len(lengths), generator=generator).repeat_interleave(torch.tensor(lengths))
    tokens = TokenStreams(
        input_ids=ids[:-1].clone(),
        labels=ids[1:].clone(),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        mask=mask,
        advantages=torch.where(mask, advantages, 0.0),
        rollout_logp=torch.zeros(total),
        versions=torch.where(mask, 0, -1).to(torch.int32),
        restarts=torch.zeros(total, dtype=torch.bool),
    )
    sequences = Sequences(
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        lengths=torch.tensor(lengths),
        groups=torch.arange(len(lengths)),
        weights=torch.full((len(lengths),), 1 / total, dtype=torch.float64),
        ids=torch.arange(len(lengths)),
    )
    return MicroBatch(tokens, sequences)


def trainer_rank(kind: str, dtype: str, device: str, folder: Path, **optimizer: Any) -> TrainerRank:
    """The only rank of a trainer, on `device`."""
    path = write_model(folder / kind, MODELS[kind])
    info = RankInfo(0, 1, HOST, free_port(HOST))
    config = OptimizerConfig(lr=LR, **optimizer)
    return TrainerRank(str(path), ParallelConfig(), config, info, device=device, dtype=dtype, seed=1)


@contextlib.contextmanager
def closing(rank: TrainerRank) -> Iterator[TrainerRank]:
    """The rank, which leaves its groups afterwards."""
    try:
        yield rank
    finally:
        rank.close()


def _logp(rank: TrainerRank, batch: list[MicroBatch]) -> list[Tensor]:
    return [each.float().cpu() for each in rank.logp(rank.place(batch), 1.0)]


def three_steps(rank: TrainerRank) -> Outcome:
    """Log-probs, a step of maximum likelihood, two of CTPO on the same micro-batches, and log-probs again.

    CTPO's second step has ratios other than 1; its loss says nothing where they are, and is left out.
    """
    from ctpo_megatron.mcore.policy import update_policy

    batch = [packed(lengths, VOCAB, seed) for seed, lengths in enumerate(LENGTHS)]
    before, weights = _logp(rank, batch), _weights(rank)
    taught = rank.train_step(rank.place(batch), _likelihood, 1.0)
    sampled = [torch.where(mb.tokens.mask, logp, 0.0) for mb, logp in zip(batch, _logp(rank, batch), strict=True)]
    batch = [mb.with_streams(rollout_logp=logp) for mb, logp in zip(batch, sampled, strict=True)]
    values = update_policy(rank, [batch, batch], algorithm=AlgorithmConfig(), temperature=1.0, drift=DriftBounds(), version=0)
    after, moved = _logp(rank, batch), _weights(rank)
    return {
        "logp": torch.cat(before),
        "loss": scalar(taught["loss"]),
        "grad_norm": scalar(taught["grad_norm"]),
        "CTPO's grad_norm": scalar(values["grad_norm"]),
        "moved": torch.cat([(moved[name] - weights[name]).flatten() for name in sorted(weights)]),
        "logp after": torch.cat(after),
    }


def _weights(rank: TrainerRank) -> dict[str, Tensor]:
    return {name: tensor.float().cpu().clone() for bucket in rank.stream(2**24) for name, tensor in bucket}


def compare_row(place: Place, kind: str, dtype: str) -> Found:
    """What the rank computes on the device against what it computes on the CPU."""
    waiting = _references(place)
    with closing(trainer_rank(kind, dtype, place.device, place.folder)) as rank:
        layers = "portable layers" if rank._stepper.portable else "TransformerEngine's layers"
        found = three_steps(rank)
    wanted = waiting.get(kind, dtype)
    bounds = FLOAT32 if dtype == "float32" else bfloat16_bounds(wanted, waiting.get(kind, "float32"))
    text, holds = compare(found, wanted, bounds)
    return Found(f"{layers}: {text}", holds)


def distances(found: Outcome, wanted: Outcome) -> dict[str, float]:
    """How far two outcomes are from each other; see FLOAT32 for the units. Log-probs: the mean over tokens."""
    of_weights = (found["moved"] - wanted["moved"]).abs().mean() / wanted["moved"].abs().mean()
    return {
        "logp": (found["logp"] - wanted["logp"]).abs().mean().item(),
        "loss": abs(found["loss"] / wanted["loss"] - 1),
        "grad_norm": abs(found["grad_norm"] / wanted["grad_norm"] - 1),
        "CTPO's grad_norm": abs(found["CTPO's grad_norm"] / wanted["CTPO's grad_norm"] - 1),
        "moved": of_weights.item(),
        "logp after": (found["logp after"] - wanted["logp after"]).abs().mean().item(),
    }


def compare(found: Outcome, wanted: Outcome, bounds: dict[str, float]) -> tuple[str, bool]:
    """The distances as text, those out of bounds marked, and whether all are within; NaN never is."""
    apart = distances(found, wanted)
    wrong = {name for name, value in apart.items() if not value <= bounds[name]}
    text = ", ".join(f"{name} {v:.1e}" + (f" (> {bounds[name]:.1e})" if name in wrong else "") for name, v in apart.items())
    return text, not wrong


def bfloat16_bounds(rounded: Outcome, exact: Outcome) -> dict[str, float]:
    """What two ways of computing in bfloat16 may differ by: as much as one of them differs from float32.

    Most of that is the rounding of weights, which the two have in common: with other threads and kernels a CPU comes to a
    quarter of it at most.
    """
    return {name: max(BFLOAT16_LEAST, value) for name, value in distances(rounded, exact).items()}


class References:
    """The outcomes on the CPU, which a process beside this one computes meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen([sys.executable, __file__, str(folder)], env=environment)

    def get(self, kind: str, dtype: str) -> Outcome:
        """One outcome. Raises RuntimeError where the process ended without it, TimeoutError where it takes too long."""
        file, deadline = _file(self._folder, kind, dtype), time.monotonic() + REFERENCE_S
        while not file.exists():
            if self._process.poll() is not None and not file.exists():
                raise RuntimeError(f"the reference on the CPU ended with code {self._process.returncode}; the log says why")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no reference from the CPU after {REFERENCE_S:.0f} s")
            time.sleep(0.05)
        return dict(torch.load(file))


@functools.cache
def _references(place: Place) -> References:
    return References(place.folder)


def _file(folder: Path, kind: str, dtype: str) -> Path:
    return folder / f"{kind}-{dtype}.pt"


def write_references(folder: Path) -> None:
    """Compute every case on the CPU."""
    for kind, dtype in COMPARED:
        with closing(trainer_rank(kind, dtype, "cpu", folder)) as rank:
            outcome = three_steps(rank)
        part = folder / f"{kind}-{dtype}.part"
        torch.save(outcome, part)
        part.rename(_file(folder, kind, dtype))


def exchange_row(place: Place) -> Found:
    """Whether log-probs under other weights, kept on the host, and then under the model's own again, are what they were."""
    batch = [packed(LENGTHS[0], VOCAB, 0)]
    with closing(trainer_rank("dense", "auto", place.device, place.folder)) as rank:
        kept, before = rank.host_weights(), _logp(rank, batch)
        rank.train_step(rank.place(batch), _likelihood, 1.0)
        trained = _logp(rank, batch)
        with rank.using(kept):
            inside = _logp(rank, batch)
        again = _logp(rank, batch)
    differs = not torch.equal(before[0], trained[0])  # otherwise nothing was shown
    same = torch.equal(before[0], inside[0]) and torch.equal(trained[0], again[0])
    return Found(
        "equal" if same and differs else f"own weights and those kept: equal {same}, told apart {differs}", same and differs
    )


def checkpoint_row(place: Place) -> Found:
    """Whether log-probs after reading a checkpoint are those at the time it was saved."""
    from ctpo_megatron.checkpoints.files import begin_checkpoint

    batch = [packed(LENGTHS[0], VOCAB, 0)]
    target = place.folder / "checkpoints" / "step_00000001"
    target.parent.mkdir(exist_ok=True)
    with closing(trainer_rank("dense", "bfloat16", place.device, place.folder)) as rank:
        rank.train_step(rank.place(batch), _likelihood, 1.0)
        begin_checkpoint(target, {})
        rank.save(target)
        saved = _logp(rank, batch)
        rank.train_step(rank.place(batch), _likelihood, 1.0)
        trained = _logp(rank, batch)
        rank.load(target)
        read = _logp(rank, batch)
    holds = torch.equal(saved[0], read[0]) and not torch.equal(saved[0], trained[0])
    return Found("equal" if holds else f"differ by {(saved[0] - read[0]).abs().max():.1e} at most", holds)


def waits_row(place: Place) -> Found:
    """Where a training step waits for the device: CUDA's own count, by the lines that ask."""
    batch = [packed(lengths, VOCAB, seed) for seed, lengths in enumerate(LENGTHS)]
    with closing(trainer_rank("dense", "bfloat16", place.device, place.folder)) as rank:
        placed = rank.place(batch)
        rank.train_step(placed, _likelihood, 1.0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                rank.train_step(placed, _likelihood, 1.0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in told if "synchroniz" in str(each.message))
    return Found(f"{lines.total()}: " + ", ".join(f"{line} x {count}" for line, count in lines.most_common(8)))


def offload_row(place: Place) -> Found:
    """What a rank computes whose optimizer's state is in the host's memory, against one whose is on the device."""
    outcomes = []
    for share in (0.0, 1.0):
        with closing(trainer_rank("dense", "bfloat16", place.device, place.folder, cpu_offload=share)) as rank:
            outcomes.append(three_steps(rank))
    text, holds = compare(outcomes[1], outcomes[0], dict.fromkeys(FLOAT32, 0.02))
    return Found(text, holds)


def _likelihood(logp: Tensor, shard: MicroBatch, _scan: Any) -> tuple[Tensor, Any]:
    """A loss function of `TrainerRank.train_step`: the negative mean log-prob."""
    from ctpo_megatron.algorithms import Stats

    return -torch.where(shard.tokens.mask, logp, 0.0).mean(), Stats()


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_references(Path(sys.argv[1]))
