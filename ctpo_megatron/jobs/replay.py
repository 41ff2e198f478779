"""`ctpo replay`: a step that was not applied, run again at any layout, and where its first non-finite value arises."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ctpo_megatron.checkpoints.files import MODEL, read_manifest
from ctpo_megatron.cluster.local_ranks import run_local_ranks
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.base import Section
from ctpo_megatron.config.explain import explain
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.sources import COMMAND_LINE, read_overrides
from ctpo_megatron.data.dumps import CONFIG, StepDump, read_dump
from ctpo_megatron.data.packing import NOBODY
from ctpo_megatron.errors import CheckpointError, InputError
from ctpo_megatron.jobs.replay_page import page
from ctpo_megatron.mcore.replay.findings import Merged, RankFindings, merge_findings
from ctpo_megatron.mcore.replay.rank import Replayed, replay_on_rank
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.flops import attention_weight
from ctpo_megatron.record.files import jsonable
from ctpo_megatron.types import TrainSample

TOLD = 8  # tokens in the report
_STREAMS = ("advantages", "rollout_logp")


class _ReplayedModel(Section):
    dtype: Literal["as saved", "float32"] = "as saved"
    """Number format of weights and arithmetic."""


class _ReplayedCluster(Section):
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the ranks compute."""


class _ReplayOptions(Section):
    parallel: ParallelConfig = ParallelConfig()
    model: _ReplayedModel = _ReplayedModel()
    cluster: _ReplayedCluster = _ReplayedCluster()


@dataclass(frozen=True, slots=True)
class BatchFault:
    """A number of the batch itself that is not finite, where it stands first."""

    stream: str
    sequence: int
    position: int
    value: float
    count: int  # of such numbers in the stream


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """Everything that a replay found."""

    dump: StepDump
    parallel: ParallelConfig
    dtype: str
    batch_faults: list[BatchFault]
    merged: Merged
    left_out: str | None  # what of the step's loss could not be computed again

    @property
    def verdict(self) -> str:
        """Returns where the first non-finite value arises, in one of six words."""
        merged = self.merged
        bad = merged.tokens[0].first_bad if merged.bad_tokens and merged.tokens else None
        if merged.forward is not None:
            return "forward"
        if self.batch_faults:
            return "batch"
        if (bad is not None and bad != "gradient") or not math.isfinite(merged.loss):
            return "loss"
        if merged.backward is not None or merged.gradients or bad is not None:
            return "backward"
        return "finite" if math.isfinite(merged.grad_norm) else "norm"

    def content(self) -> dict[str, Any]:
        """Returns the report as JSON values; numbers that are not finite are texts (`record.files.jsonable`)."""
        about = {name: value for name, value in asdict(self.dump.about).items() if name != "files"}
        found: dict[str, Any] = jsonable(
            {
                "dump": str(self.dump.directory),
                "about": about,
                "replayed": {"parallel": self.parallel.model_dump(), "dtype": self.dtype, "left_out": self.left_out},
                "verdict": self.verdict,
                "batch_faults": [asdict(each) for each in self.batch_faults],
                **asdict(self.merged),
            }
        )
        return found


def replay_job(directory: Path, overrides: list[str], *, as_json: bool) -> None:
    """Run the step in `directory` again and print what was seen. Raises InputError for a dump that cannot be used."""
    report = replay_step(directory, overrides)
    print(json.dumps(report.content(), indent=1, allow_nan=False) if as_json else page(report), end="\n" if as_json else "")


def replay_step(directory: Path, overrides: list[str]) -> ReplayReport:
    """The report of one replay; errors as in `replay_job`."""
    prepared = prepare_replay(directory, overrides)
    try:
        parts = run_local_ranks(prepared.what.parallel.world_size, replay_on_rank, prepared.what)
    except CheckpointError as error:
        raise InputError(f"{prepared.dump.checkpoint}: the weights of this dump cannot be used: {error}") from error
    return prepared.report(parts)


@dataclass(frozen=True, slots=True)
class PreparedReplay:
    """A dump that was read, and what its ranks are to run."""

    dump: StepDump
    what: Replayed
    left_out: str | None  # what of the step's loss cannot be computed again

    def report(self, parts: Sequence[RankFindings]) -> ReplayReport:
        """What the ranks saw, as one report."""
        what = self.what
        merged = merge_findings(parts, what.shape.num_layers, TOLD)
        return ReplayReport(self.dump, what.parallel, what.dtype, batch_faults(self.dump), merged, self.left_out)


