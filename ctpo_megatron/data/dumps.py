"""A training step that was not applied, as files: its batch sequence by sequence, so that any layout can run it again.

A dump is a directory RUN_DIR/dumps/step_00000012, or step_00000012.2 for the second of several optimizer steps, with

    dump.json           what happened, and size and hash of the two files below
    batch.safetensors   the streams of `types.TrainSample`, one sequence behind the other without padding, and numbers of each
    config.yaml         the configuration of the run, resolved
    weights/            a checkpoint (`checkpoints.files`) that holds the weights of that step, and perhaps more

Nothing in the first three is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctpo_megatron.batch import AnchorStreams, MicroBatch, TrainBatch
from ctpo_megatron.checkpoints.hashes import file_hash
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.balance import round_up
from ctpo_megatron.data.packing import length_steps, pack
from ctpo_megatron.errors import InputError, storing
from ctpo_megatron.types import Supports, TopK, TrainSample

ABOUT, BATCH, CONFIG, WEIGHTS = "dump.json", "batch.safetensors", "config.yaml", "weights"
VERSION = 1
TOKEN_STREAMS = ("input_ids", "labels", "mask", "advantages", "rollout_logp", "versions")
OF_SEQUENCES = ("lengths", "groups", "weights", "ids", "teachers")
ANCHOR_STREAMS = ("anchor_logp", "reference_logp")
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class About:
    """What dump.json says: which step it was, and why it was not applied."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    kind: Literal["policy", "supervised"]
    step: Count  # training step, from 1
    optimizer_step: Count  # of it, from 1
    optimizer_steps: Count  # that it was to have
    applied: Count  # of them before this one: the weights have moved by these since the anchors were found
    reason: str
    sequence: int | None  # number in the rollout batch of the first bad sequence, where the trainer knew it
    policy_version: Count  # of the trainer when the step began
    temperature: float
    parallel: dict[str, int | bool | None]  # the layout that it happened at
    written: float  # seconds since 1970
    release: str  # of this package
    weights_from: str  # where weights/ comes from, for a person
    files: dict[str, dict[str, int | str]]  # name -> size, digest
    version: int = VERSION


_ABOUT = TypeAdapter(About)


