"""The parts of a frame, each from the view of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ctpo_megatron.record.now import Doing, ServerNow
from ctpo_megatron.report.watch.happenings import Life, Told
from ctpo_megatron.report.watch.numbers import SHOWN, Series
from ctpo_megatron.report.watch.spark import Sparkline
from ctpo_megatron.report.watch.view import View
from ctpo_megatron.report.watch.words import clock, duration, number, plain

CURVES = tuple(name for name in SHOWN if name not in ("rollout/staleness_max", "ledger/kept_length", "ledger/kept_reward"))
PHASE_STYLES = {
    "rollout": "blue",
    "batch": "cyan",
    "train": "green",
    "sleep": "magenta",
    "publish": "yellow",
    "evaluate": "bright_cyan",
    "checkpoint": "bright_magenta",
    "storage": "red",
}
IDLE = "idle"
STALENESS = "rollout/staleness_mean"
LABEL_WIDTH = 12
WHOLE_ALARMS = 2  # that are shown with all their words
ENDS = {"done": "bold green", "stopped": "bold yellow"}  # others: red


def head(view: View) -> RenderableType:
    """Returns what the run is and where it stands."""
    top = Table.grid(expand=True, padding=(0, 1, 0, 0))
    top.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    top.add_column(justify="right", no_wrap=True)
    top.add_row(Text.assemble((plain(view.settings.name), "bold"), "  ", state(view)), clock(view.clock(), view.clock()))
    return Group(top, _progress(view), _doing(view))


def state(view: View) -> Text:
    """Returns whether the run goes on, and how it ended where it has."""
    life, told = view.happenings.life, view.happenings
    before = _before(told.lives)
    if life is not None and life.how is not None:
        why = f": {plain(life.reason)}" if life.reason else ""
        return Text.assemble((life.how, ENDS.get(life.how, "bold red")), f"{why}{before}")
    if not view.live:
        if view.heard is None:
            return Text("nothing is written yet", "yellow")
        words = f"silent for {duration(max(0.0, view.clock() - view.heard))}, without an end: it may have been killed"
        return Text.assemble((words, "bold red"), before)
    if told.stopping:
        return Text.assemble(("stopping", "bold yellow"), f": {plain(told.stopping)}{before}")
    if told.trainer_lost:
        return Text.assemble(("the trainer starts again", "bold yellow"), before)
    if life is not None and life.ready is None:
        return Text.assemble(("starting", "bold yellow"), f" for {duration(max(0.0, view.clock() - life.began))}{before}")
    return Text.assemble(("running", "bold green"), before)


def _before(lives: Sequence[Life]) -> str:
    if len(lives) < 2:
        return ""
    ends = Counter(each.how or "killed" for each in lives[:-1])
    return f", incarnation {lives[-1].number} ({', '.join(f'{count} {how}' for how, count in ends.items())})"


def _progress(view: View) -> RenderableType:
    steps, done, told = view.steps, view.step, view.happenings
    words = [f"step {done:,}" + (f" of {steps:,}" if steps else "")]
    more = []
    if (speed := told.seconds_per_step()) is not None:
        more.append(f"{duration(speed)} a step")
    if (eta := view.eta_s()) is not None:
        more.append(f"done in {duration(eta)}, {clock(view.clock() + eta, view.clock())}")
    if told.saved is not None:
        more.append(f"saved {told.saved:,}")
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    bar = ProgressBar(total=steps, completed=min(done, steps)) if steps else ""
    line.add_row(" ".join(words), bar, ", ".join(more))
    return line


def _doing(view: View) -> Text:
    if view.present is None:
        return Text("")
    doing = "; ".join(_stage(each) for each in view.present.driver) or "waits"  # for processes that start, or to be told
    line = Text.assemble(_label("now"), plain(doing))
    if view.present.loop_lag_s > 1.0:
        line.append(f"; the driver is {duration(view.present.loop_lag_s)} late", "red")
    return line


def _stage(doing: Doing) -> str:
    step = "" if doing.step is None else f" of step {doing.step:,}"
    detail = f", {doing.detail}" if doing.detail else ""
    waits = f", waits for {doing.waits_for}" if doing.waits_for else ""
    return f"{doing.name}{step}{detail}{waits}, {duration(doing.seconds)}"


def curves(view: View, most: int) -> RenderableType:
    """Returns the first `most` series that have values: over all steps, with the newest, the lowest and the highest value."""
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, show_edge=False, header_style="dim", pad_edge=False)
    table.add_column("all steps", no_wrap=True, max_width=28, overflow="ellipsis")
    table.add_column("", ratio=1, no_wrap=True)
    for title in ("now", "lowest", "highest"):
        table.add_column(title, justify="right", no_wrap=True)
    found = [(name, view.numbers.series[name]) for name in drawn(view)]
    for name, series in found[:most]:
        table.add_row(_name(name, series), Sparkline(series.values, "cyan"), *_extremes(series))
    return table if found else Text("\nno step is done yet", "dim")


def drawn(view: View) -> list[str]:
    """Returns the series that there are, without a staleness that is none."""
    there = view.numbers.series
    return [name for name in CURVES if name in there and not (name == STALENESS and not any(there[name].values))]


def _name(name: str, series: Series) -> Text:
    short = name.removeprefix("health/").removeprefix("rollout/")
    return Text.assemble(short, (f" {series.broken} not finite", "red") if series.broken else "")


def _extremes(series: Series) -> tuple[str, ...]:
    if series.last is None:
        return "-", "-", "-"
    return number(series.last), *(f"{number(value)} @{step}" for value, step in (series.low, series.high))


def phases(view: View, width: int) -> RenderableType:
    """Returns where the time of the last steps went, as a bar and in words."""
    told = view.happenings
    spent = {name: seconds for name, seconds in told.phases().items() if seconds > 0}
    whole = sum(each.seconds for each in told.steps) / len(told.steps) if told.steps else 0.0
    if not spent or whole <= 0:
        return Text("")
    spent["other"] = max(0.0, whole - sum(spent.values()))
    bar, words = Text(), Text.assemble(_label(f"last {len(told.steps)} steps"))
    edge, reached = 0, 0.0
    for name, seconds in spent.items():
        style = PHASE_STYLES.get(name, "bright_black")
        reached += seconds
        until = round(reached / max(whole, sum(spent.values())) * width)
        bar.append("━" * (until - edge), style)
        edge = until
        if seconds / whole >= 0.005:
            words.append(name, style).append(f" {seconds / whole:.0%} ")
    if (useful := told.useful()) is not None:
        words.append(f"useful {useful:.0%}", "bold")
    return Group("", words, bar)


def servers(view: View, most: int) -> RenderableType:
    """Returns the servers: those that do not serve first, then those with the longest queues, at most `most` of them."""
    if view.present is None or not view.present.servers:
        return Text("")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False, expand=True)
    table.add_column("servers", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("state", no_wrap=True)
    for title in ("version", "sent", "bound", "running", "waiting", "cache"):
        table.add_column(title, justify="right", no_wrap=True)
    ordered = sorted(view.present.servers, key=lambda each: (each.state == "serving", -(each.waiting or 0), -each.in_flight))
    for each in ordered[:most]:
        table.add_row(*_server(each))
    left = ordered[most:]
    if left:
        waiting = sum(each.waiting or 0 for each in left)
        table.add_row(f"and {len(left)} more", "", "", f"{sum(each.in_flight for each in left)}", "", "", f"{waiting}", "")
    return table


def _server(server: ServerNow) -> tuple[RenderableType, ...]:
    name = f"{server.name} (aside)" if server.aside else server.name
    serving = server.state == "serving"
    counts = (server.version, server.in_flight, server.limit, server.running, server.waiting)
    cache = "-" if server.cache_use is None else f"{server.cache_use:.0%}"
    words = ["-" if each is None else f"{each:,}" for each in counts]
    return (plain(name), Text(server.state, "green" if serving else "bold yellow"), *words, cache)


def trainer(view: View) -> RenderableType:
    """Returns what the trainer's ranks do, and what tasks of the driver wait for."""
    if view.present is None:
        return Text("")
    lines = []
    if view.present.ranks:
        doing = Counter("; ".join(_at(each) for each in rank.doing) or IDLE for rank in view.present.ranks)
        words = "; ".join(f"{count} in {what}" if what != IDLE else f"{count} wait to be told" for what, count in doing.items())
        line = Text.assemble(_label("ranks"), plain(words))
        late = [rank for rank in view.present.ranks if rank.unanswered_s > 10.0]
        if late:
            worst = max(late, key=lambda each: each.unanswered_s)
            line.append(f"; {plain(worst.name)} has not answered for {duration(worst.unanswered_s)}", "red")
        lines.append(line)
    if view.present.waits:
        waits = (f"{count} for {plain(name)} (longest {duration(s)})" for name, (count, s) in view.present.waits.items())
        lines.append(Text.assemble(_label("waiting"), ", ".join(waits)))
    return Group(*lines)


