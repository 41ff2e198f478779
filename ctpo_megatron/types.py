"""The words of the system: what flows from a prompt to a training sample. Plain lists, numbers and arrays, no tensors.

    Prompt -> Trajectory (turns, status, reward) -> TrajectoryGroup -> TrainSample

A token id enters a `Turn` exactly once, where it was sampled or where tool text was tokenised, and is copied from there; no
text is ever tokenised a second time.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


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


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """How a mixture-of-experts model routes: what a record of its choices looks like."""

    num_layers: int  # all of the model
    expert_layers: tuple[int, ...]  # those with experts, numbered from 0
    experts: int  # of each such layer
    top_k: int  # that a token goes to

    @property
    def dtype(self) -> np.dtype:
        """Returns the smallest signed integer that holds -1 and every expert's number."""
        return np.dtype(np.int8 if self.experts <= 128 else np.int16)

    def unknown(self, tokens: int) -> NDArray[np.signedinteger]:
        """Returns a record of `tokens` tokens about which nothing is known: -1, [tokens, expert layers, top_k]."""
        return np.full((tokens, len(self.expert_layers), self.top_k), -1, self.dtype)


@dataclass(frozen=True, slots=True)
class Truncation:
    """What is cut off the tempered distribution before a token is drawn. The defaults cut off nothing."""

    top_p: float = 1.0  # the likeliest tokens that together reach this probability
    top_k: int | None = None  # so many of the likeliest tokens; None: all
    min_p: float = 0.0  # tokens that are at least so many times as likely as the likeliest one

    @property
    def cuts(self) -> bool:
        """Returns whether anything can be cut off."""
        return self.top_p < 1.0 or self.top_k is not None or self.min_p > 0.0


WHOLE = Truncation()


@dataclass(frozen=True, slots=True)
class Supports:
    """The tokens that could have been drawn at each place of a stream, where sampling was truncated (docs/truncation.md)."""

    ids: NDArray[np.int32]  # [sum of counts], place after place
    counts: NDArray[np.int32]  # [tokens]; 0 where no policy drew

    @classmethod
    def none(cls, tokens: int) -> Supports:
        """Returns the entry of `tokens` tokens that no policy drew."""
        return cls(np.zeros(0, np.int32), np.zeros(tokens, np.int32))

    @classmethod
    def joined(cls, parts: Sequence[Supports]) -> Supports:
        """Returns one stream after the other; at least one is needed."""
        return cls(np.concatenate([p.ids for p in parts]), np.concatenate([p.counts for p in parts]))

    @classmethod
    def of_rows(cls, rows: NDArray[np.int32]) -> Supports:
        """Returns those in `rows` [tokens, K], where -1 is an unused column."""
        used = rows >= 0
        return cls(rows[used].astype(np.int32), used.sum(1).astype(np.int32))

    @property
    def width(self) -> int:
        """Returns the largest count, at least 1."""
        return max(1, int(self.counts.max(initial=0)))

    def rows(self, width: int) -> NDArray[np.int32]:
        """Returns [tokens, width]; -1: an unused column."""
        rows = np.full((len(self.counts), width), -1, np.int32)
        rows[np.arange(width) < self.counts[:, None]] = self.ids
        return rows


@dataclass(frozen=True, slots=True)
class TopK:
    """The top-k next tokens under the policy that sampled, most probable first, for each token of a stream."""

    ids: NDArray[np.int32]  # [tokens, K]
    logp: NDArray[np.float32]  # [tokens, K], at the sampling temperature; -inf: an unused place

    @classmethod
    def unused(cls, tokens: int, k: int) -> TopK:
        """Returns the entry of `tokens` tokens that no policy sampled: every place unused."""
        return cls(np.zeros((tokens, k), np.int32), np.full((tokens, k), -np.inf, np.float32))

    @classmethod
    def joined(cls, parts: list[TopK]) -> TopK:
        """Returns one stream after the other; at least one is needed."""
        return cls(np.concatenate([p.ids for p in parts]), np.concatenate([p.logp for p in parts]))


