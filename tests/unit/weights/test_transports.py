"""What the transports of weights decide without a server: who sends what, in which turn, and what has changed."""

from __future__ import annotations

import json
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport, DiskTransport, Transport
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.models.owners import Holders, Holding, make_buckets, nbytes, unit_of
from ctpo_megatron.models.rules import stage_layers
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import COLUMN, GATE_UP, HfTensor, hf_tensors
from ctpo_megatron.weights.protocol import Bucket, Sent
from ctpo_megatron.weights.transports.delta import Changes
from ctpo_megatron.weights.transports.flat import flatten
from ctpo_megatron.weights.transports.order import SenderOrder
from ctpo_megatron.weights.transports.prefetch import deliver, send_account

CPU = torch.device("cpu")
LAYERS, EXPERTS = 4, 8
MODELS = Path(__file__).resolve().parents[3] / "configs" / "models"


def tensors() -> list[HfTensor]:
    """A dense and eight experts' tensors per layer."""
    found = [HfTensor("embed", (8, 4), "embedding.word_embeddings.weight", 0, COLUMN)]
    for layer in range(LAYERS):
        found.append(HfTensor(f"layers.{layer}.o", (4, 4), f"o{layer}", 0, COLUMN, layer))
        found += [HfTensor(f"layers.{layer}.e.{e}", (4, 4), f"e{layer}.{e}", 0, GATE_UP, layer, e) for e in range(EXPERTS)]
    return [*found, HfTensor("norm", (4,), "norm", 0, COLUMN)]


