"""Servers with weights in fp8: what is published, what they hold, and what they compute, against SGLang's own functions and a
second reading of the format. The products on CPUs are this package's (`engine.sglang.fp8`); those of GPUs have not been run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from torch import Tensor

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftConfig
from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport, DiskTransport, Transport
from ctpo_megatron.engine import fp8
from ctpo_megatron.engine.checksums import read_digests
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.weights.proof.attest import compare
from ctpo_megatron.weights.proof.canary import canary_batch, canary_gap, canary_tokens, canary_tolerance
from ctpo_megatron.weights.protocol import Server
from ctpo_megatron.weights.source import RankWeights
from tests.support import fp8_blocks as slow
from tests.support.engines import TIMEOUT_S, RunningServer, session, start_server
from tests.support.families import MODELS
from tests.support.ranks import run_ranks
from tests.support.stand_in import VOCAB, write_stand_in
from tests.support.tiny import write_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore")]  # of SGLang's imports

HOST = "127.0.0.1"
# a dense layer, and one of experts, shared and routed, that two ranks share in whole blocks
MIXTURE = MODELS["glm4_moe"] | {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256}
MIXTURE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB}
PROMPTS = [canary_tokens(VOCAB, version) for version in range(4)]
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def mixture(forks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """On two ranks; it starts with random weights."""
    root = tmp_path_factory.mktemp("mixture")
    model = write_model(root / "model", "", options=MIXTURE)
    running = start_server(model, root / "server.log", tp=2, forks=forks, quantised=True)
    yield running
    running.server.stop()


@pytest.fixture(scope="module")
def dense(forks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("dense")
    model = write_stand_in(root / "model", mixture=False, layers=1, num_key_value_heads=4)
    running = start_server(model, root / "server.log", forks=forks, quantised=True, dtype="float16")
    yield running
    running.server.stop()


def logps(running: RunningServer) -> list[list[float]]:
    async def ask() -> list[list[float]]:
        async with running.client() as client:
            return [await client.control.prompt_logprobs(running.url, prompt) for prompt in PROMPTS]

    return asyncio.run(ask())


@dataclass(frozen=True)
class Site:
    """A server, as a trainer's rank knows it."""

    url: str
    api_key: str
    tp: int

    def holds(self) -> list[dict[str, int]]:
        key = {"Authorization": f"Bearer {self.api_key}"}
        answer = requests.post(f"{self.url}/weights_checker", json={"action": "checksum"}, headers=key, timeout=TIMEOUT_S)
        return read_digests(answer.json(), self.url)


def publish(rank: RankInfo, site: Site, model: str, ways: list[tuple[Transport, list[float]]]) -> list[dict[str, Any]]:
    """By each transport all weights, then what has changed; before each publication a matrix is multiplied by a factor.

    Per publication what was sent, and what the server held then. At last what the trainer computes.
    """
    engine = TrainerRank(model, ParallelConfig(), None, rank, device="cpu", dtype="bfloat16", seed=1)
    found, matrix = [], engine.pieces()[f"decoder.layers.{engine.shape.num_layers - 1}.self_attention.linear_proj.weight"]
    for transport, factors in ways:
        weights = RankWeights(engine, transport, tp=site.tp, address=HOST)
        weights.connect([Server(site.url, site.tp)], site.api_key)
        for version, factor in enumerate(factors, 1):
            matrix *= factor
            weights.prepare(version)
            if transport.needs_session:
                session(site, "begin")
            sent = weights.publish(version)
            if transport.needs_session:
                session(site, "end")
            found.append({"sent": sent, "held": site.holds()})
        weights.close()
    own = [engine.logp(engine.place([canary_batch(prompt, 2)]), temperature=1.0)[0] for prompt in PROMPTS]
    engine.close()
    return [*found, {"logp": [each[: len(PROMPTS[0]) - 1].tolist() for each in own]}]


def published(running: RunningServer, *ways: tuple[Transport, list[float]]) -> list[dict[str, Any]]:
    site = Site(running.url, running.api_key, running.tp)
    (found,) = run_ranks(1, publish, site, str(running.model), list(ways))
    return found