@dataclass(slots=True)
class Generation:
    """What an inference engine sampled after a prompt: streams of equal length. A stop token that ended it is the last entry."""

    token_ids: list[int] = field(default_factory=list)
    # of the distribution at the sampling temperature (greedy: at 1); with supports, of what truncation left of it
    rollout_logp: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # policy version that sampled each token
    finish: Literal["stop", "length", "deadline", "abort"] = "length"  # abort: of a part, more is to come
    top_k: TopK | None = None  # the top-k tokens at each place, at the sampling temperature
    routed_experts: NDArray[np.signedinteger] | None = None  # [tokens, expert layers, top_k], see `EngineClient.generate`
    supports: Supports | None = None  # the tokens that could have been drawn, of truncated sampling for training

    def copy(self) -> Generation:
        """Returns it as it is now: what is appended to this one later does not show there."""
        streams = self.token_ids.copy(), self.rollout_logp.copy(), self.versions.copy()
        return Generation(*streams, self.finish, self.top_k, self.routed_experts, self.supports)

    def append(self, part: Generation) -> None:
        """Add the tokens of `part`."""
        self.token_ids += part.token_ids
        self.rollout_logp += part.rollout_logp
        self.versions += part.versions
        if part.supports is not None:
            self.supports = Supports.joined([self.supports or Supports.none(0), part.supports])


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

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.rollout_logp), len(self.versions)}
        if self.top_k is not None:
            lengths |= {len(self.top_k.ids), len(self.top_k.logp)}
        if self.supports is not None:
            lengths.add(len(self.supports.counts))
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
    undecided: bool = False  # whether its answer could not be compared with the right one; the reward is 0 then
    given: str | None = None  # the answer that was judged, None where there is none
    branches: list[Branch] = field(default_factory=list)
    task_ids: list[int] | None = None  # of the prompt as the run has it, where an agent made another one of it; None: prompt_ids
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


class End(enum.StrEnum):
    """What became of a group that was admitted."""

    TRAINED = "trained"
    FILTERED = "filtered"  # all its rewards are equal, and another one took its place
    FAILED = "failed"  # one of its attempts failed too often, and another one took its place
    ABORTED = "aborted"  # it can be trained on no more


@dataclass(frozen=True, slots=True)
class Fate:
    """How a group ended, and why, and before which training step, or in it. `attempts`: of one that failed."""

    step: int
    end: End
    reason: str
    prompt: str  # `Prompt.key`
    attempts: tuple[FailedAttempt, ...] = ()


@dataclass(frozen=True, slots=True)
class Composition:
    """Which groups make training step `step`, counted from 0, and what became of others since the step before.

    Which group is finished first is a matter of time, so it is written down, for whoever makes the same step again.
    """

    step: int
    trained: tuple[int, ...]  # numbers of its groups
    fates: dict[int, Fate] = field(default_factory=dict)  # of these, and of the others, by their numbers
    admitted: int = 0  # groups by then: the prompts of the next ones were chosen knowing what this step earned

    @property
    def others(self) -> list[int]:
        """Returns the numbers of the groups that ended otherwise."""
        return [number for number in self.fates if number not in self.trained]


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A call of a tool that the model wrote and that can be used. `arguments`: the JSON text of an object, as it was written."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the assistant wrote in one turn, in its parts. What is no usable call is in `content`; None: it wrote no reasoning."""

    content: str
    reasoning: str | None = None
    calls: tuple[ParsedCall, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One trajectory, or a branch of one, as the trainer sees it: label-aligned streams of equal length L = tokens - 1.

    Position t predicts `labels[t]` from `input_ids[: t + 1]`. No stream is shifted after this point.

    Example: prompt `[7, 8]`, sampled `[5, 6]`, tool `[9]`, sampled `[4]` gives
        input_ids     7  8  5  6  9
        labels        8  5  6  9  4
        mask          0  1  1  0  1
    """

    input_ids: list[int]
    labels: list[int]
    mask: list[bool]  # True where the policy wrote the label
    rollout_logp: list[float]  # engine's log-prob of the label; 0.0 where masked
    versions: list[int]  # version that sampled the label; -1 where masked
    advantages: list[float]  # 0.0 where masked
    group: int = 0  # samples of one prompt share it
    attempt: int | None = None  # of its group; samples of one attempt weigh as one sequence. None: it is one by itself
    routed_experts: NDArray[np.signedinteger] | None = None  # [L, expert layers, top_k] of each input; -1: the trainer routes it
    top_k: TopK | None = None  # of each label, where the run collects it; unused where masked
    supports: Supports | None = None  # of each label, where sampling is truncated; none where masked

    def __post_init__(self) -> None:
        streams: list[Any] = [self.input_ids, self.labels, self.mask, self.rollout_logp, self.versions]
        streams += [self.advantages]
        streams += [] if self.routed_experts is None else [self.routed_experts]
        streams += [] if self.top_k is None else [self.top_k.ids, self.top_k.logp]
        streams += [] if self.supports is None else [self.supports.counts]
        if len({len(stream) for stream in streams}) != 1:
            raise ValueError(f"streams of a sample differ in length: {[len(stream) for stream in streams]}")

    def __len__(self) -> int:
        return len(self.input_ids)
