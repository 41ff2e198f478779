"""Rows of tools/gpu_check.py about processes beside each other: collectives, the update group, memory handed over."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing.reductions as reductions
from gpu_check_rows import Found, Place

from ctpo_megatron.engine.digest import tensor_digest
from ctpo_megatron.engine.update_group import join_update_group
from ctpo_megatron.ports import free_port

HOST = "127.0.0.1"
GROUP_TIMEOUT = timedelta(seconds=60)
HANDOVER_S, SPLIT_S = 60.0, 10.0


def one_rank_row(place: Place) -> Found:
    """The collectives that this package uses, in a world of one rank, on the device's own backend."""
    from ctpo_megatron.mcore.host import backend_for, prepare_host
    from ctpo_megatron.parallel.gather import all_gather_single

    device = prepare_host(place.device)
    store = dist.TCPStore(HOST, free_port(HOST), 1, is_master=True, timeout=GROUP_TIMEOUT)
    dist.init_process_group(backend_for(device), store=store, rank=0, world_size=1, timeout=GROUP_TIMEOUT)
    try:
        given, world = torch.arange(6.0, device=device), dist.group.WORLD
        assert world is not None
        box = ["said"]
        summed, sent, gathered = given.clone(), given.clone(), torch.empty_like(given)
        dist.all_reduce(summed)
        dist.broadcast(sent, src=0)
        all_gather_single(gathered, given, world)
        dist.broadcast_object_list(box, src=0, device=device)
        dist.barrier()
        right = {
            "all_reduce": torch.equal(summed, given),
            "broadcast": torch.equal(sent, given),
            "all_gather": torch.equal(gathered, given),
            "broadcast_object_list": box == ["said"],
            "scan": _scans_agree(world, device),
        }
    finally:
        dist.destroy_process_group()
    wrong = [name for name, holds in right.items() if not holds]
    return Found(f"wrong: {', '.join(wrong)}" if wrong else f"{len(right)} right", not wrong)


def _scans_agree(world: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the scan across ranks finds in one rank what the scan without a group does."""
    from ctpo_megatron.algorithms import Channel, LocalScan
    from ctpo_megatron.parallel import ContextParallelScan

    values = torch.linspace(-1, 1, 24, device=device)
    cu_seqlens = torch.tensor([0, 8, 24], dtype=torch.int32, device=device)
    alone, across = (scan.run([Channel(values)], cu_seqlens)[0] for scan in (LocalScan(), ContextParallelScan(world)))
    return torch.equal(alone.values, across.values) and torch.equal(alone.totals, across.totals)


def split_row(place: Place) -> Found:
    """Whether a broadcast in an update group of two, whose second rank never comes, waits for it.

    Where torch's default group is bound to a device, NCCL makes the new group by splitting the default one, which has one rank
    here: the broadcast then returns at once, and no server would ever get the weights. The default group is made as a trainer
    rank makes it.
    """
    from gpu_check_rank import trainer_rank

    rank = trainer_rank("dense", "bfloat16", place.device, place.folder)
    store = dist.TCPStore(HOST, free_port(HOST), 2, is_master=True, wait_for_workers=False, timeout=GROUP_TIMEOUT)
    ended: list[str] = []

    def join_and_send() -> None:
        try:
            group = join_update_group(store, "gpu_check", world_size=2, backend="nccl", timeout=timedelta(seconds=2 * SPLIT_S))
            dist.broadcast(torch.ones(8, device=rank.device), src=0, group=group)
            torch.cuda.synchronize()
            ended.append("it returned, with nobody to receive")
        except Exception as error:  # noqa: BLE001 - told below, from the thread that is asked
            ended.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=join_and_send, daemon=True)
    thread.start()
    thread.join(SPLIT_S)
    return Found(ended[0], False) if ended else Found(f"still waits after {SPLIT_S:.0f} s", True)


def handover_row(place: Place) -> Found:
    """Whether another process that maps a bucket finds the digests of its tensors, before and after they are changed in place."""
    from ctpo_megatron.weights.transports.colocated import handle
    from ctpo_megatron.weights.transports.flat import flatten

    device = torch.device(place.device, 0) if place.device == "cuda" else torch.device("cpu")
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(300, 129, generator=generator), torch.randn(7, generator=generator).bfloat16()]
    bucket = flatten([(f"tensor {n}", tensor.to(device)) for n, tensor in enumerate(drawn)], device).bucket
    reader = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ender = threading.Timer(HANDOVER_S, reader.kill)
    ender.start()
    try:
        agree = []
        for text in (handle(bucket), "again"):
            _wait(device)
            wanted = [tensor_digest(tensor) for _, tensor in bucket]
            agree.append(_ask(reader, text) == wanted)
            for _, tensor in bucket:  # what the reader has mapped is this memory, no copy of it
                tensor.neg_()
        reader.communicate("\n", timeout=HANDOVER_S)
    finally:
        ender.cancel()
        reader.kill()
    what = [f"{when}: {'equal' if same else 'not equal'}" for when, same in zip(("mapped", "changed"), agree, strict=True)]
    return Found(", ".join(what), all(agree))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _ask(reader: subprocess.Popen[str], line: str) -> list[int]:
    """What the reader answers to a line. Raises RuntimeError where it has ended, with the reason in the log."""
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write(line + "\n")
    reader.stdin.flush()
    answer = reader.stdout.readline()
    if not answer:
        raise RuntimeError("the process that was to map the memory ended, or did not answer in time; the log says more")
    return list(json.loads(answer))


def _read() -> None:
    """The other process: maps what the first line names, then answers each line with the digests as they are now.

    A handle names a device by its UUID, as SGLang expects it; SGLang's side of that is here in three lines.
    """
    rebuild: Any = reductions.rebuild_cuda_tensor

    def by_uuid(*arguments: Any) -> Any:
        count = range(torch.cuda.device_count())
        numbers = {str(torch.cuda.get_device_properties(number).uuid): number for number in count}
        return rebuild(*arguments[:6], numbers[arguments[6]], *arguments[7:])

    reductions.rebuild_cuda_tensor = by_uuid
    bucket = pickle.loads(base64.b64decode(sys.stdin.readline()))
    while True:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(json.dumps([tensor_digest(tensor) for _, tensor in bucket]), flush=True)
        if not sys.stdin.readline().strip():
            return


if __name__ == "__main__":
    _read()
