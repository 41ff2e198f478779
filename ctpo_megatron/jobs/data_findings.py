"""What `ctpo data` found out, as plain values: filled in as it goes, so that what was found before an error can be shown too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.rewards import MathReward, parts
from ctpo_megatron.data.authors import Part, Run, parts_of, runs_of
from ctpo_megatron.data.kind import Kind
from ctpo_megatron.data.messages import Message
from ctpo_megatron.data.prompts import COLUMNS as PROMPT_COLUMNS
from ctpo_megatron.data.sft import COLUMNS as SFT_COLUMNS
from ctpo_megatron.data.sft import LengthLimit, Taught, as_conversation, as_samples
from ctpo_megatron.data.survey import Lengths, Repeats, find_repeats
from ctpo_megatron.data.tables import read_rows
from ctpo_megatron.jobs.gold_answers import GoldAnswers, judge_answers
from ctpo_megatron.jobs.inputs import OpenModel, PromptFile
from ctpo_megatron.record.events import DataRead
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Prompt, TrainSample


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the model."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class ModelFound:
    """What matters of a model for reading data. `continuation`: how a conversation goes on after a prompt.

    In it, a part of the assistant or of a tool whose text is empty stands for what they will say.
    """

    path: str
    family: str
    vocabulary: int  # rows of the embedding
    context: int  # tokens
    stop_tokens: tuple[Token, ...]
    turn_end: Token  # the one that the chat template ends the assistant's turns with
    continuation: tuple[Part, ...]

    @classmethod
    def of(cls, config: RunConfig, model: OpenModel) -> ModelFound:
        """Returns what there is to say about an opened model."""
        shape, chat = model.shape, model.chat
        stops = tuple(Token(id_, chat.decode([id_], special=True)) for id_ in chat.stop_token_ids)
        end = chat.assistant_ids("")[-1]
        turn_end = Token(end, chat.decode([end], special=True))
        says = (Part("assistant", "", trained=True), Part("assistant", turn_end.text, trained=True, ends_turn=True))
        tool = (*tool_turn(chat), *says) if config.rollout.code_tool is not None else ()
        return cls(config.model.path, shape.family, shape.vocab_size, shape.max_positions, stops, turn_end, (*says, *tool))


@dataclass(frozen=True, slots=True)
class Measure:
    """How long something is in all rows of a file. `too_long`: the rows beyond `allowed` tokens, and how long they are."""

    of: str
    lengths: Lengths
    allowed: int | None = None
    limit: str = ""  # where the configuration says so
    too_long: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as the model sees it."""

    row: int
    tokens: int
    trained: int  # tokens that the model is taught to write; none in a prompt, whose continuation is
    parts: tuple[Part, ...]
    answer: str | None = None


@dataclass(slots=True)
class FileFound:
    """What a file holds. `shared`: pairs of a held-out row and a row that is trained on, as `Prompt.key`, that ask the same.

    `share`: of the rows of each step, how many are from this file; None: a curriculum decides it.
    """

    path: str
    use: str  # train, eval or sft
    rows: int
    different: int
    read: tuple[str, ...]  # columns
    ignored: tuple[str, ...]
    measures: list[Measure] = field(default_factory=list)
    repeats: Repeats | None = None
    shared: list[tuple[int, str]] = field(default_factory=list)
    share: float | None = 1.0
    answers: GoldAnswers | None = None
    samples: list[Rendered] = field(default_factory=list)


@dataclass(slots=True)
class Findings:
    """All of it. `problem`: why a run would not start; None where it would, as far as data and model go."""

    name: str
    use: Kind
    config: str
    system_prompt: str | None
    rows_per_step: int  # of the file, over one step of the run
    steps: int
    model: ModelFound | None = None
    files: list[FileFound] = field(default_factory=list)
    problem: str | None = None