def _at(doing: Doing) -> str:
    return f"{doing.name}" + ("" if doing.step is None else f" of step {doing.step + 1:,}" if doing.name == "update" else "")


def ledger(view: View) -> RenderableType:
    """Returns the age of what was trained on, and what became of the groups."""
    numbers, settings = view.numbers, view.settings
    lines = []
    mean, most = (numbers.series.get(f"rollout/staleness_{each}") for each in ("mean", "max"))
    if mean is not None and most is not None and mean.last is not None and most.last is not None:
        version = "" if view.happenings.version is None else f"; published: {view.happenings.version:,}"
        words = f"tokens {number(mean.last)} versions old, the oldest {number(most.last)}{version}"
        lines.append(Text.assemble(_label("staleness"), words))
    sums = {name: int(numbers.sums.get(f"ledger/{name}", 0)) for name in ("filtered", "failed", "aborted")}
    if numbers.sums:
        trained = "" if settings.groups is None else f"{numbers.trained * settings.groups:,} groups trained on; "
        words = f"{trained}{', '.join(f'{count:,} {name}' for name, count in sums.items())}"
        lines.append(Text.assemble(_label("ledger"), words))
        kept = [numbers.series.get(f"ledger/kept_{each}") for each in ("length", "reward")]
        if kept[0] is not None and kept[1] is not None and kept[0].last is not None and kept[1].last is not None:
            words = f"{kept[0].last:.3f} of the mean length, {kept[1].last:+.3f} of the mean reward"
            lines.append(Text.assemble(_label("kept"), words))
    if view.happenings.goodput is not None:
        words = f"{view.happenings.goodput:.0%} of the allocated time, up to the last incarnation's end"
        lines.append(Text.assemble(_label("goodput"), words))
    if skipped := int(numbers.sums.get("train/skipped_steps", 0)):
        lines.append(Text.assemble(_label("skipped"), (f"{skipped:,} optimizer steps, not finite", "red")))
    return Group(*lines)


def alarms(view: View) -> RenderableType:
    """Returns the alarms that are up, the newest first; of the newest ones all that they say, as that ends with what to do."""
    if not view.happenings.alarms:
        return Text("")
    up = sorted(view.happenings.alarms.values(), key=lambda each: -each.time)
    return _told(view, up, "bold red", "alarms", whole=WHOLE_ALARMS)


def events(view: View, most: int) -> RenderableType:
    """Returns the last `most` events, the newest last."""
    recent = list(view.happenings.recent)[-most:] if most > 0 else []
    return _told(view, recent, "", "events") if recent else Text("")


def _told(view: View, what: Sequence[Told], style: str, title: str, whole: int = 0) -> RenderableType:
    """A line for each of `what`; the first `whole` take as many as they need."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=LABEL_WIDTH, no_wrap=True, style="dim")
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis", style=style)
    table.title, table.title_justify, table.title_style = title, "left", "dim"
    for place, each in enumerate(what):
        wraps = Text(plain(each.sentence), no_wrap=False, overflow="fold") if place < whole else Text(plain(each.sentence))
        table.add_row(clock(each.time, view.clock()), wraps)
    return table


def _label(words: str) -> tuple[str, str]:
    return f"{words:<{LABEL_WIDTH}} ", "dim"