def everyone(*, tp: int, pp: int, dp: int, ep: int, etp: int) -> list[Holding]:
    """Megatron's order of ranks: tensor parallelism is innermost, then data; among experts etp, then ep."""
    per_stage = tp * dp
    return [
        Holding(
            coords=RankCoords(
                tp_rank=rank % tp, tp_size=tp, ep_rank=rank // etp % ep, ep_size=ep, etp_rank=rank % etp, etp_size=etp
            ),
            layers=tuple(range(stage * LAYERS // pp, (stage + 1) * LAYERS // pp)),
            first=stage == 0,
            last=stage == pp - 1,
        )
        for stage in range(pp)
        for rank in range(per_stage)
    ]


@pytest.mark.parametrize(
    ("layout", "senders"),
    [
        ({"tp": 1, "pp": 1, "dp": 4, "ep": 1, "etp": 1}, [0]),
        ({"tp": 2, "pp": 1, "dp": 2, "ep": 1, "etp": 2}, [0]),
        ({"tp": 2, "pp": 2, "dp": 1, "ep": 2, "etp": 1}, [0, 1, 2, 3]),
        ({"tp": 2, "pp": 2, "dp": 2, "ep": 2, "etp": 2}, [0, 2, 4, 6]),
        ({"tp": 1, "pp": 2, "dp": 4, "ep": 2, "etp": 1}, [0, 1, 4, 5]),
    ],
)
def test_every_tensor_has_one_sender(layout: dict[str, int], senders: list[int]) -> None:
    holders = Holders(everyone(**layout), EXPERTS)
    shares = holders.shares(tensors())
    assert list(shares) == senders
    assert sorted(t.name for share in shares.values() for t in share) == sorted(t.name for t in tensors())
    for rank, share in shares.items():
        assert all(holders.of(tensor)[0] == rank for tensor in share)
        experts = [tensor for tensor in share if tensor.expert is not None]
        assert len(experts) == LAYERS * EXPERTS // layout["pp"] // layout["ep"]
        dense_pieces = {len(holders.of(tensor)) for tensor in share if tensor.expert is None}
        assert dense_pieces <= {layout["tp"]}
        assert {len(holders.of(tensor)) for tensor in experts} == {layout["etp"]}


@pytest.mark.parametrize(
    ("layout", "senders"),
    [
        ({"tp": 1, "pp": 1, "dp": 4, "ep": 1, "etp": 1}, [0]),
        ({"tp": 2, "pp": 2, "dp": 1, "ep": 2, "etp": 1}, [0, 2]),
        ({"tp": 2, "pp": 2, "dp": 2, "ep": 2, "etp": 2}, [0, 4]),
        ({"tp": 1, "pp": 2, "dp": 4, "ep": 4, "etp": 1}, [0, 4]),
    ],
)
def test_one_sender_per_stage(layout: dict[str, int], senders: list[int]) -> None:
    """It sends the stage's tensors, other ranks' experts too; their pieces are joined from the same ranks as ever."""
    holders = Holders(everyone(**layout), EXPERTS)
    shares = holders.shares(tensors(), per_stage=True)
    assert list(shares) == senders
    assert sorted(t.name for share in shares.values() for t in share) == sorted(t.name for t in tensors())
    for rank, share in shares.items():
        assert sum(tensor.expert is not None for tensor in share) == LAYERS * EXPERTS // layout["pp"]
        assert all(holders.sender(tensor, per_stage=True) == rank for tensor in share)
        stage = range(rank, rank + layout["tp"] * layout["dp"])
        assert {piece for tensor in share for piece in holders.of(tensor)} <= set(stage)


@pytest.mark.parametrize("path", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_communicators_and_bytes_of_the_shipped_layouts(path: Path) -> None:
    """By broadcast a server's rank joins one group for each pipeline stage; no bucket is larger than was asked for."""
    config = load_config(MODELS.parent / f"{path.name}.yaml", [])
    shape = parse_config(json.loads((path / "config.json").read_text()))
    parallel, weights = config.parallel, config.weights
    assert isinstance(weights, BroadcastTransport)
    assert weights.sends_per_stage
    found = Holders(holdings(shape, parallel), shape.num_experts).shares(hf_tensors(shape), per_stage=weights.sends_per_stage)
    assert len(found) == parallel.pp
    limit = weights.bucket_mb * 2**20
    for share in found.values():
        for bucket in make_buckets(share, 2, limit):
            assert sum(nbytes(tensor, 2) for tensor in bucket) <= limit or len({unit_of(tensor.name) for tensor in bucket}) == 1
    assert max(nbytes(tensor, 2) for tensor in hf_tensors(shape)) < 4 * limit, "the vocabulary"


def holdings(shape: ModelShape, parallel: ParallelConfig) -> list[Holding]:
    """What each rank has, in megatron's order of ranks: tp-cp-dp-pp, experts etp-ep-edp-pp."""
    per_stage = parallel.tp * parallel.cp * parallel.dp
    return [
        Holding(
            coords=RankCoords(
                tp_rank=rank % parallel.tp,
                tp_size=parallel.tp,
                ep_rank=rank // parallel.etp % parallel.ep,
                ep_size=parallel.ep,
                etp_rank=rank % parallel.etp,
                etp_size=parallel.etp,
            ),
            layers=tuple(layer for chunk in chunks for layer in chunk),
            first=stage == 0,
            last=stage == parallel.pp - 1,
        )
        for stage, chunks in enumerate(stage_layers(shape, parallel))
        for rank in range(per_stage)
    ]


def test_buckets_keep_together_what_the_engine_joins() -> None:
    names = [
        "a.q_a_proj.weight",
        "a.q_a_layernorm.weight",
        "a.q_b_proj.weight",
        "a.kv_a_proj_with_mqa.weight",
        "b.q_a_proj.weight",
    ]
    made = make_buckets([HfTensor(name, (10,), name, 0, COLUMN) for name in names], 4, 80)
    assert [[tensor.name for tensor in bucket] for bucket in made] == [[names[0], names[3]], names[1:3], [names[4]]]


def test_flat_bucket_is_a_view_where_it_can_be() -> None:
    room = torch.arange(64, dtype=torch.uint8)
    bucket = [("wide", room[:16].view(torch.float32)), ("narrow", room[16:40].view(torch.bfloat16).view(3, 4))]
    flat = flatten(bucket, CPU)
    assert flat.data.data_ptr() == room.data_ptr()
    assert torch.equal(flat.data, room[:40])
    assert flat.metadata == {"names": ["wide", "narrow"], "dtypes": ["float32", "bfloat16"], "shapes": [[4], [3, 4]]}
    mixed = flatten(bucket[::-1], CPU)  # would not be aligned
    assert mixed.metadata["names"] == ["wide", "narrow"]
    assert torch.equal(mixed.data, room[:40])
    assert torch.equal(flatten([("t", torch.arange(6.0).view(2, 3).t())], CPU).bucket[0][1], torch.arange(6.0).view(2, 3).t())


def test_changes_are_units_that_differ_bitwise() -> None:
    changes = Changes(enabled=True)
    weights = {"m.q_a_proj.w": torch.ones(4), "m.kv_a_proj_with_mqa.w": torch.zeros(4), "other": torch.ones(3)}
    assert changes.full
    assert changes.pick(list(weights.items())) == list(weights.items())
    assert changes.pick(list(weights.items())), "not committed yet"
    changes.commit()
    assert changes.pick(list(weights.items())) == []
    weights["m.kv_a_proj_with_mqa.w"] = -torch.zeros(4)  # equal in value, not in bits
    assert [name for name, _ in changes.pick(list(weights.items()))] == ["m.q_a_proj.w", "m.kv_a_proj_with_mqa.w"]
    changes.forget()
    assert len(changes.pick(list(weights.items()))) == 3
    assert len(Changes(enabled=False).pick(list(weights.items()))) == 3


def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(of: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", of.port, is_master=False, wait_for_workers=False)


def test_turns_go_round_in_order() -> None:
    shared, events = store(), []

    def sender(place: int) -> None:
        turns = SenderOrder(client(shared), place, 3)
        for number in range(2):
            time.sleep(0.05 * (2 - place))  # the last asks first
            with turns.take_with(lambda: events.append("ready"), time.monotonic() + 20):
                events.append((number, place))
            turns.conclude(time.monotonic() + 20)

    threads = [threading.Thread(target=sender, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [event for event in events if event != "ready"] == [(number, place) for number in range(2) for place in range(3)]
    assert events[0] == "ready"


def test_failure_reaches_the_senders_behind() -> None:
    shared = store()
    first, second, third = (SenderOrder(client(shared), place, 3) for place in range(3))
    deadline = time.monotonic() + 20
    with pytest.raises(WeightSyncError, match="server is gone"), first.take(deadline):
        raise WeightSyncError("server is gone", servers=["http://b"])
    for later in (second, third):
        with pytest.raises(WeightSyncError, match="server is gone") as raised, later.take(deadline):
            pytest.fail("must not send")
        assert raised.value.servers == ("http://b",)
    with pytest.raises(WeightSyncError, match="server is gone"):
        first.conclude(deadline)
    for turns in (first, second, third):  # the next round is unharmed
        with turns.take(deadline):
            pass


def test_preparation_that_fails_is_passed_on() -> None:
    shared = store()
    first, second = (SenderOrder(client(shared), place, 2) for place in range(2))

    def broken() -> None:
        raise ValueError("no bucket")

    with pytest.raises(ValueError, match="no bucket"), first.take_with(broken, time.monotonic() + 5):
        pytest.fail("must not send")
    with pytest.raises(WeightSyncError, match="ValueError: no bucket"), second.take(time.monotonic() + 5):
        pytest.fail("must not send")


def test_a_silent_sender_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.weights.transports.order.VERDICT_TIME_S", 0.2)
    shared = store()
    turns, begin = SenderOrder(client(shared), 1, 2), time.monotonic()
    with pytest.raises(WeightSyncError, match="sender 1 of 2 waited"), turns.take(begin + 0.3):
        pytest.fail("must not send")
    assert time.monotonic() - begin < 5


def test_next_bucket_is_gathered_while_the_present_one_travels() -> None:
    events: list[str] = []

    def stream() -> Iterator[Bucket]:
        for number in range(3):
            events.append(f"gather {number}")
            yield [(f"t{number}", torch.ones(2))] if number != 1 else []

    def start(bucket: Bucket, number: int):
        events.append(f"start {bucket[0][0]}")
        return lambda: events.append(f"finish {number}")

    with send_account(stream(), 7, Changes(enabled=False), None) as account:
        sent = deliver(account, SenderOrder.alone(), time.monotonic() + 5, start)
    assert events == ["gather 0", "start t0", "gather 1", "gather 2", "finish 0", "start t2", "finish 1"]
    assert (sent.version, sent.tensors, sent.bytes) == (7, 2, 16)
    assert sent.seconds.keys() == {"gather", "digest", "wait", "send"}


def test_a_sender_holds_two_buckets() -> None:
    """While one is gathered only the one that travels is still held, so the memory of those before can be used again."""
    made: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def new() -> Tensor:
        tensor = torch.ones(3)
        made.append(weakref.ref(tensor))
        return tensor

    def stream() -> Iterator[Bucket]:
        for number in range(6):
            held.append(sum(tensor() is not None for tensor in made))
            yield [(str(number), new())]

    def start(bucket: Bucket, _number: int):
        def finish(_kept: Bucket = bucket) -> None:
            """Until it has arrived."""

        return finish

    with send_account(stream(), 1, Changes(enabled=False), None) as account:
        deliver(account, SenderOrder.alone(), time.monotonic() + 5, start)
    assert held == [0, 1, 1, 1, 1, 1]


def test_a_failed_sender_reads_its_stream_to_the_end() -> None:
    gathered, changes = [], Changes(enabled=True)
    changes.pick([("old", torch.ones(1))])
    changes.commit()

    def stream() -> Iterator[Bucket]:
        for number in range(5):
            gathered.append(number)
            yield [(str(number), torch.ones(1))]

    def start(_bucket: Bucket, _number: int):
        raise WeightSyncError("gone")

    with pytest.raises(WeightSyncError, match="gone"), send_account(stream(), 1, changes, None) as account:
        deliver(account, SenderOrder.alone(), time.monotonic() + 5, start)
    assert gathered == [0, 1, 2, 3, 4]
    assert changes.full, "what the servers hold is not known"


def test_sent_adds_up() -> None:
    one, two = Sent(3, 1, 10, [{"a": 2**64 - 1}], {"send": 1.0}), Sent(3, 2, 20, [{"a": 2, "b": 5}], {"send": 2.0, "gather": 1.0})
    both = one.merge(two).merge(Sent(3))
    assert both == Sent(3, 3, 30, [{"a": 1, "b": 5}], {"send": 3.0, "gather": 1.0})


def test_error_keeps_its_servers_on_the_way_out_of_a_process() -> None:
    error = pickle.loads(pickle.dumps(WeightSyncError("b is gone", servers=["http://b"])))
    assert (str(error), error.servers) == ("b is gone", ("http://b",))
    assert WeightSyncError("unknown").servers == ()


def test_transports_in_the_configuration() -> None:
    adapter = TypeAdapter(Transport)
    disk = adapter.validate_python({"type": "disk", "directory": "/shared", "delta": True})
    assert disk == DiskTransport(directory="/shared", delta=True)
    assert adapter.validate_python({"type": "broadcast"}).bucket_mb == 512
    assert [each.sends_per_stage for each in (BroadcastTransport(), ColocatedTransport(), disk)] == [True, False, False]
    with pytest.raises(ValidationError, match="directory"):
        adapter.validate_python({"type": "disk"})
    with pytest.raises(ValidationError, match="'broadcast', 'colocated', 'disk'"):
        adapter.validate_python({"type": "pigeon"})
