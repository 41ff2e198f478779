"""From a prompt to a group of trajectories."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.types.sampling import Supports, TopK


class Status(enum.StrEnum):
    """How a trajectory ended."""

    FINISHED = "finished"  # the model ended its own turn and asked for no tool
    LENGTH = "length"  # the response budget was used up
    MAX_TURNS = "max_turns"  # the model asked for a tool after its last allowed call
    DEADLINE = "deadline"  # its time was over; what it had said by then counts
    UNANSWERED = "unanswered"  # an agent ended after a call of a tool, to which nothing came back


@dataclass(frozen=True, slots=True)
class GroupId:
    """Names a group of its run, from admission to the record. Written `g00000012`, of an evaluation `e00000004-g00000012`.

    `number` counts the admitted groups of the run from 0, and goes on where a run is resumed; in an evaluation it is the prompt's
    place in its file. `evaluation` is the number of training steps before that evaluation, None in training. `benchmark` is what
    the file is called, empty for the held-out prompts of the run: `e00000004-aime25-g00000012`.
    """

    number: int
    evaluation: int | None = None
    benchmark: str = ""

    def __str__(self) -> str:
        name = f"g{self.number:08d}"
        if self.evaluation is None:
            return name
        return "-".join(part for part in (f"e{self.evaluation:08d}", self.benchmark, name) if part)


@dataclass(frozen=True, slots=True)
class AttemptId:
    """Names an attempt: its group, and its place in it from 0. Written `g00000012.3`."""

    group: GroupId
    number: int

    def __str__(self) -> str:
        return f"{self.group}.{self.number}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task. `index` is its row in the data file; `answer` is what the reward compares with.

    `source` names the file among those of a mixture, and is empty for data.train. `difficulty` is what a column of the data says.

    A message has `role`, `content` and whatever else the chat template reads (`data.messages.KEYS`). Prompts that say the same
    share their messages.
    """

    index: int
    messages: tuple[dict[str, Any], ...]
    answer: str
    source: str = ""
    difficulty: float | None = None

    @property
    def key(self) -> str:
        """Returns what tells it from the other prompts of the run: its row, after its source where that is not data.train."""
        return f"{self.source}:{self.index}" if self.source else str(self.index)


@dataclass(slots=True)
class Turn:
    """A run of tokens from one author.

    For `assistant` turns `rollout_logp[i]` is the engine's log-prob of `token_ids[i]` as `Generation` has it and
    `versions[i]` the policy version that sampled it. `tool` turns carry 0.0 and -1 and are masked out of the loss.
    """

    role: Literal["assistant", "tool"]
    token_ids: list[int]
    rollout_logp: list[float]
    versions: list[int]
    top_k: TopK | None = None  # of an assistant's tokens, where the run collects it
    supports: Supports | None = None  # of an assistant's tokens, where sampling is truncated
    teacher_logp: list[float] | None = None  # of an assistant's tokens, once a teacher on a server was asked

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.rollout_logp), len(self.versions)}
        if self.top_k is not None:
            lengths |= {len(self.top_k.ids), len(self.top_k.logp)}
        if self.supports is not None:
            lengths.add(len(self.supports.counts))
        if self.teacher_logp is not None:
            lengths.add(len(self.teacher_logp))
        if len(lengths) != 1:
            raise ValueError(f"streams of a {self.role} turn differ in length: {sorted(lengths)}")


@dataclass(slots=True)
class Branch:
    """What else was sampled in an attempt, where an agent skipped or rewrote part of its history. Trained on with its reward.

    `prompt_ids` is all that the branch's first own turn saw, with turns that another sample of the attempt holds: each sampled
    turn is in one sample. `routed_experts`: of prompt and turns, as `Trajectory` has them.
    """

    prompt_ids: list[int]
    turns: list[Turn]
    routed_experts: NDArray[np.signedinteger] | None = None


@dataclass(slots=True)
class Trajectory:
    """One sampled attempt at a prompt. `text` is the decoded response, for rewards and people only.

    `turns` are those that end with the attempt; what an agent had sampled besides is in `branches`.

    `routed_experts[t]` are the experts that the engine sent token t to, [tokens - 1, expert layers, top_k]; -1 where that is not
    known (docs/routing_replay.md). The last token has gone through no model.
    """

    prompt_index: int
    prompt_ids: list[int]
    turns: list[Turn]
    status: Status
    text: str = ""
    reward: float = 0.0
    tool_calls: int = 0
    tool_errors: int = 0
    seconds: float = 0.0
    routed_experts: NDArray[np.signedinteger] | None = None
    undecided: bool = False  # whether nothing could be found out about its answer; the reward is 0 then
    given: str | None = None  # the answer that was judged, None where there is none
    why: str = ""  # it is undecided
    terms: dict[str, float] = field(default_factory=dict)  # what the reward is made of, and other numbers that came with it
    accuracy: float | None = None  # what the answer alone is worth, where the reward is more than that
    branches: list[Branch] = field(default_factory=list)
    task_ids: list[int] | None = None  # of the prompt as the run has it, where another one was made of it; None: prompt_ids
    id: AttemptId = field(kw_only=True)

    @property
    def all_turns(self) -> list[Turn]:
        """Returns its turns, then those of its branches: each sampled turn once."""
        return [*self.turns, *(turn for branch in self.branches for turn in branch.turns)]

    @property
    def response_length(self) -> int:
        """Returns how many tokens follow the prompt, the tool's included; without branches."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def rightness(self) -> float:
        """Returns what the answer alone is worth, which evaluations count; 1 and above is right."""
        return self.reward if self.accuracy is None else self.accuracy

    @property
    def sampled_length(self) -> int:
        """Returns how many tokens the policy wrote, in branches too."""
        return sum(self.sampled_lengths)

    @property
    def sampled_lengths(self) -> list[int]:
        """Returns how many tokens the policy wrote in each sample: in the turns that end the attempt, and in each branch."""
        samples = [self.turns, *(branch.turns for branch in self.branches)]
        return [sum(len(turn.token_ids) for turn in turns if turn.role == "assistant") for turns in samples]


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt of a group that failed: it failed too often, or is not used because another one had (`aborted`)."""

    id: AttemptId
    reason: str
    aborted: bool = False
    response_length: int = 0  # tokens after the prompt by then
    reward: float | None = None  # of one that was finished by then


@dataclass(slots=True)
class TrajectoryGroup:
    """All attempts at one prompt; advantages are computed within it.

    A group of which one failed has no trajectories, and all of its attempts in `failed`; it is not trained on. `step` is the
    training step that the group is part of, once that is decided.
    """

    prompt: Prompt
    trajectories: list[Trajectory]
    step: int = 0
    id: GroupId = field(kw_only=True)
    failed: list[FailedAttempt] = field(default_factory=list, kw_only=True)