def test_servers_hold_what_was_sent(mixture: RunningServer, tmp_path: Path) -> None:
    """Bytes and scales, of linear layers and experts, on both ranks, by every transport; nothing less and nothing else."""
    layout = EngineLayout(read_hf_config(mixture.model), mixture.tp, cpu=True, quantised=True)
    before = Site(mixture.url, mixture.api_key, mixture.tp).holds()
    common = {"quantization": "fp8", "timeout_s": 60.0}
    first, again, larger, handed, read, _ = published(
        mixture,
        (BroadcastTransport(delta=True, **common), [1.0, 1 + 2**-12, 2.0]),
        (ColocatedTransport(release=False, **common), [0.5]),
        (DiskTransport(directory=str(tmp_path), **common), [4.0]),
    )
    assert {each.tensor for each in compare(layout, first["sent"].digests, before)} == layout.tensors, "random weights at first"
    assert [each["sent"].tensors for each in (first, again, larger, handed, read)] == [
        *(len(layout.names), 0, 1),  # what rounding takes away is not sent; twice as large: other scales, the same bytes
        *(len(layout.names), len(layout.names)),
    ]
    for each in (first, again, larger, handed, read):
        assert compare(layout, each["sent"].digests, each["held"]) == []
    for each in (larger, read):
        stale = compare(layout, first["sent"].digests, each["held"])
        assert {difference.tensor for difference in stale} == {f"{O_PROJ}_scale_inv"}, "a wrong scale beside the right bytes"
    assert first["held"] == again["held"] == handed["held"]


def test_what_servers_compute(dense: RunningServer) -> None:
    """The model that their bytes stand for, with activations in fp8: they agree with a second reading, not with the trainer.

    In float16, since rounding to bfloat16 between products is enough to send many activations to the next number of fp8.
    """
    _, found = published(dense, (BroadcastTransport(quantization="fp8", timeout_s=60.0), [1.0]))
    served = logps(dense)
    reference = second_reading(dense.model)
    to_reading = [canary_gap(mine, theirs) for mine, theirs in zip(reference, served, strict=True)]
    to_trainer = [canary_gap(mine, theirs) for mine, theirs in zip(found["logp"], served, strict=True)]
    print("to the reading", [round(gap.mean, 4) for gap in to_reading], max(gap.largest for gap in to_reading))
    print("to the trainer", [round(gap.mean, 4) for gap in to_trainer], max(gap.largest for gap in to_trainer))
    assert fmean(gap.mean for gap in to_reading) < 0.6 * fmean(gap.mean for gap in to_trainer)
    assert max(gap.mean for gap in to_trainer) < canary_tolerance("bfloat16", mixture=False, replayed=False, quantised=True)
    bound = DriftConfig().bounds("bfloat16", mixture=False, quantised=True).mean
    assert bound is not None
    assert fmean(gap.mean for gap in to_trainer) < bound


