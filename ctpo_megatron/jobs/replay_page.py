"""The page that `ctpo replay` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.mcore.replay.findings import First, Merged, Place, TokenTerms

if TYPE_CHECKING:
    from ctpo_megatron.jobs.replay import BatchFault, ReplayReport

NAMES = 6  # parameters named in one line
LAYERS = 24  # rows of the table; beyond, only those around the first fault


def page(report: ReplayReport) -> str:
    """Returns the report for a person."""
    merged = report.merged
    parts = [_head(report), ["", _verdict(report)]]
    if merged.weights:
        parts.append(["", f"weights that are not finite: {_tensors(merged.weights)}"])
    if report.batch_faults:
        parts.append(["", "numbers of the batch that are not finite:", *(f"  {_fault(each)}" for each in report.batch_faults)])
    if merged.backward is not None or merged.gradients:
        parts.append(["", *_backward(merged)])
    parts += [["", *_layers(merged)], ["", *_tokens(report)]]
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(report: ReplayReport) -> list[str]:
    about, merged = report.dump.about, report.merged
    step = f"step {about.step}"
    if about.optimizer_steps > 1:
        step += f", optimizer step {about.optimizer_step} of {about.optimizer_steps} ({about.applied} applied before it)"
    lines = [
        f"{report.dump.directory}: {step}, {len(report.dump.samples)} sequences, "
        f"{sum(len(sample) for sample in report.dump.samples)} tokens",
        f"  then ({layout(ParallelConfig(**about.parallel))}): {about.reason}",
        f"  now  ({layout(report.parallel)}, {report.dtype}): loss {merged.loss:.6g}, gradient norm {merged.grad_norm:.6g}, "
        f"{merged.seconds:.1f} s",
        f"  weights: {about.weights_from}",
    ]
    return lines + ([f"  left out: {report.left_out}"] if report.left_out else [])


def layout(parallel: ParallelConfig) -> str:
    """Returns a layout in words, without the axes that have one rank."""
    usual = ParallelConfig().model_dump()
    sizes = {name: value for name, value in parallel.model_dump().items() if value != usual[name]}
    return " ".join(f"{name}={value}" for name, value in sizes.items()) or "one rank"


def _verdict(report: ReplayReport) -> str:
    merged, kind = report.merged, report.verdict
    if kind == "forward" and merged.forward is not None:
        return f"FIRST NON-FINITE VALUE, forward: {_first(merged.forward)}"
    if kind == "batch":
        return f"FIRST NON-FINITE VALUE, in the batch: {_fault(report.batch_faults[0])}; the model's own numbers are finite"
    if kind == "loss":
        term = merged.tokens[0] if merged.bad_tokens else None
        where = "" if term is None else f": {term.first_bad} of {_place(term.place)}"
        return f"FIRST NON-FINITE VALUE, in the loss{where}; the forward pass is finite"
    if kind == "backward":
        return "FIRST NON-FINITE VALUE, backward: forward pass and loss are finite; see below"
    if kind == "norm":
        return "every gradient is finite here, but the sum of their squares is not: they are too large for their norm"
    return f"FINITE HERE: loss {merged.loss:.9g}, gradient norm {merged.grad_norm:.9g}"


def _first(first: First) -> str:
    place = "tokens that cannot be told" if first.place is None else _place(first.place)
    seen = "" if first.place_seen_in == first.module else f" (as {first.place_seen_in} shows)"
    return f"{first.module}, {_ranks(first.ranks)}, {place}{seen}"


def _place(place: Place) -> str:
    return f"sequence {place.sequence}, position {place.position}" + (" (padding)" if place.padding else "")


def _fault(fault: BatchFault) -> str:
    others = f", and {fault.count - 1} more" if fault.count > 1 else ""
    return f"{fault.stream} of sequence {fault.sequence}, position {fault.position}: {fault.value}{others}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _tensors(tensors: dict[str, list[int]]) -> str:
    shown = [f"{name} ({_ranks(ranks)})" for name, ranks in list(tensors.items())[:NAMES]]
    return ", ".join(shown) + (f" and {len(tensors) - NAMES} more" if len(tensors) > NAMES else "")


def _backward(merged: Merged) -> list[str]:
    lines = []
    if merged.backward is not None:
        lines.append(f"first gradient that is not finite, backward, comes out of: {_first(merged.backward)}")
    if merged.gradients:
        lines.append(f"parameters whose gradient is not finite, the first in backward order first: {_tensors(merged.gradients)}")
    return lines


def _layers(merged: Merged) -> list[str]:
    rows = merged.layers
    if len(rows) > LAYERS:
        middle = 0 if merged.forward is None else min(max(merged.forward.layer, 0), len(rows) - 1)
        first = max(0, min(middle - LAYERS // 2, len(rows) - LAYERS))
        rows = rows[first : first + LAYERS]
    columns = ("attention", "mlp", "output", "gradient")
    lines = ["largest finite |value| by layer; ! marks others beside it", _cells("layer", *columns)]
    for row in rows:
        cells = [f"{getattr(row, name):.4g}{'!' if name in row.bad else ' '}" for name in columns]
        lines.append(_cells(str(row.layer), *cells))
    if len(rows) < len(merged.layers):
        lines.append(f"  ({len(merged.layers)} layers; --json has all)")
    largest = ", ".join(f"{name} {value:.4g}" for name, value in merged.largest_gradients)
    return [*lines, f"largest gradients: {largest}"]


def _cells(first: str, *rest: str) -> str:
    return f"  {first:>5}" + "".join(f" {cell:>12}" for cell in rest)


def _tokens(report: ReplayReport) -> list[str]:
    merged = report.merged
    if not merged.tokens:
        return ["no token of the policy is in this batch's loss"]
    title = "tokens that weigh most in the loss"
    if merged.bad_tokens:
        title = f"loss terms of the first {len(merged.tokens)} of {merged.bad_tokens} tokens that are not finite"
    names = ("seq", "pos", "t", "label", "logp", "anchor", "log-ratio", "sum", "advantage", "weight", "loss", "d loss/d logp")
    widths = (5, 6, 6, 8, 10, 10, 10, 10, 10, 10, 10, 14)
    lines = [f"{title} (t counts the policy's tokens, sum is that of log-ratios up to t)", _row(names, widths)]
    return lines + [_row(_values(term), widths) for term in merged.tokens]


def _values(term: TokenTerms) -> tuple[str, ...]:
    numbers = (term.logp, term.anchor_logp, term.log_ratio, term.log_ratio_sum, term.advantage, term.weight, term.loss)
    whole = (term.place.sequence, term.place.position, term.policy_token, term.label_id)
    return (*map(str, whole), *(f"{number:.4g}" for number in numbers), _gradient(term.gradient))


def _gradient(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