def prepare_replay(directory: Path, overrides: list[str]) -> PreparedReplay:
    """Read a dump for the layout that `overrides` asks for. Raises InputError for what cannot be used."""
    options = _options(overrides)
    dump = read_dump(directory)
    config = load_config(directory / CONFIG)
    if config.model.adapter is not None:
        raise InputError(f"{directory}: it is of a run with model.adapter, and a replay knows no adapters.")
    if config.train.fp8 is not None:
        raise InputError(f"{directory}: it is of a run with train.fp8, and a replay computes in the weights' own format.")
    supervised = dump.about.kind == "supervised"
    if config.algorithm.critic is not None and not supervised:  # supervised training leaves it out
        raise InputError(f"{directory}: it is of a run with a critic (algorithm.advantage.type=gae), and a replay knows none.")
    shape, dtype = _model(dump)
    check_layout(shape, options.parallel)
    algorithm, left_out = known_terms(dump, config.algorithm)
    weight = attention_weight(shape) if config.train.balance == "flops" and not supervised else 0.0
    what = Replayed(
        checkpoint=str(dump.checkpoint.resolve()),
        shape=shape,
        dtype=dtype if options.model.dtype == "as saved" else options.model.dtype,
        device=options.cluster.device,
        parallel=options.parallel,
        moe=config.moe,
        algorithm=algorithm,
        temperature=dump.about.temperature,
        policy_version=dump.about.policy_version,
        supervised=supervised,
        micro_batches=dump.packed(options.parallel, config.train.max_tokens_per_micro_batch, weight),
    )
    return PreparedReplay(dump, what, None if supervised else left_out)


def batch_faults(dump: StepDump) -> list[BatchFault]:
    """What of the batch is not finite at tokens that the policy wrote, before anything is computed."""
    found: dict[str, list[tuple[int, int, float]]] = {}
    for index, sample in enumerate(dump.samples):
        streams: dict[str, list[float]] = {name: getattr(sample, name) for name in _STREAMS}
        if dump.anchors:
            streams |= {name: values.tolist() for name, values in dump.anchors[index].items()}
        for name, values in streams.items():
            bad = [(at, value) for at, value in enumerate(values) if sample.mask[at] and not math.isfinite(value)]
            found.setdefault(name, []).extend((dump.ids[index], at, value) for at, value in bad)
    return [BatchFault(name, *places[0], len(places)) for name, places in found.items() if places]


def _options(overrides: list[str]) -> _ReplayOptions:
    source = read_overrides(overrides)
    try:
        return _ReplayOptions.model_validate(source.values)
    except ValidationError as error:
        raise InputError(explain(error, [source], COMMAND_LINE)) from error


def _model(dump: StepDump) -> tuple[ModelShape, str]:
    """The model of a dump and the number format of its weights."""
    try:
        manifest = read_manifest(dump.checkpoint)
    except CheckpointError as error:
        raise InputError(f"the weights of this dump cannot be used: {error}") from error
    file = dump.checkpoint / MODEL / "config.json"
    return parse_config(read_json(file), str(file)), manifest["dtype"]


def known_terms(dump: StepDump, algorithm: AlgorithmConfig) -> tuple[AlgorithmConfig, str | None]:
    """What of the loss can be computed again, and in words what cannot: policies that were not asked before the step was given
    up."""
    unknown = []
    if algorithm.reference is not None and not (dump.anchors and "reference_logp" in dump.anchors[0]):
        unknown.append(("reference", "the penalty of algorithm.reference: the step was given up before the reference policy"))
    if algorithm.distillation is not None and not all(_told(sample) for sample in dump.samples):
        unknown.append(("distillation", "the loss of algorithm.distillation: the step was given up before a teacher"))
    left = algorithm.model_copy(update={name: None for name, _ in unknown})
    return left, "; ".join(f"{words} was asked" for _, words in unknown) or None


def _told(sample: TrainSample) -> bool:
    """Whether it is known what the sample's teacher says, if it has one."""
    if sample.teacher is None or sample.teacher == NOBODY:
        return True
    told = sample.teacher_logp
    return told is not None and not any(math.isnan(x) and wrote for x, wrote in zip(told, sample.mask, strict=True))
