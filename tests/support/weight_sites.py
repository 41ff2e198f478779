"""What the tests of weights on their way share: servers of a model, and what has to hold after every publication."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ctpo_megatron.engine.server import new_api_key
from ctpo_megatron.weights.protocol import Sent, Server
from tests.support.engines import START_S, RunningServer, start_server
from tests.support.ranks import free_port, run_ranks
from tests.support.weight_ranks import Case, Site, State, publish_everything

KINDS = ("broadcast", "colocated", "disk")


@contextmanager
def serving(models: list[tuple[Path, int]], logs: Path, forks: Path) -> Iterator[list[RunningServer]]:
    """Servers, each of a model on a number of ranks; they start together and have one key."""
    key = new_api_key()
    options = {"wait": False, "key": key, "forks": forks}
    running = [start_server(model, logs / f"{n}.log", tp=tp, **options) for n, (model, tp) in enumerate(models)]
    try:
        for each in running:
            each.server.wait_healthy(START_S)
        yield running
    finally:
        for each in running:
            each.server.stop()


def site_of(running: list[RunningServer]) -> Site:
    return Site([Server(each.url, each.tp) for each in running], running[0].api_key)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def other_weights(model: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors_of(model).items()}


def write_weights(directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def check_publications(cases: list[Case], started: list[State], root: Path) -> None:
    """Every case from four ranks, to servers that were in the state `started` after loading the case's model at their start."""
    ranks = run_ranks(4, publish_everything, cases, root, [free_port() for _ in cases], timeout_s=500)
    for number, (case, state) in enumerate(zip(cases, started, strict=True)):
        check_case(case, state, [rank[number] for rank in ranks], root / str(number))


def check_case(case: Case, started: State, ranks: list[dict[str, Any]], exported: Path) -> None:
    """After each publication the servers hold and say, bit for bit, what servers loaded from the export hold and say."""
    full, nudged = ranks[0]["loaded"]
    old, new = tensors_of(exported / "full"), tensors_of(exported / "nudged")
    changed = sum(not torch.equal(old[name], new[name]) for name in old)
    assert 3 < changed < len(old), case
    assert not full.differences(started), f"{case}: the export is what was loaded"
    assert all(before != after for before, after in zip(full.greedy, nudged.greedy, strict=True)), case
    for kind in case.kinds:
        where = f"{kind}: {case}"
        found = [rank[kind] for rank in ranks]
        assert all({"greedy"} < set(found[0]["before"].differences(each)) for each in (full, nudged)), where
        held = found[0]["held"]
        assert [now.differences(loaded) for now, loaded in zip(held, (full, nudged), strict=True)] == [[], []], where
        whole, delta = (functools.reduce(Sent.merge, (each["sent"][version] for each in found)) for version in (0, 1))
        assert (whole.tensors, delta.tensors) == (len(old), changed), where
        senders = sum(each["sent"][0].tensors > 0 for each in found)
        places = 1 if kind == "broadcast" else case.layout.get("ep", 1)  # each sender by broadcast has a communicator
        assert senders == case.layout.get("pp", 1) * places, where
    if "disk" in case.kinds:
        assert sorted(path.name for path in (exported / "versions").iterdir()) == ["v000001", "v000002"]
