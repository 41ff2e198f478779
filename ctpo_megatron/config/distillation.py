"""On-policy distillation: who teaches, which prompts, and how much that counts beside the rewards."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.feeding import MAIN
from ctpo_megatron.config.rollout import EngineConfig


def engine_section(place: int) -> str:
    """Returns what messages call the settings of the servers of the teacher at `place`."""
    return f"algorithm.distillation.teachers[{place}].engine"


class BaseTeacher(Section):
    """What all teachers have."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")
    """What it is called in errors and in the record: `teacher/kl/NAME`."""
    path: FilePath
    """Directory of the teacher's model. Its tokenizer has to be the trained model's."""
    sources: tuple[str, ...] | None = None
    """Sources of prompts that it teaches: `train` for data.train, and names of data.mixture. null: all that no other teacher
    names."""


class CopiedTeacher(BaseTeacher):
    """A model of the same shape as the trained one, whose weights wait in each rank's host memory and take the model's place for
    a pass."""

    type: Literal["copied"] = "copied"


class AskedTeacher(BaseTeacher):
    """A model of any shape on SGLang servers, which are asked as soon as a group of attempts is finished."""

    timeout_s: PositiveFloat = 300.0
    """How long one request may take, waiting in the server's queue included."""
    retries: NonNegativeInt = 8
    """How often a request that was not answered is sent again, after pauses that grow to 30 s. Then the attempt has failed
    (`rollout.failed_share`)."""
    concurrency: PositiveInt = 32
    """Requests in flight."""


class ServedTeacher(AskedTeacher):
    """A model of any shape on SGLang servers that run already. It is asked as soon as a group of attempts is finished.

    `path` needs config.json and the tokenizer, no weights."""

    type: Literal["served"] = "served"
    urls: tuple[str, ...]
    """Where its servers are: `http://host:30000`. Requests take turns among them; one that fails goes to the next."""
    key_file: FilePath | None = None
    """File that holds the servers' key, and nothing else. null: none is sent."""

    @field_validator("urls")
    @classmethod
    def _are_servers(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", url) or url.rstrip("/").endswith("/generate"):
                raise ValueError(f"{url!r}; needed: http://host:port, without a key and without /generate")
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"needed: one address at least, each once; found: {list(urls)}")
        return tuple(url.rstrip("/") for url in urls)


class TeacherEngine(Section):
    """SGLang servers of a teacher."""

    servers: PositiveInt = 1
    """Number of servers."""
    tp: PositiveInt = 1
    """Tensor parallel size of each server."""
    nodes: PositiveInt = 1
    """Nodes that each server spreads over, `tp / nodes` of its ranks on each."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens. null: SGLang decides (GPU) or 65,536 (CPU)."""
    start_timeout_s: PositiveFloat = 1800.0
    """How long a server may take to come up."""
    restarts: NonNegativeInt = 3
    """How often each server is started again in its place after it has died. The run ends when all are lost for good."""
    extra_args: tuple[str, ...] = ()
    """Further arguments for `sglang.launch_server`, passed as they are."""

    @model_validator(mode="after")
    def _can_be_servers(self) -> TeacherEngine:
        self.as_engine()
        return self

    def as_engine(self) -> EngineConfig:
        """Returns the same as settings of servers that sample."""
        return EngineConfig.model_validate(self.model_dump())


class StartedTeacher(AskedTeacher):
    """A model of any shape on SGLang servers that the run starts beside those that sample. It is asked as soon as a group of
    attempts is finished."""

    type: Literal["started"] = "started"
    engine: TeacherEngine = TeacherEngine()
    """Its servers."""


Teacher = Annotated[CopiedTeacher | ServedTeacher | StartedTeacher, Field(discriminator="type")]


class DistillationConfig(Section):
    """Follow teachers on the sequences that the trained model writes itself; docs/distillation.md."""

    coeff: NonNegativeFloat = 1.0
    """Weight of this loss."""
    objective_coeff: NonNegativeFloat = 1.0
    """Weight of `algorithm.objective`, and so of rewards, beside it. 0: rewards are measured and teach nothing."""
    gamma: NonNegativeFloat = 0.5
    """How much the first tokens of a sequence count more than its last: a token weighs 1 plus `gamma` times the share of the
    sequence's disagreement that comes with it and after it. IW-OPD (arXiv 2606.22600): 0.5. 0: all weigh the same."""
    teachers: tuple[Teacher, ...] = Field(min_length=1)
    """The teachers; `type` says where one is."""

    @model_validator(mode="after")
    def _each_source_has_one_teacher(self) -> DistillationConfig:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"each teacher needs a name of its own; found: {names}")
        others = [teacher.name for teacher in self.teachers if teacher.sources is None]
        if len(others) > 1:
            raise ValueError(f"teachers {others} name no sources, but only one can have all that no other names; give sources")
        taught: dict[str, str] = {}
        for teacher in self.teachers:
            if teacher.sources == ():
                raise ValueError(f"teacher {teacher.name!r} has sources=[], and so nobody to teach; name some, or leave it out")
            for source in teacher.sources or ():
                if source in taught:
                    raise ValueError(f"source {source!r} has two teachers: {taught[source]!r} and {teacher.name!r}; allowed: one")
                taught[source] = teacher.name
        return self

    @property
    def copied(self) -> dict[int, CopiedTeacher]:
        """Returns the teachers in the trainer's ranks, by their place among all."""
        return {place: each for place, each in enumerate(self.teachers) if isinstance(each, CopiedTeacher)}

    @property
    def asked(self) -> dict[int, ServedTeacher | StartedTeacher]:
        """Returns the teachers on servers, by their place among all."""
        return {place: each for place, each in enumerate(self.teachers) if not isinstance(each, CopiedTeacher)}

    @property
    def started(self) -> dict[int, StartedTeacher]:
        """Returns the teachers whose servers the run starts, by their place among all."""
        return {place: each for place, each in enumerate(self.teachers) if isinstance(each, StartedTeacher)}

    def teacher_of(self, source: str) -> int | None:
        """Returns the place of the teacher of prompts from `source`, empty for data.train; None where nobody teaches them."""
        name, rest = source or MAIN, None
        for place, teacher in enumerate(self.teachers):
            if teacher.sources is None:
                rest = place
            elif name in teacher.sources:
                return place
        return rest

    def check_sources(self, sources: list[str]) -> None:
        """Raises ValueError for a source that is none of `sources`, and where one without a teacher would teach nothing."""
        for teacher in self.teachers:
            for source in teacher.sources or ():
                if source not in sources:
                    raise ValueError(
                        f"algorithm.distillation: teacher {teacher.name!r} teaches {source!r}, which is no source of prompts; "
                        f"there are {', '.join(sources)} ({MAIN} is data.train, the others are in data.mixture)"
                    )
        alone = [source for source in sources if self.teacher_of(source) is None]
        if alone and not self.objective_coeff:
            raise ValueError(
                f"algorithm.distillation: nobody teaches {', '.join(alone)}, and with objective_coeff=0 rewards do not either: "
                "its prompts would change nothing. Give it a teacher, or leave it out of the data"
            )