@dataclass(frozen=True, slots=True)
class StepDump:
    """A dump that was read. `anchors`: per sample; empty where none were found before the step was given up."""

    directory: Path
    about: About
    samples: list[TrainSample]
    weights: list[float]  # of a token of each sample in the loss
    ids: list[int]  # numbers of the samples in their rollout batch, ascending
    anchors: list[AnchorStreams]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that holds its weights."""
        return self.directory / WEIGHTS

    def packed(self, parallel: ParallelConfig, max_tokens: int, attention_weight: float) -> list[list[MicroBatch]]:
        """Its micro-batches [dp][n] at another layout, or at the one that it happened at: then the same, bit for bit.

        Where the run shared prompts each sample reads its own here.
        `max_tokens` and `attention_weight` as in `build_train_batch`; a micro-batch holds at least the longest sample.
        """
        step, unit = length_steps(parallel.cp, parallel.tp)
        longest = max(round_up(len(sample), step) for sample in self.samples)
        rows = pack(
            self.samples,
            dp=parallel.dp,
            max_tokens=max(max_tokens * parallel.cp, round_up(longest, unit)),
            cp=parallel.cp,
            tp=parallel.tp,
            weights=self.weights,
            ids=self.ids,
            multiple=parallel.pp if parallel.vpp > 1 else 1,
            attention_weight=attention_weight,
        )
        return [[self._anchored(mb) for mb in row] for row in rows]

    def _anchored(self, mb: MicroBatch) -> MicroBatch:
        """A micro-batch with the anchors of its sequences; padding has zeros."""
        if not self.anchors:
            return mb
        streams: dict[str, Tensor | None] = {}
        places = {number: place for place, number in enumerate(self.ids)}
        for name in self.anchors[0]:
            stream = torch.zeros(mb.positions)
            for _, rows, number in sequences_of(mb):
                stream[rows] = self.anchors[places[number]][name]
            streams[name] = stream
        return mb.with_streams(**streams)


def sequences_of(mb: MicroBatch) -> Iterator[tuple[int, Tensor, int]]:
    """Yields the place of each sample in a whole micro-batch, the positions [L] of its tokens, and its number; no fillers.

    What it shares with others comes before its own tokens; padding is left out.
    """
    part = mb.sequences
    begins, lengths = part.cu_seqlens.tolist(), part.lengths.tolist()
    prefixes = [-1] * len(mb) if part.prefixes is None else part.prefixes.tolist()
    for place, number in enumerate(part.ids.tolist()):
        if number >= 0:
            before = [prefixes[place]] if prefixes[place] >= 0 else []
            yield place, torch.cat([torch.arange(begins[i], begins[i] + lengths[i]) for i in (*before, place)]), number


def write_batch(directory: Path, batch: TrainBatch, anchors: Sequence[Sequence[AnchorStreams]]) -> None:
    """Write batch.safetensors. `anchors` [dp][n]: of its micro-batches, or empty. Raises StorageError."""
    parts: dict[int, dict[str, Tensor]] = {}
    for row_number, row in enumerate(batch.micro_batches):
        for mb_number, mb in enumerate(row):
            extra = anchors[row_number][mb_number] if anchors else {}
            for place, rows, number in sequences_of(mb):
                parts[number] = _sequence(mb, extra, rows, place)
    numbers = sorted(parts)
    tensors = {name: torch.cat([parts[number][name] for number in numbers]) for name in parts[numbers[0]]}
    tensors["ids"] = torch.tensor(numbers)
    file = directory / BATCH
    with storing(file):
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        except SafetensorError as error:  # how the library reports what the system says
            raise OSError(str(error)) from error


def _sequence(mb: MicroBatch, extra: AnchorStreams, rows: Tensor, place: int) -> dict[str, Tensor]:
    """One sequence: its streams, and its own numbers as rows of length 1."""
    tokens, sequences = mb.tokens, mb.sequences
    streams: dict[str, Tensor | None] = {name: getattr(tokens, name) for name in TOKEN_STREAMS}
    streams |= {"top_k_ids": tokens.top_k_ids, "top_k_logp": tokens.top_k_logp, "teacher_logp": tokens.teacher_logp, **extra}
    streams["support_ids"] = tokens.support_ids
    streams["routed_experts"] = None if mb.replay is None else mb.replay.routed_experts
    found = {name: stream[rows] for name, stream in streams.items() if stream is not None}
    own = slice(place, place + 1)
    found |= {} if sequences.teachers is None else {"teachers": sequences.teachers[own]}
    return found | {"lengths": torch.tensor([len(rows)]), "groups": sequences.groups[own], "weights": sequences.weights[own]}


def write_about(directory: Path, about: About) -> None:
    """Write dump.json, which makes a dump of a directory; `about.files` is filled in. Raises StorageError."""
    files: dict[str, dict[str, int | str]] = {}
    with storing(directory):
        for name in (BATCH, CONFIG):
            files[name] = {"size": (directory / name).stat().st_size, "digest": file_hash(directory / name)}
        content = asdict(about) | {"files": files}
        (directory / ABOUT).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_dump(directory: Path) -> StepDump:
    """The dump in `directory`, its two files compared with their hashes. Raises InputError for what cannot be used."""
    about = _read_about(directory)
    for name, wanted in about.files.items():
        try:
            found = file_hash(directory / name)
        except OSError as error:
            raise InputError(f"{directory / name}: cannot be read: {error.strerror}.") from error
        if found != wanted["digest"]:
            raise InputError(f"{directory / name}: its content does not have the hash that was written.")
    try:
        tensors = load_file(directory / BATCH)
        samples, anchors = _samples(tensors)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{directory / BATCH}: this is not the batch of a step: {error}.") from error
    return StepDump(directory, about, samples, tensors["weights"].tolist(), tensors["ids"].tolist(), anchors)


def _read_about(directory: Path) -> About:
    file = directory / ABOUT
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{directory}: there is no {ABOUT}; a dump is a directory RUN_DIR/dumps/step_*.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}.") from error
    if isinstance(content, dict) and content.get("version") != VERSION:
        raise InputError(f"{file}: format version {content.get('version')}; this release reads version {VERSION}.")
    try:
        return _ABOUT.validate_json(json.dumps(content))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors())
        raise InputError(f"{file}: this does not describe a dump: {wrong}.") from error


def _samples(tensors: dict[str, Tensor]) -> tuple[list[TrainSample], list[AnchorStreams]]:
    """The sequences of a batch, and the anchors of each where there are some."""
    lengths, ids = tensors["lengths"].tolist(), tensors["ids"].tolist()
    if not ids or ids != sorted(set(ids)) or ids[0] < 0:
        raise ValueError("the numbers of its sequences do not ascend")
    cut = {name: tensors[name].split(lengths) for name in tensors if name not in OF_SEQUENCES}
    samples = []
    for index in range(len(lengths)):
        streams = {name: cut[name][index].tolist() for name in TOKEN_STREAMS}
        top_k = TopK(cut["top_k_ids"][index].numpy(), cut["top_k_logp"][index].numpy()) if "top_k_ids" in cut else None
        supports = Supports.of_rows(cut["support_ids"][index].numpy()) if "support_ids" in cut else None
        routed = cut["routed_experts"][index].numpy() if "routed_experts" in cut else None
        group = int(tensors["groups"][index])
        sample = TrainSample(**streams, group=group, routed_experts=routed, top_k=top_k, supports=supports)
        if "teachers" in tensors:
            told = cut["teacher_logp"][index].tolist() if "teacher_logp" in cut else None
            sample = replace(sample, teacher=int(tensors["teachers"][index]), teacher_logp=told)
        samples.append(sample)
    names = [name for name in ANCHOR_STREAMS if name in cut]
    return samples, [{name: cut[name][index] for name in names} for index in range(len(lengths))] if names else []