@torch.no_grad()
def second_reading(model: Path) -> list[list[float]]:
    """Log-probs of the prompts by transformers, in float32 but for products of layers, by the second reading of fp8."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float().eval()
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            stands_for = torch.from_numpy(slow.stands_for(*slow.blocks(module.weight.float().numpy())))
            module.forward = lambda x, weight=stands_for: product(x, weight)
    found = []
    for prompt in PROMPTS:
        logits = reference(torch.tensor([prompt])).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None]).squeeze(-1).tolist())
    return found


def product(x: Tensor, weight: Tensor) -> Tensor:
    rounded = slow.rounded_activations(x.reshape(-1, x.shape[-1]).float().numpy())
    return (torch.from_numpy(rounded) @ weight.T).to(x.dtype).view(*x.shape[:-1], -1)


def test_blocks_are_sglangs() -> None:
    """Each block is what SGLang's own quantiser of a tensor makes of it, bit for bit, and its reader reads the same numbers."""
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant, input_to_float8

    weight = (torch.randn(300, 400, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    quantised, scales = fp8.quantised_matrix(weight)
    for i, j in np.ndindex(*scales.shape):
        place = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        expected, scale = input_to_float8(weight[place])
        assert torch.equal(quantised[place].view(torch.uint8), expected.view(torch.uint8))
        assert scales[i, j] == scale
    assert torch.equal(fp8.matrix_of(quantised, scales), block_quant_dequant(quantised, scales, [128, 128], torch.float32))


def test_sglangs_own_products_still_want_a_device() -> None:
    """Should this not fail any more, `engine.sglang.fp8` may go."""
    from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

    weight, scales = fp8.quantised_matrix(torch.ones(128, 128))
    with pytest.raises(Exception, match=r"(?i)driver|cuda|triton|device"):
        triton_w8a8_block_fp8_linear(torch.ones(2, 128, dtype=torch.bfloat16), weight, [128, 128], scales)


def test_linear_layers_in_fp8() -> None:
    """The product of the second reading, to the last place of the number format, whatever the tokens' shape; then the bias."""
    from ctpo_megatron.engine.sglang.fp8 import linear

    generator = torch.Generator().manual_seed(3)
    x, given = torch.randn(2, 3, 256, generator=generator), torch.randn(384, 256, generator=generator) * 0.05
    quantised, scales = fp8.quantised_matrix(given)
    layer = SimpleNamespace(weight=quantised, weight_scale_inv=scales)
    stands_for = torch.from_numpy(slow.stands_for(*slow.blocks(given.numpy())))
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        expected = product(x.to(dtype), stands_for)
        found = linear(None, layer, x.to(dtype))
        assert (found.dtype, found.shape) == (dtype, (2, 3, 384))
        torch.testing.assert_close(found, expected, rtol=near, atol=1e-5)
        assert not torch.allclose(found, (x.to(dtype) @ stands_for.T.to(dtype)), rtol=near, atol=1e-3), "activations in fp8"
        bias = torch.randn(384, generator=generator).to(dtype)
        assert torch.equal(linear(None, layer, x.to(dtype), bias), found + bias)


def test_experts_in_fp8() -> None:
    """Each token is the sum over its experts, by its gates, of what a loop over tokens makes of it."""
    from ctpo_megatron.engine.sglang.fp8 import experts

    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(3, 512, 128, generator=generator) * 0.1, torch.randn(3, 128, 256, generator=generator) * 0.1
    w13, w2 = ([fp8.quantised_matrix(each.bfloat16()) for each in matrices] for matrices in (up, down))
    layer = SimpleNamespace(
        w13_weight=torch.stack([q.view(torch.uint8) for q, _ in w13]).view(fp8.DTYPE),
        w13_weight_scale_inv=torch.stack([s for _, s in w13]),
        w2_weight=torch.stack([q.view(torch.uint8) for q, _ in w2]).view(fp8.DTYPE),
        w2_weight_scale_inv=torch.stack([s for _, s in w2]),
    )
    x, chosen = torch.randn(4, 128, generator=generator).bfloat16(), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 1]])
    gates = torch.rand(4, 2, generator=generator)
    method = SimpleNamespace(moe_runner_config=SimpleNamespace(activation="silu", apply_router_weight_on_input=False))
    given = SimpleNamespace(hidden_states=x, topk_output=(gates, chosen, None))
    found = experts(method, layer, given).hidden_states
    for token in range(4):
        expected = torch.zeros(128)
        for gate, expert in zip(gates[token], chosen[token].tolist(), strict=True):
            made = product(x[token : token + 1], fp8.matrix_of(*w13[expert]))
            inner = torch.nn.functional.silu(made[:, :256]) * made[:, 256:]
            expected += gate * product(inner, fp8.matrix_of(*w2[expert]))[0].float()
        torch.testing.assert_close(found[token].float(), expected, rtol=2**-7, atol=1e-3)
    method.moe_runner_config.activation = "gelu"
    with pytest.raises(NotImplementedError, match="only gated silu"):
        experts(method, layer, given)
