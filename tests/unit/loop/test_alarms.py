"""What is recorded is judged: alarms reach events, TensorBoard and orders, whatever kind of row raised them."""

from __future__ import annotations

import io
import json
from contextlib import closing
from pathlib import Path

from rich.console import Console

from ctpo_megatron.config.alarms import AlarmsConfig, WebhookConfig
from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.loop.alarms import RunAlarms, as_markdown
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised, AlarmsUnsent
from ctpo_megatron.record.alarms.kinds import Measure
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.alarms.webhook import Webhook
from ctpo_megatron.record.events import Event, EventLog, ServerLost

BOUND = {"metric": "time/checkpoint", "above": 2.0, "smooth": 1, "patience": 1, "calm": 1, "then": "save"}
CONFIG = AlarmsConfig.model_validate({"warmup": 0, "bounds": {"slow_disk": BOUND}})


def test_a_row_that_is_recorded_raises_an_alarm_everywhere(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, orders = EventLog(tmp_path / "events.jsonl"), Orders()
    recorder = Recorder(tmp_path, LogConfig(), console=Console(file=io.StringIO()))
    alarms = RunAlarms(lambda: Alarms(CONFIG, Measure(1, 1)), events)
    with closing(RunRecord(tmp_path, LogConfig(), recorder, alarms=alarms)) as record:
        record.checkpoint(3, 5.0)
        record.obey(orders)
        assert orders.take_save()
        record.checkpoint(4, 5.0)
        record.checkpoint(5, 1.0)
        record.obey(orders)
        assert not orders.take_save(), "asked for once"
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [(AlarmRaised.name, 3), (AlarmCleared.name, 5)]
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    texts = [each.tensor_proto.string_val[0].decode() for each in board.Tensors("alarms/slow_disk/text_summary")]
    assert [text.split(":")[0] for text in texts] == [
        "ALARM slow_disk at step 3",
        "alarm slow_disk cleared at step 5, raised at step 3",
    ]


def test_events_of_the_run_are_heard_and_its_own_are_not() -> None:
    heard: list[str] = []
    alarms = Alarms(CONFIG, Measure(1, 1))
    alarms.event = lambda happened: heard.append(happened.name)  # type: ignore[method-assign]
    found = RunAlarms(lambda: alarms, lambda _event: None)
    events: list[Event] = [ServerLost("server 1", "gone", again=True), AlarmCleared("a", "b", 1, 1, "")]
    for event in events:
        found(event)
    assert heard == [ServerLost.name]


def test_words_of_a_run_are_no_markup_in_tensorboard() -> None:
    raised = AlarmRaised("servers", "<img src=x>`", 1, 1, 1.0, 1.0, "what", "advice", "tell")
    assert "<" not in as_markdown(raised)
    assert "`" not in as_markdown(raised)


def test_what_a_webhook_could_not_send_is_told_by_the_next_row() -> None:
    told: list[Event] = []
    webhook = Webhook(WebhookConfig(url="http://nowhere/", waiting=1), "mine", {})
    alarms = RunAlarms(lambda: Alarms(CONFIG, Measure(1, 1)), told.append, webhook)
    for _ in range(3):
        webhook(AlarmCleared("a", "b", 1, 1, ""))
    for step in (1, 2):
        alarms.row({"step": float(step), "time": 0.0})
    assert told == [AlarmsUnsent("more of them came than could be sent", 2)]