def prompts_found(file: PromptFile, use: str, read: DataRead, config: RunConfig, chat: ChatTokenizer, samples: int) -> FileFound:
    """Returns what a file of prompts holds; its first `samples` rows rendered."""
    limit = config.data.max_prompt_tokens
    too_long = tuple((row, length) for row, length in enumerate(file.lengths) if length > limit)
    measure = Measure("prompts", Lengths.of(file.lengths), limit, "data.max_prompt_tokens", too_long)
    repeats = find_repeats(file.prompts)
    found = FileFound(file.path, use, read.rows, repeats.different, PROMPT_COLUMNS, read.ignored, [measure], repeats)
    by_math = next((part for _, part in parts(config.rollout.reward) if isinstance(part, MathReward)), None)
    if by_math is not None:
        found.answers = judge_answers(file.prompts, by_math)
    found.samples = [prompt_rendered(prompt, chat) for prompt in file.prompts[:samples]]
    return found


def demonstrations_found(
    samples: Sequence[TrainSample],
    use: str,
    limit: LengthLimit,
    read: DataRead,
    config: RunConfig,
    chat: ChatTokenizer,
    shown: int,
) -> FileFound:
    """Returns what a file of demonstrations holds, of which `samples` can be written; the first `shown` rows rendered."""
    found = FileFound(read.file, use, read.rows, read.different, SFT_COLUMNS, read.ignored)
    if samples:
        too_long = tuple((sample.group, len(sample)) for sample in samples if len(sample) > limit.tokens)
        whole = Lengths.of([len(sample) for sample in samples])
        found.measures = [
            Measure("demonstrations", whole, limit.tokens, limit.words.partition(" =")[0], too_long),
            Measure("trained on", Lengths.of([sum(sample.mask) for sample in samples])),
        ]
        whole_rows = {sample.group: sample for sample in samples}
        first = enumerate(islice(read_rows(read.file, SFT_COLUMNS), shown))
        rows = [(whole_rows[row], place, held["messages"]) for row, (place, held) in first if row in whole_rows]
        found.samples = [demonstration_rendered(*row, config.data.system_prompt, chat, config.sft.turns) for row in rows]
    return found


def tool_turn(chat: ChatTokenizer) -> list[Part]:
    """Returns what stands between two turns of the assistant: a tool's output, whatever it is, and the template around it."""
    word = "whatthetoolsaid"
    before, _, after = chat.decode(chat.tool_ids(word), special=True).partition(word)
    parts = [Part("template", before), Part("tool", ""), Part("template", after)]
    return [part for part in parts if part.text or part.author == "tool"]


def prompt_rendered(prompt: Prompt, chat: ChatTokenizer) -> Rendered:
    """Returns a prompt as the model sees it, the beginning of its answer included."""

    def render(messages: Sequence[Message]) -> str:
        return chat.decode(chat.prompt_ids(messages), special=True)

    ids = chat.prompt_ids(prompt.messages)
    parts = parts_of([Run(chat.decode(ids, special=True))], prompt.messages, render)
    return Rendered(prompt.index, len(ids), 0, tuple(parts), prompt.answer)


def demonstration_rendered(
    sample: TrainSample, place: str, messages: object, system_prompt: str | None, chat: ChatTokenizer, turns: Taught = "last"
) -> Rendered:
    """Returns a demonstration, the last sample of its row, as the model sees it.

    `messages` are what the row, found at `place`, holds.
    """
    talk, start = as_conversation(place, messages, system_prompt)

    def render(changed: Sequence[Message]) -> str:
        last = as_samples(place, sample.group, changed, start, chat, turns)[-1]
        return "".join(run.text for run in _runs(last, chat))

    parts = parts_of(_runs(sample, chat), talk, render)
    return Rendered(sample.group, len(sample), sum(sample.mask), tuple(parts))


def _runs(sample: TrainSample, chat: ChatTokenizer) -> list[Run]:
    """The tokens of a sample as text, told apart by the mask that training uses."""
    tokens = [*sample.input_ids[:1], *sample.labels]
    return runs_of(tokens, [False, *sample.mask], chat.stop_token_ids, lambda ids: chat.decode(ids, special=True))
