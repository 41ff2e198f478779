"""What `ctpo data` found, for a person: one screen where all is well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ctpo_megatron.data.authors import Part
from ctpo_megatron.data.complaints import listed
from ctpo_megatron.jobs.data_findings import FileFound, Findings, ModelFound, Rendered
from ctpo_megatron.jobs.gold_answers import GoldAnswers
from ctpo_megatron.jobs.plan import plain_table

WIDTH = 120  # of lines that do not go to a terminal
STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "template": "dim"}
COMMANDS = {"train": "ctpo train", "sft": "ctpo sft"}
UNSAID = {"assistant": "(what the model writes)", "tool": "(what its program prints)"}
LONGEST_TEXT, HEAD, TAIL = 1200, 800, 300  # characters of a part, of which longer ones show the beginning and the end
MOST_LINES, FIRST_LINES, LAST_LINES = 14, 9, 4
SHORT = 40  # characters of a value that is quoted within a line
WARNING = "yellow"
RUN, REJECTED = "a run", "  not accepted"
ORDER = ("columns", "too long", "duplicates", "contradictions", "leaks", "answers", REJECTED, RUN)  # of facts about files


def report(found: Findings) -> Iterator[RenderableType]:
    """Yield the parts of the report, from top to bottom."""
    yield _headline(found)
    yield ""
    if found.files:
        yield _lengths(found.files)
        yield ""
    yield _facts(found)
    yield ""
    for file in found.files:
        for number, sample in enumerate(file.samples):
            goes_on = found.model.continuation if found.model is not None and file.use == "train" and number == 0 else ()
            yield _title(_name(file, found.files), sample)
            yield _sample(sample, goes_on)
            yield ""
    yield _verdict(found)


def visible(text: str) -> str:
    """Returns `text` with what no terminal should be sent, and nobody could see, written as escapes: \\x1b, \\u200b."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)


def _headline(found: Findings) -> Text:
    words = {"train": "prompts to train on", "eval": "to evaluate on", "sft": "demonstrations"}
    text = Text(f"{found.name}", style="bold")
    counts = ", ".join(f"{file.rows:,} {words[file.use]}" for file in found.files)
    text.append(f": {counts}" if counts else "", style="not bold")
    return text.append(f"\nread as `{COMMANDS[found.use]} {found.config}` would", style="dim not bold")


def _name(file: FileFound, files: Sequence[FileFound]) -> str:
    """The name of a file, with its directory where another has the same name."""
    name = Path(file.path).name
    return file.path if sum(Path(other.path).name == name for other in files) > 1 else name


def _lengths(files: Sequence[FileFound]) -> Table:
    table = plain_table("tokens of", "rows", "least", "mean", "50 %", "90 %", "99 %", "most", "allowed")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for file in files:
        for number, measure in enumerate(file.measures):
            sizes = measure.lengths
            name, rows = (_name(file, files), f"{file.rows:,}") if number == 0 else (f"  {measure.of}", "")
            spread = (f"{sizes.least:,}", f"{sizes.mean:,.1f}", *(f"{size:,}" for size in (sizes.p50, sizes.p90, sizes.p99)))
            allowed = "" if measure.allowed is None else f"{measure.allowed:,}"
            table.add_row(name, rows, *spread, Text(f"{sizes.most:,}", style="red" if measure.too_long else ""), allowed)
    return table


def _facts(found: Findings) -> Table:
    """Lines of a label and what is said under it; what holds for several files alike is said once."""
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    facts = [(label, line, style, file) for file in found.files for label, line, style in _file_facts(found, file)]
    told = {(label, line): style for label, line, style, _ in facts}
    for label in sorted({label for label, _ in told}, key=ORDER.index):
        lines = [line for other, line in told if other == label]
        for number, line in enumerate(lines):
            files = [file for other, said, _, file in facts if (other, said) == (label, line)]
            names = ", ".join(_name(file, found.files) for file in files)
            alone = label == RUN and sum(file.use != "eval" for file in found.files) == 1
            where = "" if len(files) == len(found.files) or alone else f"{names}: "
            table.add_row("" if number else label, Text(where + line, style=told[label, line]))
    if found.model is not None:
        for label, line in _model_facts(found.model, found):
            table.add_row(label, Text(line))
    return table


def _file_facts(found: Findings, file: FileFound) -> Iterator[tuple[str, str, str]]:
    """Yield label, line and style."""
    unused = f"; not used: {', '.join(map(visible, file.ignored))}" if file.ignored else "; there are no others"
    yield "columns", f"{', '.join(file.read)}{unused}", ""
    for measure in file.measures:
        if measure.too_long:
            named = listed([f"{row} ({tokens:,})" for row, tokens in measure.too_long])
            share = f"{len(measure.too_long):,} of {file.rows:,} rows"
            yield "too long", f"{share} have more than {measure.limit} = {measure.allowed:,} tokens: {named}", "red"
    yield from _repeats(file)
    if file.answers is not None:
        yield from _answers(file.answers)
    if file.use != "eval":
        yield RUN, _times(found, file), ""


def _times(found: Findings, file: FileFound) -> str:
    """How often a run goes through a file that it trains on."""
    steps = f"{found.steps:,} steps of {found.rows_per_step:,} rows"
    if file.share is None:
        return f"{steps}; the curriculum decides how many are from here"
    times = found.steps * found.rows_per_step * file.share / file.rows
    often = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    part = "" if file.share == 1 else f", {file.share:.0%} of them from here"
    return f"{steps}{part}: {often} times through the file"


