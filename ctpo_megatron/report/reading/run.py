"""A run directory, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import InputError
from ctpo_megatron.record.goodput import Goodput, account
from ctpo_megatron.record.story import Happened, Story
from ctpo_megatron.report.reading.happenings import everything, read_happened
from ctpo_megatron.report.reading.ledgers import Groups, read_groups
from ctpo_megatron.report.reading.lines import Complaints, mapping, objects
from ctpo_megatron.report.reading.metrics import Metrics, read_rows

OWN = frozenset({"seed", "run_dir", "name"})  # settings that may differ between runs of one configuration
# of a configuration, what is under the run's own directories in every run
PLACES = ("model.path", "data.train", "data.eval")


@dataclass(frozen=True, slots=True)
class Run:
    """All that a report is made of. `complaints`: what is missing or damaged, in words."""

    directory: Path
    label: str  # what the report calls it
    metrics: Metrics
    story: Story
    goodput: Goodput | None  # None where no incarnation is known
    groups: Groups
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    ratios: tuple[Mapping[str, Any], ...]  # lines of ratios.jsonl
    checkpoints: tuple[str, ...]  # names of those that are there
    rollouts: tuple[Path, ...]
    complaints: tuple[str, ...]

    @property
    def events(self) -> list[Happened]:
        """Returns all that happened, in its order."""
        return everything(self.story)

    @property
    def name(self) -> str:
        """Returns what the configuration calls the run, its directory's name where that is not known."""
        return str(self.config.get("name") or self.directory.name)

    def setting(self, key: str) -> Any:
        """Returns a setting by its dotted key; None where it is not known."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def happened(self, name: str) -> list[Happened]:
        """Returns its events of that name."""
        return [each for each in self.events if each.name == name]

    @property
    def began(self) -> float | None:
        """Returns when the first sign of it was written, seconds since 1970."""
        signs = [each.time for each in self.events[:1]] + [time for time in self.metrics.times.values() if time]
        return min(signs, default=None)

    @property
    def last_sign(self) -> float | None:
        """Returns when the last sign of it was written, seconds since 1970."""
        signs = [each.time for each in self.events[-1:]] + [time for time in self.metrics.times.values() if time]
        return max(signs, default=None)


def read_run(directory: Path, label: str | None = None) -> Run:
    """Returns what is in the directory of a run, also of one that goes on, or ended in the middle of a line.

    Raises InputError where there is neither a metrics.jsonl nor an events.jsonl.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such directory; give the run_dir of a run")
    if not any((directory / name).is_file() for name in ("metrics.jsonl", "events.jsonl")):
        raise InputError(f"{directory}: neither metrics.jsonl nor events.jsonl is there; give the run_dir of a run")
    complaints, none = Complaints(), Complaints()  # none: what only some runs have is not missed
    story = read_happened(objects(directory / "events.jsonl", complaints, "no events, goodput and incarnations"), complaints)
    metrics = read_rows(objects(directory / "metrics.jsonl", complaints, "no curves"))
    groups = read_groups(objects(directory / "ledger.jsonl", complaints, "no ledger, and no bands of the reward"))
    if groups.damaged:
        complaints.append(f"ledger.jsonl: {groups.damaged:,} lines tell of no group and were left out")
    config = mapping(directory / "config.yaml", complaints, "the configuration is not known")
    return Run(
        directory=directory,
        label=label or directory.resolve().name,
        metrics=metrics,
        story=story,
        goodput=account(story) if story.incarnations else None,
        groups=groups,
        config=config,
        environment=mapping(directory / "environment.json", complaints, "variables of the processes are not known"),
        summary=mapping(directory / "summary.json", none, ""),
        ratios=tuple(objects(directory / "ratios.jsonl", none, "")),
        checkpoints=tuple(sorted(each.name for each in directory.glob("checkpoints/step_*") if each.name[5:].isdigit())),
        rollouts=tuple(sorted(directory.glob("rollouts/*_*.jsonl"))),
        complaints=tuple(complaints),
    )


def read_runs(directories: list[Path]) -> list[Run]:
    """Returns the runs in the order in which they are given, each with a label of its own. Raises InputError as `read_run`."""
    names = [each.resolve().name for each in directories]
    labels = [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]
    return [read_run(directory, label) for directory, label in zip(directories, labels, strict=True)]


def settings(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns a configuration's values by dotted key; lists count as values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            found |= settings(value, name)
        else:
            found[name] = value
    return found


def same_but_for_the_seed(run: Run) -> tuple[tuple[str, str], ...]:
    """Returns what is equal in runs that are seeds of one configuration: all settings but the seed, names and directories.

    Seeds may have data and a first model of their own, so of these places only the file's name counts.
    """
    values = {key: value for key, value in settings(run.config).items() if key not in OWN}
    for key in PLACES:
        if isinstance(values.get(key), str):
            values[key] = Path(values[key]).name
    return tuple(sorted((key, repr(value)) for key, value in values.items()))
