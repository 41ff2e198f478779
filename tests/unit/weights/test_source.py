"""A trainer rank's half of a publication, over a rank without a model and a server that takes whatever it is given."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from ctpo_megatron.batch import MicroBatch, Replay
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.weights import DiskTransport
from ctpo_megatron.engine.checksums import EngineDigests
from ctpo_megatron.engine.fp8 import matrix_of
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.models.adapters import part_name
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.quantised import served_tensors
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from ctpo_megatron.weights.protocol import Bucket, Server
from ctpo_megatron.weights.source import RankWeights
from ctpo_megatron.weights.tracking import Tracked
from tests.support.willing_server import willing_server

MODEL = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
BLOCKS = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
MODEL |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 75, "max_position_embeddings": 128, "hidden_act": "silu"}


class FakeRank:
    """Streams each tensor of the model in a bucket of its own, filled with `value`; counts what was gathered."""

    device = torch.device("cpu")
    token_multiple = 1

    def __init__(self, *, pp: int = 1, vpp: int = 1, last: bool = True) -> None:
        self.shape = parse_config(MODEL)
        self.parallel = ParallelConfig(pp=pp, vpp=vpp)
        self.value = 1.0
        self.values: dict[str, float] = {}  # of some parameters, by key
        self.gathered = 0
        self.last = last
        self.asked: list[int] = []  # micro-batches of each call of logp
        self.per_stage: list[bool] = []  # how senders and streams were asked for
        self.replays: list[Replay | None] = []  # of all of them

    def senders(self, *, per_stage: bool) -> list[int]:
        self.per_stage = [per_stage]
        return [0]

    def pieces(self) -> dict[str, Tensor]:
        return {tensor.key: torch.full(tensor.shape, self.value_of(tensor.key)) for tensor in hf_tensors(self.shape)}

    def value_of(self, key: str) -> float:
        return self.values.get(key, self.value)

    def stream(self, bucket_bytes: int, *, per_stage: bool, memory: object, only: Collection[str] | None) -> Iterator[Bucket]:
        assert bucket_bytes == 2**20
        assert memory is not None
        self.per_stage.append(per_stage)
        for tensor in hf_tensors(self.shape):
            if only is None or tensor.key in only:
                self.gathered += 1
                yield [(tensor.name, torch.full(tensor.shape, self.value_of(tensor.key)))]

    def place(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        return micro_batches

    def logp(self, micro_batches: list[MicroBatch], temperature: float) -> list[Tensor]:
        assert temperature == 1.0
        self.asked.append(len(micro_batches))
        self.replays += [batch.replay for batch in micro_batches]
        return [torch.arange(len(batch.tokens.labels)).float() for batch in micro_batches] if self.last else []


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def rank() -> FakeRank:
    return FakeRank()


@pytest.fixture
def weights(rank: FakeRank, tmp_path: Path, _one_rank: None) -> Iterator[RankWeights]:
    found = RankWeights(rank, DiskTransport(directory=str(tmp_path), bucket_mb=1, timeout_s=10), tp=1, address="127.0.0.1")
    yield found
    found.close()


def test_a_prepared_publication(rank: FakeRank, weights: RankWeights, tmp_path: Path) -> None:
    """The first bucket is gathered before anything is sent, and once only; what is sent is what the digests say."""
    count = len(hf_tensors(rank.shape))
    with willing_server() as (url, asked):
        weights.connect([Server(url)], "key")
        weights.prepare(1)
        assert (rank.gathered, asked) == (1, ["/model_info"])
        sent = weights.publish(1)
        assert asked == ["/model_info", "/update_weights_from_disk"]
    assert (rank.gathered, sent.version, sent.tensors) == (count, 1, count)
    assert rank.per_stage == [False, False], "files are written where experts lie"
    expected = ExpectedDigests(EngineLayout(rank.shape, 1, cpu=True))
    expected.add([(tensor.name, torch.ones(tensor.shape)) for tensor in hf_tensors(rank.shape)])
    assert sent.digests == expected.digests()
    manifest = json.loads((tmp_path / "v000001" / "manifest.json").read_text())
    assert manifest["tensors"].keys() == {tensor.name for tensor in hf_tensors(rank.shape)}


def test_what_was_prepared_for_another_version_is_not_sent(rank: FakeRank, weights: RankWeights, tmp_path: Path) -> None:
    with willing_server() as (url, _):
        weights.connect([Server(url)], "key")
        weights.prepare(1)
        rank.value = 2.0
        weights.publish(2)
    tensors = [tensor for file in (tmp_path / "v000002").glob("*.safetensors") for tensor in load_file(file).values()]
    assert {float(tensor.mean()) for tensor in tensors} == {2.0}


def test_sending_without_servers(rank: FakeRank, weights: RankWeights) -> None:
    """The error says what to do, and the stream is read to its end all the same: other ranks would wait."""
    with willing_server() as (url, _):
        weights.connect([Server(url)], "key")
    weights.close()
    weights.close()
    with pytest.raises(WeightSyncError, match="no inference server is connected: call connect"):
        weights.publish(1)
    assert rank.gathered == len(hf_tensors(rank.shape))


CHANGED = "decoder.layers.0.mlp.linear_fc1.weight"  # of gate and up


@pytest.fixture
def deltas(rank: FakeRank, tmp_path: Path, _one_rank: None) -> Iterator[RankWeights]:
    transport = DiskTransport(directory=str(tmp_path), bucket_mb=1, timeout_s=10, delta=True)
    found = RankWeights(rank, transport, tp=1, address="127.0.0.1")
    yield found
    found.close()


def digests_of(rank: FakeRank) -> EngineDigests:
    expected = ExpectedDigests(EngineLayout(rank.shape, 1, cpu=True))
    expected.add([(each.name, torch.full(each.shape, rank.value_of(each.key))) for each in hf_tensors(rank.shape)])
    return expected.digests()


def test_a_delta_gathers_what_has_changed_alone(rank: FakeRank, deltas: RankWeights) -> None:
    """It is found before the pause; the digests are those of all tensors. A version that changes nothing gathers nothing."""
    count = len(hf_tensors(rank.shape))
    with willing_server() as (url, asked):
        deltas.connect([Server(url)], "key")
        deltas.prepare(1)
        assert deltas.publish(1).tensors == rank.gathered == count
        for version, values, differ in ((2, {CHANGED: 3.0}, 2), (3, {CHANGED: 3.0}, 0), (4, {}, 2)):
            rank.values, rank.gathered, before = values, 0, list(asked)
            deltas.prepare(version)
            assert (rank.gathered, asked) == (min(differ, 1), before)
            sent = deltas.publish(version)
            assert (rank.gathered, sent.tensors) == (differ, differ)
            assert sent.digests == digests_of(rank)


def test_all_weights_go_to_servers_that_are_connected_anew(rank: FakeRank, deltas: RankWeights) -> None:
    """Also where a delta was prepared for those before, and after a failure."""
    count = len(hf_tensors(rank.shape))
    with willing_server() as (url, _):
        deltas.connect([Server(url)], "key")
        deltas.publish(1)
        rank.values = {CHANGED: 3.0}
        deltas.prepare(2)
        deltas.connect([Server(url)], "key")
        sent = deltas.publish(2)
        assert (sent.tensors, sent.digests) == (count, digests_of(rank))
        deltas.close()
        rank.values = {}
        with pytest.raises(WeightSyncError, match="no inference server is connected"):
            deltas.publish(3)
        deltas.connect([Server(url)], "key")
        sent = deltas.publish(3)
        assert (sent.tensors, sent.digests) == (count, digests_of(rank))


def test_a_rank_that_sends_nothing_gathers_all_the_same(weights: RankWeights, rank: FakeRank) -> None:
    weights.prepare(1)  # never connected, as ranks without a sender
    assert (weights.publish(1).tensors, rank.gathered) == (0, len(hf_tensors(rank.shape)))


def test_a_canary_in_fp8() -> None:
    """It is filled up to what products in fp8 are over."""
    rank = FakeRank()
    rank.token_multiple = 32
    weights = RankWeights(rank, DiskTransport(directory="/nowhere"), tp=1, address="127.0.0.1")
    assert len(weights.canary_logp([1, 2, 3])) == 32


@pytest.mark.usefixtures("_one_rank")
def test_servers_in_fp8(tmp_path: Path) -> None:
    """What is written, counted and digested are their bytes and scales; a delta is of what differs in these."""
    rank, directory = FakeRank(), str(tmp_path)
    rank.shape = parse_config(MODEL | BLOCKS)
    transport = DiskTransport(directory=directory, bucket_mb=1, timeout_s=10, delta=True, quantization="fp8")
    weights = RankWeights(rank, transport, tp=1, address="127.0.0.1")
    names = {each.name for each in served_tensors(hf_tensors(rank.shape))}
    with willing_server() as (url, _):
        weights.connect([Server(url)], "key")
        assert weights.publish(1).tensors == len(names)
        rank.values = {CHANGED: 3.0}
        sent = weights.publish(2)
    weights.close()
    assert sent.tensors == 2, "of gate and up the scales alone: each block's numbers are all its largest"
    first, second = (
        {name: each for file in (tmp_path / version).glob("*.safetensors") for name, each in load_file(file).items()}
        for version in ("v000001", "v000002")
    )
    assert first.keys() == names
    changed = {f"model.layers.0.mlp.{each}_proj.weight_scale_inv" for each in ("gate", "up")}
    assert second.keys() == changed
    for name in changed:
        held = matrix_of(first[name.removesuffix("_scale_inv")], second[name])
        torch.testing.assert_close(held, torch.full(held.shape, 3.0), rtol=1e-6, atol=0)
    expected = ExpectedDigests(EngineLayout(rank.shape, 1, cpu=True, quantised=True))
    expected.add(list((first | second).items()))
    assert sent.digests == expected.digests()


@pytest.mark.parametrize(("pp", "vpp", "calls"), [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_canary(pp: int, vpp: int, calls: int) -> None:
    """As many copies of the prompt as interleaved stages need; ranks before the last stage have no log-probs."""
    begin, end = FakeRank(pp=pp, vpp=vpp, last=False), FakeRank(pp=pp, vpp=vpp)
    nowhere = DiskTransport(directory="/nowhere")
    first, last = (RankWeights(rank, nowhere, tp=1, address="127.0.0.1") for rank in (begin, end))
    assert first.canary_logp([1, 2, 3]) == []
    assert last.canary_logp([1, 2, 3]) == [0.0, 1.0, 2.0, 3.0], "filled up to a multiple of two"
    assert end.asked == [calls]
    assert end.replays == [None] * calls
    last.canary_logp([1, 2, 3], np.zeros((3, 1, 2), np.int8))
    assert [replay.routed_experts.tolist() for replay in end.replays[calls:]] == [[[[0, 0]]] * 3 + [[[-1, -1]]]] * calls


@pytest.mark.usefixtures("_one_rank")
def test_an_adapter_that_moves_brings_the_tensor_that_it_belongs_to() -> None:
    tracked, base, other = Tracked(), torch.ones(4), torch.ones(2)
    parts = {"fc1.weight": base, "fc2.weight": other, part_name("fc1.weight", "gate.lora_B"): torch.zeros(3)}
    assert tracked.look(parts) is None, "what the servers hold is not known at first"
    tracked.commit()
    assert tracked.look(parts) == set()
    assert tracked.look(parts | {part_name("fc1.weight", "gate.lora_B"): torch.ones(3)}) == {"fc1.weight"}