def _repeats(file: FileFound) -> Iterator[tuple[str, str, str]]:
    again, repeats = file.rows - file.different, file.repeats
    words = f"{again:,} of {file.rows:,} rows ask what an earlier one asks"
    if repeats is None:
        words = f"{again:,} of {file.rows:,} rows repeat an earlier one"
    elif again:
        words += f"; row {repeats.most_row} most often, {repeats.most:,} times"
    yield "duplicates", words if again else "none", WARNING if again else ""
    if repeats is not None and repeats.contradictions:
        pairs = listed([f"{first} and {other}" for first, other in repeats.contradictions])
        yield "contradictions", f"{len(repeats.contradictions):,} questions with different answers: rows {pairs}", WARNING
    if file.shared:
        pairs = listed([f"{row} ({first})" for row, first in file.shared])
        share = f"{len(file.shared):,} of {file.rows:,} rows"
        yield "leaks", f"{share} ask what a row asks (in brackets) that is trained on: {pairs}", WARNING
    elif file.use == "eval":
        yield "leaks", "no row asks what is trained on", ""


def _answers(answers: GoldAnswers) -> Iterator[tuple[str, str, str]]:
    total = answers.different
    good = total - len(answers.rejected)
    words = f"{good:,} of {total:,} different ones, put in a box, are accepted by their own grader"
    kinds = "all numbers"
    if answers.others:
        kinds = f"{answers.numbers:,} numbers, {len(answers.others):,} others: {listed(list(map(_short, answers.others)))}"
    yield "answers", f"{words}; {kinds}", WARNING if answers.rejected else ""
    for rejected in answers.rejected[:10]:
        rows = listed([f"{row:,}" for row in rejected.rows])
        line = f"row{'s' if len(rejected.rows) > 1 else ''} {rows}: {_short(rejected.answer)}: {rejected.why}"
        yield REJECTED, line, "red"
    if len(answers.rejected) > 10:
        yield REJECTED, f"and {len(answers.rejected) - 10:,} more; --json names all", "red"


def _model_facts(model: ModelFound, found: Findings) -> Iterator[tuple[str, str]]:
    yield "model", f"{model.path} ({model.family}), {model.vocabulary:,} token ids, context of {model.context:,} tokens"
    stops = ", ".join(f"{visible(token.text)} ({token.id})" for token in model.stop_tokens)
    which = "which ends a turn" if len(model.stop_tokens) == 1 else f"of which {visible(model.turn_end.text)} ends a turn"
    yield "stop tokens", f"{stops}, {which}"
    if found.system_prompt is not None:
        yield "system prompt", _short(found.system_prompt)


def _title(name: str, sample: Rendered) -> Text:
    trained = f", of which {sample.trained:,} are trained on" if sample.trained else ""
    answer = "" if sample.answer is None else f"; answer: {_short(sample.answer)}"
    return Text(f"{name}, row {sample.row}: {sample.tokens:,} tokens{trained}{answer}", style="bold")


def _sample(sample: Rendered, goes_on: Sequence[Part]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold green")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part in (*sample.parts, *goes_on):
        _add_part(table, part)
    return table


def _add_part(table: Table, part: Part) -> None:
    style = STYLES[part.author]
    lines = _lines(part)
    for number, line in enumerate(lines):
        text = Text(line, style=f"{style} italic" if not part.text else style)
        if part.ends_turn:
            text = Text().append(line, style=f"{style} reverse").append("  ends the turn", style="dim")
        table.add_row("*" if part.trained else " ", Text(part.author if number == 0 else "", style=style), text)


def _lines(part: Part) -> list[str]:
    """The lines of a part. Line breaks of the template, and those at an end, are shown by a sign, and long texts are cut."""
    if not part.text:
        return [UNSAID[part.author]]
    text = visible(part.text)
    if part.author == "template" or part.ends_turn:
        return [text.replace("\n", "↵")]
    if len(text) > LONGEST_TEXT:
        text = f"{text[:HEAD]}\n{_cut(len(text) - HEAD - TAIL, 'characters')}\n{text[-TAIL:]}"
    lines = text.split("\n")
    if lines[-1] == "":
        lines = [*lines[:-2], f"{lines[-2]}↵"]
    if len(lines) > MOST_LINES:
        lines = [*lines[:FIRST_LINES], _cut(len(lines) - FIRST_LINES - LAST_LINES, "lines"), *lines[-LAST_LINES:]]
    return lines


def _cut(count: int, of: str) -> str:
    return f"[... {count:,} {of}; --json has all ...]"


def _verdict(found: Findings) -> Text:
    command = COMMANDS[found.use]
    if found.problem is not None:
        return Text(f"`{command}` would refuse this, and say:", style="red")
    text = Text("* is trained on. ", style="dim") if any(file.samples for file in found.files) else Text()
    text.append(f"`{command}` would take this data and this model.", style="not dim green")
    return text.append(
        " Not looked at: memory (ctpo plan), this host (ctpo doctor), the places that a run writes to.", style="dim"
    )


def _short(text: str) -> str:
    """`text` as a literal that fits into a line."""
    return visible(repr(text if len(text) <= SHORT else f"{text[:SHORT]}..."))
