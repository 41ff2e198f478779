"""How answers are judged."""

from __future__ import annotations

import re
from string import Template
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ctpo_megatron.config.base import FilePath, Section

PLACEHOLDERS = ("question", "answer", "response")


class RewardSection(Section):
    """What all rewards share."""

    no_verdicts: ClassVar[frozenset[str]] = frozenset()  # keys that change no verdict: kept ones stay good when these change


class MathReward(RewardSection):
    r"""1.0 where the last \boxed{} equals the answer by the rules of docs/rewards.md, else 0.0."""

    type: Literal["math"] = "math"
    timeout_s: PositiveFloat = 5.0
    """Time to compare one answer; beyond it the reward is 0 and `reward/undecided` counts it."""


class CodeReward(RewardSection):
    """Runs the last block of code of the answer against tests, confined as the Python tool is. The known answer holds the tests
    (docs/rewards.md)."""

    type: Literal["code"] = "code"
    score: Literal["all", "share"] = "all"
    """`all`: 1 where all tests pass, else 0. `share`: the share of tests that pass."""
    max_tests: PositiveInt | None = None
    """How many of the tests are run, from the first on. null: all."""
    timeout_s: PositiveFloat = 10.0
    """Wall time of one test; one that takes longer has not passed."""
    memory_mb: PositiveInt = 512
    """Address space of one test."""
    max_output_chars: PositiveInt = 100_000
    """What a program prints beyond it is cut, so that its test does not pass."""


class JudgeReward(RewardSection):
    """Asks a language model, over any server that speaks OpenAI's chat completions."""

    no_verdicts: ClassVar[frozenset[str]] = frozenset(
        {"url", "key_file", "timeout_s", "retries", "concurrency", "budget_calls", "budget_tokens", "beyond", "replies"}
    )

    type: Literal["judge"] = "judge"
    url: str
    """Where the server is, up to the version: `http://host:8000/v1`. `/chat/completions` is added."""
    model: str
    """The model's name there."""
    budget_calls: PositiveInt | None
    """How many requests may be sent in all, those that fail included. null, which has to be written: no bound."""
    budget_tokens: PositiveInt | None = None
    """How many tokens may be used in all, of prompts and replies, as the server counts them. Requests on their way when it is
    reached come on top. null: no bound."""
    beyond: Literal["end", "zero"] = "end"
    """When a budget is used up: the run ends with an error, and goes on when it is resumed with a larger one; or every further
    answer gets 0 from the judge, which `reward/term/judge_skipped` counts."""
    key_file: FilePath | None = None
    """File that holds the server's key, and nothing else. null: none is sent."""
    prompt: str | None = None
    """What the judge is asked. `$question` is the last message of the prompt, `$answer` the known answer, `$response` what the
    assistant wrote; `$$` is a dollar. null: whether the answer is right, as 0 or 1."""
    system: str | None = None
    """A system message before it. null: none."""
    verdict: Literal["number", "json"] = "number"
    """Where the score is in the reply: its last line is a number; or its last JSON object has the key `score`. All else is
    undecided."""
    lowest: float = 0.0
    """The lowest score, for which the reward is 0. A score outside is undecided."""
    highest: float = 1.0
    """The highest score, for which the reward is 1; scores between are scaled."""
    seen_after: str | None = None
    """The judge is shown only what follows the last occurrence of this text, as of `</think>`; an answer without it gets 0.
    null: all of it."""
    max_response_chars: PositiveInt = 20_000
    """Longer answers are cut in the middle for the judge."""
    max_tokens: PositiveInt = 512
    """Of a reply."""
    temperature: float = Field(0.0, ge=0)
    """The judge's."""
    extra: dict[str, Any] = Field({})
    """Further fields of each request, such as `seed` or `chat_template_kwargs`."""
    timeout_s: PositiveFloat = 60.0
    """How long one request may take."""
    retries: NonNegativeInt = 4
    """How often a request that the server did not answer is sent again. Then the attempt has failed (`rollout.retries`)."""
    concurrency: PositiveInt = 32
    """Requests in flight."""
    replies: FilePath | None = None
    """File of all replies, a line of JSON each: equal requests are answered from it, and budgets count what it holds. One run
    at a time may use it. null: RUN_DIR/judge/NAME.jsonl."""

    @field_validator("url")
    @classmethod
    def _is_a_base(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", url) or url.rstrip("/").endswith("/completions"):
            raise ValueError(f"{url!r}; needed: http://host:port/v1, without a key and without /chat/completions")
        return url.rstrip("/")

    @field_validator("prompt")
    @classmethod
    def _places_are_known(cls, prompt: str | None) -> str | None:
        if prompt is None:
            return None
        template = Template(prompt)
        known = ", ".join(f"${name}" for name in PLACEHOLDERS)
        if not template.is_valid() or not set(template.get_identifiers()) <= set(PLACEHOLDERS):
            raise ValueError(f"its places are {known}, and a dollar is written $$; found: {template.template[:200]!r}")
        if "response" not in template.get_identifiers():
            raise ValueError("$response is missing: the judge would not see what it judges")
        return prompt

    @field_validator("extra")
    @classmethod
    def _leaves_ours_alone(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "max_tokens", "temperature", "stream", "n"} & set(extra)
        if ours:
            raise ValueError(f"{sorted(ours)} may not be among them: they have keys of their own, or one whole reply is needed")
        return extra

    @model_validator(mode="after")
    def _has_a_scale(self) -> JudgeReward:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest:g} is not below highest={self.highest:g}")
        return self


