"""What the index says of each trajectory: the numbers that rank it, and the words that it is searched by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from ctpo_megatron.errors import InputError, storing
from ctpo_megatron.record.token_files import StoredTokens, TokenRecord, token_file
from ctpo_megatron.report.viewer.rows import Line, Number, RolloutFile, Row, read_rows
from ctpo_megatron.report.viewer.streams import sampled, spread, total, versions_of

EXCERPT = 110  # characters of a text's beginning, and as many of its end
WORDS = 80  # characters of an answer
_EVALUATION = re.compile(r"e\d+-(?:(.*)-)?g\d+(?:\.\d+)?")


class Summary(msgspec.Struct, array_like=True, gc=False):
    """One trajectory in the index, and where its row and its tokens stand. None: not recorded, or no number."""

    id: str
    begin: int
    size: int
    first_sample: int  # in the step's record of tokens
    samples: int
    reward: Number
    status: str
    source: str
    prompt: str
    sampled: int  # tokens that the policy wrote
    tokens: int  # all
    turns: int
    calls: int
    errors: int
    clipped: float | None
    gap: float | None
    ratio: float | None
    oldest: int
    newest: int
    undecided: bool
    answer: str
    given: str | None
    excerpt: str


class FileSummary(msgspec.Struct, gc=False):
    """The trajectories of a file, and what of it could not be used, in words."""

    trajectories: list[Summary]
    complaints: list[str]


class _Ended(msgspec.Struct, gc=False):
    """A line of ledger.jsonl; `group` is empty where a run went back."""

    group: str = ""
    prompt: str = ""


def prompts_by_group(run_dir: Path) -> dict[str, str]:
    """Returns the prompt of each group in the ledger, by the group's id; none where there is no ledger."""
    path, decoder, found = run_dir / "ledger.jsonl", msgspec.json.Decoder(_Ended), {}
    if path.is_file():
        with storing(path), path.open("rb") as file:
            for line in file:
                try:
                    ended = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # being written, or of another release: the index says the prompt's row instead
                found[ended.group] = ended.prompt
    return found


def summarise(run_dir: Path, file: RolloutFile, prompts: Mapping[str, str]) -> FileSummary:
    """Returns what the index says of the trajectories of `file`. `prompts`: of groups, see `prompts_by_group`."""
    complaints: list[str] = []
    rows = list(_plain(file, prompts, complaints))
    stored = _stored(run_dir, file, [each.lengths for each in rows], complaints)
    return FileSummary([each.summary(stored) for each in rows], complaints)


def open_tokens(run_dir: Path, file: RolloutFile) -> StoredTokens | None:
    """Returns the step's record of tokens; None where the run wrote none. Raises InputError where it cannot be used."""
    if file.kind != "step" or file.step is None:
        return None
    path = run_dir / "tokens" / token_file(file.step)
    return StoredTokens(path) if path.is_file() else None


class _Plain(msgspec.Struct, gc=False):
    """A row without what training made of it; `lengths`: tokens that the policy wrote, of each of its samples."""

    row: Summary
    lengths: list[int]

    def summary(self, stored: StoredTokens | None) -> Summary:
        """Returns it with that."""
        if stored is None:
            return self.row
        found = spread(stored.samples(self.row.first_sample, self.row.samples))
        return msgspec.structs.replace(self.row, clipped=_short(found.clipped), gap=_short(found.gap), ratio=_short(found.ratio))


def _plain(file: RolloutFile, prompts: Mapping[str, str], complaints: list[str]) -> Iterator[_Plain]:
    first, unread = 0, 0
    for line, row in read_rows(file):
        if row is None:
            unread += 1
            continue
        lengths = sampled(row)
        yield _Plain(_summary(line, row, first, lengths, prompts), lengths)
        first += len(lengths)
    if unread:
        complaints.append(f"{file.path.name}: {unread} lines are no trajectories, and are left out.")


def _stored(run_dir: Path, file: RolloutFile, lengths: list[list[int]], complaints: list[str]) -> StoredTokens | None:
    """Returns the step's record of tokens, where it is of these trajectories."""
    try:
        stored = open_tokens(run_dir, file)
    except InputError as error:
        complaints.append(str(error))
        return None
    if stored is None or stored.lengths.tolist() == [each for row in lengths for each in row]:
        return stored
    complaints.append(f"tokens/{token_file(file.step or 0)} is not of the trajectories in {file.path.name}, and is left out.")
    return None


def _summary(line: Line, row: Row, first: int, lengths: list[int], prompts: Mapping[str, str]) -> Summary:
    prompt = prompts.get(row.group, str(row.prompt_index))
    oldest, newest = versions_of(row)
    return Summary(
        id=row.id,
        begin=line.begin,
        size=line.size,
        first_sample=first,
        samples=len(lengths),
        reward=_number(row.reward),
        status=row.status,
        source=_source(row.id, prompt),
        prompt=prompt,
        sampled=sum(lengths),
        tokens=total(row),
        turns=len(row.turns),
        calls=row.tool_calls,
        errors=row.tool_errors,
        clipped=None,
        gap=None,
        ratio=None,
        oldest=oldest,
        newest=newest,
        undecided=row.undecided,
        answer=row.answer[:WORDS],
        given=None if row.given is None else row.given[:WORDS],
        excerpt=_excerpt(row.text),
    )


def _source(name: str, prompt: str) -> str:
    """Returns the file of a mixture that a prompt is from, or the benchmark of an evaluation."""
    evaluation = _EVALUATION.fullmatch(name)
    if evaluation is not None:
        return evaluation[1] or "held out"
    source, colon, _ = prompt.rpartition(":")
    return source if colon else "train"


def _excerpt(text: str) -> str:
    return text if len(text) <= 2 * EXCERPT else f"{text[:EXCERPT]} … {text[-EXCERPT:]}"


def _number(value: Number) -> Number:
    """Returns a number that JSON can hold, or its name."""
    number = float(value)
    if math.isfinite(number):
        return float(f"{number:.6g}")
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def tokens_of(stored: StoredTokens | None, summary: Summary) -> TokenRecord | None:
    """Returns what training made of a trajectory; None where that is not recorded."""
    return None if stored is None else stored.samples(summary.first_sample, summary.samples)
