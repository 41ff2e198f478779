"""The proof of a publication: what each engine rank holds, tensor by tensor, is what the trainer has sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctpo_megatron.engine.checksums import EngineDigests
from ctpo_megatron.engine.layout import DERIVED, EngineLayout
from ctpo_megatron.errors import WeightSyncError

SHOWN = 12  # tensors that a message names
SHOWN_SOURCES = 4

Kind = Literal["differs", "not sent", "not held", "unknown"]
_EXPLAINED: dict[Kind, str] = {
    "differs": "holds something else than was sent",
    "not sent": "was not sent",
    "not held": "is not in the engine",
    "unknown": "is in the engine, but not known to this package's layout of the model",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor of one engine rank that is not proven."""

    rank: int
    tensor: str  # the engine's name
    kind: Kind
    sources: tuple[str, ...] = ()  # the Hugging Face tensors it is made of

    def __str__(self) -> str:
        text = f"rank {self.rank}: {self.tensor} {_EXPLAINED[self.kind]}"
        if not self.sources or self.sources == (self.tensor,):
            return text
        more = f" and {len(self.sources) - SHOWN_SOURCES} more" if len(self.sources) > SHOWN_SOURCES else ""
        return f"{text} (made of {', '.join(self.sources[:SHOWN_SOURCES])}{more})"


def compare(layout: EngineLayout, expected: EngineDigests, reported: EngineDigests) -> list[Difference]:
    """The tensors whose digest in `expected` (of what was sent) is not that in `reported` (of what one server holds).

    The list is empty when every tensor of the model was sent and is held on every rank, and no other is held but those that
    DERIVED names.
    Raises WeightSyncError when the server has another number of ranks than the layout.
    """
    if len(reported) != layout.tp:
        raise WeightSyncError(f"the server reports {len(reported)} tensor-parallel ranks; rollout.engine.tp is {layout.tp}.")
    if len(expected) != layout.tp:
        raise WeightSyncError(f"the trainer gave digests for {len(expected)} engine ranks; the layout has {layout.tp}.")
    found = []
    for rank, (sent, held) in enumerate(zip(expected, reported, strict=True)):
        for tensor in layout.tensors:
            if kind := _kind(sent.get(tensor), held.get(tensor)):
                found.append(Difference(rank, tensor, kind, tuple(layout.sources(tensor))))
        strangers = held.keys() - layout.tensors
        found += [Difference(rank, name, "unknown") for name in sorted(strangers) if not _is_derived(name)]
    return found


def explain(url: str, version: int, differences: Sequence[Difference]) -> str:
    """The message for a person about `differences`, of which there is at least one."""
    tensors = len({each.tensor for each in differences})
    lines = [f"{url} does not hold version {version} of the weights: {tensors} of its tensors are not proven."]
    lines += [f"  {each}" for each in differences[:SHOWN]]
    if len(differences) > SHOWN:
        lines.append(f"  ... and {len(differences) - SHOWN} more")
    kinds = {each.kind for each in differences}
    if kinds <= {"unknown", "not held"}:
        lines.append(
            "The server keeps the model in another layout. rollout.engine.extra_args must leave out expert parallelism, "
            "quantisation, draft models and MoE backends that reorder weights; a model with shared experts needs "
            "--disable-shared-experts-fusion."
        )
    else:
        lines.append("Nothing may be sampled from it: start it again, or publish all weights again.")
    return "\n".join(lines)


def attest(layout: EngineLayout, version: int, expected: EngineDigests, reported: dict[str, EngineDigests]) -> None:
    """Check that every server of `reported`, by URL, holds what was sent.

    `expected` are the digests that the senders found. Raises WeightSyncError, which names the servers and tensors that differ.
    """
    problems = [
        explain(url, version, differences)
        for url, digests in reported.items()
        if (differences := compare(layout, expected, digests))
    ]
    if problems:
        raise WeightSyncError("\n".join(problems))


def _kind(sent: int | None, held: int | None) -> Kind | None:
    if held is None:
        return "not held"
    if sent is None:
        return "not sent"
    return "differs" if sent != held else None


def _is_derived(name: str) -> bool:
    return any(pattern.search(name) for pattern, _reason in DERIVED)