class FunctionReward(RewardSection):
    """A function of yours, in processes of its own (docs/rewards.md)."""

    no_verdicts: ClassVar[frozenset[str]] = frozenset({"processes"})

    type: Literal["function"] = "function"
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:function`, sync or async. Given a dict of plain data, it returns a number, or a dict with `reward`."""
    timeout_s: PositiveFloat = 10.0
    """Wall time of one call. Beyond it its process is ended, and the answer is undecided."""
    memory_mb: PositiveInt = 4096
    """Address space of each process; what needs more is undecided."""
    processes: PositiveInt = 2
    """How many there are. Each judges one answer after the other."""
    start_timeout_s: PositiveFloat = 120.0
    """How long the import of the function's module may take."""


class FormatTerm(RewardSection):
    """1 where a regular expression is found in what the assistant wrote, else 0."""

    type: Literal["format"] = "format"
    pattern: str
    r"""In the syntax of Python's `re`; `.` matches line ends too. `\A` and `\Z` are the ends of the text."""
    timeout_s: PositiveFloat = 1.0
    """A search that takes longer is undecided."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class LengthTerm(RewardSection):
    """0 for a response that leaves `buffer` of `max_tokens`, falling in a line to -1 at `max_tokens` (DAPO, arXiv 2503.14476)."""

    type: Literal["length"] = "length"
    max_tokens: PositiveInt
    """Tokens after the prompt, tool output included. Usually `rollout.max_response_tokens`."""
    buffer: PositiveInt
    """How far before `max_tokens` the penalty begins."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> LengthTerm:
        if self.buffer > self.max_tokens:
            raise ValueError(f"buffer={self.buffer} is longer than max_tokens={self.max_tokens}; allowed: 1 to max_tokens")
        return self


class ToolUseTerm(RewardSection):
    """1 where the tool was called as often as wanted, else 0; less for calls that failed."""

    type: Literal["tool_use"] = "tool_use"
    min_calls: NonNegativeInt = 1
    """At least so many calls."""
    max_calls: NonNegativeInt | None = None
    """At most so many calls. null: any number."""
    failed: float = Field(0.0, ge=0, le=1)
    """How much is taken off where all calls failed; of others their share of it."""

    @model_validator(mode="after")
    def _some_number_fits(self) -> ToolUseTerm:
        if self.max_calls is not None and self.max_calls < self.min_calls:
            raise ValueError(f"max_calls={self.max_calls} is below min_calls={self.min_calls}")
        return self


AnswerReward = Annotated[MathReward | CodeReward | JudgeReward | FunctionReward, Field(discriminator="type")]
CheapTerm = FormatTerm | LengthTerm | ToolUseTerm
AnyTerm = Annotated[
    MathReward | CodeReward | JudgeReward | FunctionReward | FormatTerm | LengthTerm | ToolUseTerm, Field(discriminator="type")
]


class RewardTerm(Section):
    """One part of a combination."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")
    """Its name in the record: `reward/term/NAME`."""
    weight: float = 1.0
    """What its value is multiplied by."""
    reward: AnyTerm
    """What gives the value."""


class CombinationReward(RewardSection):
    """The sum of terms, each by its weight."""

    type: Literal["combination"] = "combination"
    terms: tuple[RewardTerm, ...]
    """The terms. The first that judges answers is what evaluations count."""

    @field_validator("terms")
    @classmethod
    def _names_differ(cls, terms: tuple[RewardTerm, ...]) -> tuple[RewardTerm, ...]:
        names = [term.name for term in terms]
        if not terms or len(set(names)) < len(names):
            raise ValueError(f"needed: one term at least, each with a name of its own; found: {names}")
        files = [term.reward.replies for term in terms if isinstance(term.reward, JudgeReward) and term.reward.replies]
        if len(set(files)) < len(files):
            raise ValueError(f"two judges have the same file of replies, which would mix up their budgets: {files}")
        return terms


AnyReward = Annotated[MathReward | CombinationReward | CodeReward | JudgeReward | FunctionReward, Field(discriminator="type")]


def parts(reward: RewardSection) -> list[tuple[str, RewardSection]]:
    """Returns the terms of a reward by their names; one that is no combination is its only term, called by its type."""
    if isinstance(reward, CombinationReward):
        return [(term.name, term.reward) for term in reward.terms]
    return [(type(reward).model_fields["type"].default, reward)]


def verdict_settings(reward: RewardSection) -> Any:
    """Returns the settings, as JSON values, that verdicts depend on."""
    if isinstance(reward, CombinationReward):
        return [[term.name, term.weight, verdict_settings(term.reward)] for term in reward.terms]
    return reward.model_dump(mode="json", exclude=set(reward.no_verdicts))
