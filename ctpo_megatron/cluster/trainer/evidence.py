"""What a trainer rank can say of itself while another of its threads works or hangs: signs of life, collectives, places, stacks.

Collectives come from torch's flight recorder (TORCH_FR_BUFFER_SIZE). With gloo it records what a rank has entered, not what has
ended, and no point-to-point calls: whether the rank is inside a call is told by its Python stack.
"""

from __future__ import annotations

import json
import linecache
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ctpo_megatron.record.stalls import Collective, Evidence

IO_STEP = 1 << 18  # bytes read or written; less may be a log line
RECENT = 20  # collective calls that a report shows
_DISTRIBUTED = "torch/distributed/distributed_c10d.py"
_PIPELINE = "p2p_communication.py"  # megatron's
_PARTS = {"SelfAttention": "attention", "MLASelfAttention": "attention", "MLP": "mlp", "MoELayer": "experts"}


class Signs:
    """Counts of what a rank gets done: layers entered, collective calls entered, bytes read and written."""

    def __init__(self) -> None:
        self._layers = 0
        self._seen: tuple[int, int, int] = (0, 0, 0)

    def attach(self, models: list[Any]) -> None:
        """Count every pass through a transformer layer of `models`."""
        for model in models:
            for module in model.modules():
                if any(each.__name__ == "TransformerLayer" for each in type(module).__mro__):
                    module.register_forward_pre_hook(self._count)

    def _count(self, *_args: object) -> None:
        self._layers += 1

    def moved(self) -> bool:
        """Whether anything was done since the last time."""
        now = (self._layers, sum(entered_calls().values()), _io_bytes() // IO_STEP)
        before, self._seen = self._seen, now
        return now != before


def entered_calls() -> dict[str, int]:
    """For every process group, how many collective calls this rank has entered; empty where nothing is recorded. Takes 4 us."""
    recorder = getattr(_c10d(), "_dump_fr_trace_json", None)
    if recorder is None:
        return {}
    status = json.loads(recorder(False)).get("pg_status", {})
    return {name: int(each["last_enqueued_collective"]) for name, each in status.items()}


def gather(thread: int) -> Evidence:
    """All that can be said of this process, whose `thread` does its work."""
    frames = sys._current_frames()
    frame = frames.get(thread)
    walked = [] if frame is None else list(_outwards(frame))
    entries = _entries()
    place = ", in ".join(filter(None, (_call(walked), place_of(walked))))
    recent = tuple(_line(each) for each in entries[-RECENT:])
    return Evidence(_collectives(entries, walked), place, _stacks(frames), recent)


def place_of(walked: list[FrameType]) -> str:
    """Where in the model and the schedule a thread is, whose frames these are, the innermost first. Empty: it is elsewhere."""
    part = next((words for frame in walked if (words := _layer(frame))), "")
    way = "backward" if any(frame.f_code.co_name == "_engine_run_backward" for frame in walked) else "forward" if part else ""
    schedule = next((each for each in walked if each.f_code.co_name.startswith("forward_backward_")), None)
    micro_batch = ""
    if schedule is not None and isinstance(index := schedule.f_locals.get("i"), int):
        micro_batch = f"micro-batch {index + 1} of {schedule.f_locals.get('num_microbatches')}"
    return ", ".join(filter(None, (part, way, micro_batch)))


def _collectives(entries: list[dict[str, Any]], walked: list[FrameType]) -> tuple[Collective, ...]:
    """How far this rank is in each group, the one of its last call last; in a pipeline's exchange that comes last."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return ()
    world = dist.distributed_c10d._world  # what torch's own functions read; there is no public list of groups
    of_groups = [(each, ranks) for each, ranks in world.pg_group_ranks.items() if isinstance(each, dist.ProcessGroup)]
    members = {str(each.group_name): (each.group_desc, tuple(ranks)) for each, ranks in of_groups}
    last = {str(each["process_group"][0]): each for each in entries}
    order = sorted(last, key=lambda name: last[name]["record_id"])
    inside, found = _inside(walked), []
    for name in order:
        if name not in members:
            continue
        description, ranks = members[name]
        entry = last[name]
        in_flight = name == order[-1] and (inside or _unfinished(entry))
        operation = str(entry["profiling_name"]).partition(":")[2]
        peers = _peers(operation, ranks) if entry.get("is_p2p") else ()
        seconds = time.time() - entry["time_created_ns"] / 1e9
        found.append(
            Collective(description, ranks, entry["collective_seq_id"], operation, seconds, in_flight or bool(peers), peers)
        )
    return (*found, *_exchange(walked, members))


def _exchange(walked: list[FrameType], members: dict[str, tuple[str, tuple[int, ...]]]) -> Iterator[Collective]:
    """The exchange with pipeline neighbours that this rank is in: gloo's recorder does not know of it."""
    import torch.distributed as dist

    if not any(frame.f_code.co_filename.endswith(_PIPELINE) for frame in walked):
        return
    mine = dist.get_rank()
    description, ranks = next((each for each in members.values() if "PIPELINE" in each[0].upper()), ("pipeline", ()))
    place = ranks.index(mine) if mine in ranks else 0
    peers = tuple(ranks[at] for at in (place - 1, (place + 1) % max(1, len(ranks))) if ranks and ranks[at] != mine)
    yield Collective(description, ranks, 0, "an exchange with its pipeline neighbours", inside=True, peers=tuple(set(peers)))


def _entries() -> list[dict[str, Any]]:
    """The flight recorder's calls, the last one last. Without stacks: their first dump takes seconds."""
    recorder = getattr(_c10d(), "_dump_fr_trace_json", None)
    return [] if recorder is None else list(json.loads(recorder(True, False)).get("entries", []))


def _c10d() -> Any:
    """torch's distributed library where this process has loaded it."""
    return sys.modules.get("torch._C._distributed_c10d")


def _unfinished(entry: dict[str, Any]) -> bool:
    """Whether a call of NCCL's has not come to its end; gloo's recorder calls all of them scheduled."""
    return str(entry["profiling_name"]).startswith("nccl") and entry.get("state") != "completed"


def _peers(operation: str, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The other side of a point-to-point call, from NCCL's words `recv 0<-1` or `send 0->1`: ranks within the group."""
    found = re.search(r"\d+(?:<-|->)(\d+)", operation)
    return (ranks[int(found[1])],) if found and int(found[1]) < len(ranks) else ()


def _inside(walked: list[FrameType]) -> bool:
    """Whether a thread is in a call of torch.distributed, or waits for the handle of one."""
    if not walked:
        return False
    if any(frame.f_code.co_filename.endswith(_DISTRIBUTED) for frame in walked):
        return True
    innermost = walked[0]
    return ".wait(" in linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)


def _call(walked: list[FrameType]) -> str:
    names = [frame.f_code.co_name for frame in walked if frame.f_code.co_filename.endswith(_DISTRIBUTED)]
    return next((name for name in names if not name.startswith("_")), "")


def _layer(frame: FrameType) -> str:
    """`attention of layer 12`, where the frame belongs to such a module."""
    module = frame.f_locals.get("self")
    number = getattr(module, "layer_number", None)
    if not isinstance(number, int):
        return ""
    part = _PARTS.get(type(module).__name__, "")
    return f"{part} of layer {number}" if part else f"layer {number}"


def _outwards(frame: FrameType) -> Iterator[FrameType]:
    each: FrameType | None = frame
    while each is not None:
        yield each
        each = each.f_back


def _stacks(frames: dict[int, FrameType]) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    shown = []
    for thread, frame in frames.items():
        lines = "".join(traceback.format_list(traceback.extract_stack(frame)))
        shown.append(f"thread {names.get(thread, thread)}:\n{lines}")
    return "\n".join(shown)


def _line(entry: dict[str, Any]) -> str:
    group = ":".join(str(each) for each in entry["process_group"])
    when = time.strftime("%H:%M:%S", time.localtime(entry["time_created_ns"] / 1e9))
    return f"{when} {entry['profiling_name']} {entry.get('input_sizes')} group {group} call {entry['collective_seq_id']}"


def _io_bytes() -> int:
    """Bytes that this process has read and written, sockets left out; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.partition(":")[2]) for line in lines if line.startswith(("rchar", "wchar")))
