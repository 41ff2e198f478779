"""Traces of steps, read back and looked at."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctpo_megatron.record.traces import trace_path

TOGETHER = ("allreduce", "allgather")  # no rank is done before all have come
WHOLE_US = 1  # times are cut down to whole microseconds


def check_trace(run_dir: Path, step: int, processes: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """A step's trace as a viewer would want it; returns the spans by process.

    Each of `processes` has a track. Spans of one track nest. Collectives of two ranks or more overlap in time, but for the
    errors of their clocks.
    """
    content = json.loads(gzip.decompress(trace_path(run_dir, step).read_bytes()))
    names = {each["pid"]: each["args"]["name"] for each in content["traceEvents"] if each["name"] == "process_name"}
    assert sorted(names.values()) == sorted(processes)
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for each in content["traceEvents"]:
        if each["ph"] == "X":
            assert each["ts"] >= 0, "Perfetto drops what begins before 0"
            assert each["dur"] >= 0
            tracks[each["pid"], each["tid"]].append(each)
    for spans in tracks.values():
        check_nesting(spans)
    by_process: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (pid, _), spans in tracks.items():
        by_process[names[pid]] += spans
    assert set(by_process) == set(names.values()), "a process has no span"
    check_collectives(by_process, content["otherData"]["clocks"])
    return by_process


def check_nesting(spans: list[dict[str, Any]]) -> None:
    """Any two spans lie apart, or one in the other."""
    around: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda each: (each["ts"], -each["dur"])):
        while around and end(around[-1]) <= span["ts"]:
            around.pop()
        assert not around or end(span) <= end(around[-1]), (around[-1], span)
        around.append(span)


def check_collectives(by_process: dict[str, list[dict[str, Any]]], clocks: dict[str, Any]) -> None:
    """The n-th collective of a group overlaps on all of its ranks."""
    found: dict[tuple[str, int], list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for process, spans in by_process.items():
        for span in spans:
            if span["name"] in TOGETHER and span["args"]["ranks"] > 1:
                found[span["args"]["group"], span["args"]["number"]].append((process, span))
    assert found, "there are no collectives"
    for place, of_ranks in found.items():
        assert len(of_ranks) == of_ranks[0][1]["args"]["ranks"], place
        error = 2 * max(clocks[process]["error"] for process, _ in of_ranks) / 1000 + WHOLE_US
        assert max(span["ts"] for _, span in of_ranks) <= min(end(span) for _, span in of_ranks) + error, of_ranks


def end(span: dict[str, Any]) -> float:
    """When a span ended, in microseconds."""
    return span["ts"] + span["dur"]
