"""The proof of a publication against running servers: predicted digests are the reported ones, and planted faults are named.

A server of two ranks holds experts and a vocabulary that is filled up, the session's server a dense model. Weights are replaced
through files, so that no transport of this package takes part.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctpo_megatron.engine.checksums import read_digests
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.weights.proof.attest import attest, compare
from ctpo_megatron.weights.proof.canary import TOLERANCE, Gap, canary_batch, canary_gap, canary_tokens, check_canary
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from tests.support.engines import TIMEOUT_S, RunningServer, start_server
from tests.support.ranks import run_ranks
from tests.support.tiny import FAMILIES, write_model

EXPERT = "model.layers.1.mlp.experts.2"
CHANGES = {"moe_intermediate_size": 64}
AGREEMENT = 1e-4  # largest difference of a log-prob between trainer and a healthy server, float32

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


class Engine:
    """A server, the layout of its model, and the weights it was started with."""

    def __init__(self, running: RunningServer, directory: Path) -> None:
        self.running, self.directory = running, directory
        self.layout = EngineLayout(read_hf_config(directory), running.tp, cpu=True)
        self.weights = load_file(directory / "model.safetensors")

    def holds(self) -> list[dict[str, int]]:
        return read_digests(asyncio.run(self._ask()), self.running.url)

    async def _ask(self) -> Any:
        async with self.running.client() as client:
            return await client.control.checksums(self.running.url)

    def load(self, tensors: dict[str, Tensor], scratch: Path) -> None:
        """Replace these tensors in the server, and no others."""
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(self.directory, scratch, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch / "model.safetensors")
        headers = {"Authorization": f"Bearer {self.running.api_key}"}
        body = {"model_path": str(scratch), "flush_cache": False}
        answer = requests.post(f"{self.running.url}/update_weights_from_disk", json=body, headers=headers, timeout=TIMEOUT_S)
        assert answer.json()["success"], answer.text
        # the scheduler may still hold a request whose answer is here already; without a time limit that is an error
        flushed = requests.post(f"{self.running.url}/flush_cache?timeout={TIMEOUT_S:.0f}", headers=headers, timeout=TIMEOUT_S)
        assert flushed.ok, flushed.text

    def expected(self, tensors: dict[str, Tensor]) -> list[dict[str, int]]:
        expected = ExpectedDigests(self.layout)
        expected.add(list(tensors.items()))
        return expected.digests()


@pytest.fixture(scope="module")
def mixture(forks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Qwen3-MoE on two ranks."""
    directory = write_model(tmp_path_factory.mktemp("model") / "mixture", "", options=FAMILIES["qwen3_moe"] | CHANGES)
    running = start_server(directory, tmp_path_factory.mktemp("server") / "server.log", tp=2, forks=forks)
    yield Engine(running, directory)
    running.server.stop()


def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights, as after a step."""
    generator = torch.Generator().manual_seed(3)
    return {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def test_planted_faults(mixture: Engine, tmp_path: Path) -> None:
    old, new, layer = mixture.weights, moved(mixture.weights), "model.layers.1"
    assert compare(mixture.layout, mixture.expected(old), mixture.holds()) == [], "right after loading"
    sent = mixture.expected(new)
    stale = compare(mixture.layout, sent, mixture.holds())
    assert {(each.rank, each.tensor, each.kind) for each in stale} == {
        (rank, tensor, "differs") for rank in (0, 1) for tensor in mixture.layout.tensors
    }, "old weights"

    def differing(held: dict[str, Tensor]) -> set[str]:
        mixture.load(held, tmp_path / "new")
        return {each.tensor for each in compare(mixture.layout, sent, mixture.holds())}

    dropped = [name for name in new if name.startswith("model.layers.0.self_attn.")]
    assert differing({name: tensor for name, tensor in new.items() if name not in dropped}) == {
        f"model.layers.0.self_attn.{name}.weight" for name in ("qkv_proj", "o_proj", "q_norm", "k_norm")
    }, "a bucket dropped"
    assert differing({name: new[name] for name in dropped}) == set()

    norms = [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
    assert differing({norms[0]: new[norms[1]], norms[1]: new[norms[0]]}) == set(norms), "two tensors swapped"
    assert differing({name: new[name] for name in norms}) == set()

    experts = [name for name in new if name.startswith(EXPERT)]
    assert differing({name: old[name] for name in experts}) == {
        f"{layer}.mlp.experts.w13_weight",
        f"{layer}.mlp.experts.w2_weight",
    }, "one expert stale"
    with pytest.raises(WeightSyncError, match=rf"{mixture.running.url} does not hold version 5 .*: 2 of its tensors"):
        attest(mixture.layout, 5, sent, {mixture.running.url: mixture.holds()})

    assert differing(new | {"lm_head.weight": old["lm_head.weight"]}) == {"lm_head.weight"}, "embedding updated, output stale"
    assert differing({"lm_head.weight": new["lm_head.weight"]}) == set()
    attest(mixture.layout, 5, sent, {mixture.running.url: mixture.holds()})


def trainer_logp(rank: RankInfo, directory: str, token_ids: list[int]) -> list[float]:
    from ctpo_megatron.config.model import ParallelConfig

    engine = TrainerRank(directory, ParallelConfig(), None, rank, device="cpu", seed=1)
    (logp,) = engine.logp(engine.place([canary_batch(token_ids, 2)]), temperature=1.0)
    engine.close()
    return logp[: len(token_ids) - 1].tolist()


def test_canary(server: RunningServer, qwen3: Path, tmp_path: Path) -> None:
    """The trainer's log-probs are the server's; with one stale tensor they are not, whatever the prefix cache holds."""
    engine = Engine(server, qwen3)
    engine.load(engine.weights, tmp_path / "whole")
    assert compare(engine.layout, engine.expected(engine.weights), engine.holds()) == []
    tokens = canary_tokens(read_hf_config(qwen3).vocab_size, 0)
    (trainer,) = run_ranks(1, trainer_logp, str(qwen3), tokens)

    async def gap() -> Gap:
        async with server.client() as client:
            logps = await client.control.prompt_logprobs(server.url, tokens)
        return canary_gap(trainer, logps)

    try:
        healthy = asyncio.run(gap())
        assert healthy.mean < TOLERANCE["float32"] / 10
        assert healthy.largest < AGREEMENT
        name = "model.layers.0.self_attn.v_proj.weight"
        engine.load({name: moved(engine.weights)[name]}, tmp_path / "stale")
        with pytest.raises(WeightSyncError, match="computes other log-probs than the trainer"):
            check_canary(server.url, 1, asyncio.run(gap()), TOLERANCE["float32"])
    finally:
        engine.load(engine.weights, tmp_path / "whole")  # as the other tests find it
