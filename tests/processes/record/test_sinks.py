"""Sinks in processes of their own: what reaches them, how a run goes on in them, and what becomes of one that fails or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.sinks import AnySink, MlflowSink, OtelSink, PrometheusSink, WandbSink
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.recording import close_sinks, make_sinks, open_record
from ctpo_megatron.jobs.resume import start_of
from ctpo_megatron.jobs.sft import sft_job
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.jobs.train import train_job
from ctpo_megatron.loop.alarms import Hearing
from ctpo_megatron.record import sink_process
from ctpo_megatron.record.alarm_events import AlarmRaised
from ctpo_megatron.record.events import Event, RunReady, ServerLost
from ctpo_megatron.record.nonfinite_events import StepSkipped
from ctpo_megatron.record.sink_events import PointsLost
from ctpo_megatron.record.sink_process import RunWords, SinkProcess, check_sinks
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.types import Prompt
from tests.support.runs import ROOT

SOON_S = 60.0
SECRET = "a-key-that-nobody-may-see"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def opened(sink: AnySink, run_dir: Path, *, resumed: bool = False, **options: float) -> SinkProcess:
    return SinkProcess(sink, RunWords("toy", run_dir, {"optimizer.lr": 1e-3}, resumed), **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process_of(sink: SinkProcess) -> psutil.Process:
    """The process, once it is there."""
    return psutil.Process(until(lambda: sink._process and sink._process.pid))


def until(look):
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")


def test_prometheus_reads_the_last_values_at_the_loopback(run_dir: Path) -> None:
    sink = opened(settings := PrometheusSink(port=free_port()), run_dir)
    check_sinks([settings])
    try:
        for step in (1, 2):
            metrics = {"train/loss": 0.5 * step, "servers/queue/server_3": 4.0, "moe/load_entropy/layer_0": float("nan")}
            sink.step(step, metrics, 8.0 * step, 1000.0)

        def page() -> str | None:
            try:
                text = urlopen(f"http://127.0.0.1:{settings.port}/metrics", timeout=5).read().decode()
            except OSError:
                return None
            return text if 'ctpo_progress_step{run="toy"} 2.0' in text else None

        text = until(page)
        with pytest.raises(ConfigError, match=r"log\.sinks\[0\], type prometheus: cannot listen at 127\.0\.0\.1"):
            check_sinks([settings])
        listens = {each.laddr.ip for each in process_of(sink).net_connections() if each.status == psutil.CONN_LISTEN}
        assert listens == {"127.0.0.1"}
    finally:
        sink.close()
    lines = text.splitlines()
    assert 'ctpo_train_loss{run="toy"} 1.0' in lines
    assert 'ctpo_servers_queue{run="toy",server="3"} 4.0' in lines
    assert 'ctpo_moe_load_entropy{layer="0",run="toy"} NaN' in lines or 'ctpo_moe_load_entropy{run="toy",layer="0"} NaN' in lines
    assert any(line.startswith("# HELP ctpo_train_loss Loss of an optimizer step") for line in lines)
    assert sink.lost() == (0, "")


def spans(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "spans.jsonl").read_text().splitlines()]


def test_spans_are_the_phases_of_steps_and_a_resume_goes_on_in_the_same_run(run_dir: Path) -> None:
    for resumed, steps in ((False, (1, 2)), (True, (3,)), (False, (1,))):
        sink = opened(OtelSink(), run_dir, resumed=resumed)
        for step in steps:
            sink.step(step, {"train/loss": 1.0}, 8.0, 1000.0)
            sink.phase("rollout", step, 100.0 * step, 2.0)
            sink.phase("train", step, 100.0 * step + 3.0, 1.5)
        sink.close()
        assert sink.lost() == (0, "")
    found = spans(run_dir)
    assert [span["name"] for span in found[:6]] == ["rollout", "train", "step 1", "rollout", "train", "step 2"]
    rollout, train, whole = found[:3]
    assert {rollout["parent_id"], train["parent_id"]} == {whole["context"]["span_id"]}
    assert whole["parent_id"] is None
    assert (whole["start_time"], whole["end_time"]) == ("1970-01-01T00:01:40.000000Z", "1970-01-01T00:01:44.500000Z")
    assert (train["start_time"], train["end_time"]) == ("1970-01-01T00:01:43.000000Z", "1970-01-01T00:01:44.500000Z")
    ids = [span["resource"]["attributes"]["ctpo.run_id"] for span in found]
    assert len(set(ids[:9])) == 1, "the run went on in another one of the sink"
    assert ids[9] not in ids[:9], "a run that begins anew is another one"


LOST = ServerLost("inference server 3", "it died", again=True)
READY = RunReady(12.0)
RAISED = AlarmRaised("entropy", "train/entropy", 2, 1, 0.1, 0.2, "entropy fell", "look", "tell")
SKIPPED = StepSkipped(1, 1, 4, 0, "loss is nan", 1, 3, None, 0)


def test_prometheus_counts_events(run_dir: Path) -> None:
    sink = opened(settings := PrometheusSink(port=free_port()), run_dir)
    for each in (LOST, READY, LOST):
        sink.event(each, 1000.0)
    try:

        def page() -> str | None:
            with contextlib.suppress(OSError):
                text = urlopen(f"http://127.0.0.1:{settings.port}/metrics", timeout=5).read().decode()
                return text if "} 2.0" in text else None
            return None

        lines = until(page).splitlines()
    finally:
        sink.close()
    assert "# TYPE ctpo_events_total counter" in lines
    counted = {line for line in lines if line.startswith("ctpo_events_total{")}
    assert counted == {f'ctpo_events_total{{event="{name}",run="toy"}} {n}' for name, n in (("ready", 1.0), ("server lost", 2.0))}
    assert sink.lost() == (0, "")


def test_events_are_told_in_the_span_of_their_step_or_in_one_of_their_own(run_dir: Path) -> None:
    """Of a step nothing is heard before its first phase is over, so events come before the span that they lie in."""
    sink = opened(OtelSink(), run_dir)
    sink.event(READY, 90.0)
    sink.event(LOST, 101.0)  # while the rollout of step 1 goes on
    sink.phase("rollout", 1, 100.0, 2.0)
    sink.event(SKIPPED, 103.5)
    sink.phase("train", 1, 103.0, 1.5)
    sink.event(RAISED, 150.0)  # between both
    sink.phase("rollout", 2, 200.0, 2.0)
    sink.event(LOST, 300.0)  # behind the last
    sink.close()
    assert sink.lost() == (0, "")
    found = [(span, each) for span in spans(run_dir) for each in span["events"]]
    assert [(span["name"], seconds(span["start_time"]), seconds(span["end_time"]), each["name"]) for span, each in found] == [
        ("outside the steps", 90, 100, "ready"),
        ("step 1", 100, 104.5, "server lost"),
        ("step 1", 100, 104.5, "step skipped"),
        ("outside the steps", 150, 200, "alarm raised"),
        ("outside the steps", 300, 300, "server lost"),
    ]
    assert [seconds(each["timestamp"]) for _, each in found] == [90, 101, 103.5, 150, 300]
    assert found[2][1]["attributes"] == {
        "sentence": SKIPPED.sentence,
        **{name: value for name, value in asdict(SKIPPED).items() if value is not None},
    }


def seconds(time: str) -> float:
    """Since 1970, of a time in a span."""
    return datetime.fromisoformat(time).timestamp()


def test_a_process_that_is_killed_is_told_and_begun_again(run_dir: Path) -> None:
    sink = opened(OtelSink(), run_dir, again_s=0.0)
    try:
        sink.phase("rollout", 1, 1.0, 1.0)
        first = process_of(sink)
        first.kill()
        until(lambda: first.status() == psutil.STATUS_ZOMBIE)  # whoever waits for it takes its code away
        sink.phase("rollout", 2, 1.0, 1.0)
        lost, reason = until(lambda: (found := sink.lost())[0] and found)
        assert lost == 1
        assert re.search(r"its process ended with code -9: .*; see .*sink_otel\.log", reason), reason
        sink.phase("rollout", 3, 1.0, 1.0)
        assert process_of(sink).pid != first.pid
    finally:
        sink.close()
    assert spans(run_dir)[-1]["name"] == "step 3"
    assert sink.lost() == (0, "")


def test_a_process_that_fails_says_why_and_is_left_alone_for_a_while(run_dir: Path) -> None:
    (run_dir / "spans.jsonl").mkdir()  # it cannot be written
    sink = opened(OtelSink(), run_dir)
    reasons = list[str]()

    def ended() -> bool:
        sink.phase("rollout", 1, 1.0, 1.0)
        reasons.append(sink.lost()[1])
        return "started again in a while" in reasons[-1]

    until(ended)
    sink.close()
    assert any("its process ended with code 1: IsADirectoryError" in reason for reason in reasons), reasons


def test_a_process_that_hangs_holds_up_nobody_and_is_ended(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_process, "DRAIN_S", 0.2)
    monkeypatch.setattr(sink_process, "END_S", 0.2)
    sink = opened(PrometheusSink(port=free_port()), run_dir, most=10)
    sink.step(1, {"train/loss": 1.0}, 8.0, 1.0)
    process = process_of(sink)
    process.suspend()
    many = {f"servers/queue/server_{n}": 1.0 for n in range(1000)}
    for step in range(2, 30):  # more than a pipe and the queue hold
        sink.step(step, many, 8.0, 1.0)
    assert sink.lost()[0] > 0
    sink.close()
    assert not process.is_running()
    assert sink.lost()[0] > 0
    sink.close()


def test_the_process_of_a_run_that_is_killed_ends_and_keeps_what_it_has(run_dir: Path) -> None:
    """Seen by its closed pipe, which is all that a run that is killed leaves behind."""
    sink = opened(OtelSink(), run_dir)
    sink.phase("rollout", 1, 1.0, 1.0)
    process = process_of(sink)
    until(lambda: sink._aside.lost() == (0, "") and not sink._aside._queue)
    os.close(sink._process.stdin.fileno())
    assert process.wait(SOON_S) in (0, None)
    assert [span["name"] for span in spans(run_dir)] == ["rollout", "step 1"]
    sink._process = None
    sink.close()


@pytest.mark.parametrize(
    ("sink", "words"),
    [
        (
            WandbSink(python="/usr/bin/false"),
            r"type wandb: /usr/bin/false has no package wandb; `/usr/bin/false -m pip install wandb`",
        ),
        (MlflowSink(python="/nowhere/python"), r"type mlflow: python=/nowhere/python cannot be started"),
        (
            OtelSink(endpoint="http://127.0.0.1:4318/v1/traces", python="/usr/bin/false"),
            r"pip install opentelemetry-exporter-otlp-pr",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(sink: AnySink, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_sinks([sink])


def test_the_parts_of_a_run_reach_tensorboard_and_the_sink(run_dir: Path) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["log.sinks=[{type: otel}]", f"run_dir={run_dir}"])
    told = list[Event]()

    async def run(step: int, *, resumed: bool) -> None:
        sinks = make_sinks(config, run_dir, resumed=resumed)
        begin = start_of(config, [Prompt(0, ({"role": "user", "content": "q"},), "1")], None, [], told.append)
        record = await open_record(
            config, run_dir, replace(begin, step=step - 1), sinks, Hearing(None), told.append, Storage(run_dir)
        )
        record.phase(step, "train", 2.0)
        record.step(step, [], {"train/loss": 0.5, "progress/samples": 8.0 * step}, np.ones((2, 4)))
        record.close()
        await close_sinks(sinks, told.append)

    asyncio.run(run(1, resumed=False))
    asyncio.run(run(2, resumed=True))
    assert [span["name"] for span in spans(run_dir)] == ["train", "step 1", "train", "step 2"]
    assert len({span["resource"]["attributes"]["ctpo.run_id"] for span in spans(run_dir)}) == 1
    board = EventAccumulator(str(run_dir / "tb"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in board.Images("moe/load")] == [1, 2]
    shown = metadata.parse_session_start_info_plugin_data(
        board.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    ).hparams
    assert shown["algorithm.objective.type"].string_value == "ctpo"
    assert shown["optimizer.lr"].number_value == pytest.approx(1.5e-4)
    assert not any(isinstance(event, PointsLost) for event in told)


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_command_is_refused_before_it_reads_anything(run_dir: Path, command: str) -> None:
    sinks = "log.sinks=[{type: wandb, python: /usr/bin/false}]"
    config = load_config(ROOT / "configs" / "quickstart.yaml", [sinks, f"run_dir={run_dir}/run", "model.path=/nowhere"])
    job = train_job(config, StopSignal(), resume="no") if command == "train" else sft_job(config, StopSignal())
    with pytest.raises(ConfigError, match="has no package wandb"):
        asyncio.run(job)
    assert not (run_dir / "run").exists()


def test_no_key_is_in_arguments_or_logs(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    (run_dir / "key").write_text(SECRET)
    commands, start = list[list[str]](), subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: commands.append(words) or start(words, **more))
    sink = opened(WandbSink(mode="offline", key_file=str(run_dir / "key")), run_dir)  # fails where the package is missing
    sink.step(1, {"train/loss": 1.0}, 8.0, 1.0)
    sink.close()
    (command,) = commands
    assert command[-1] == "wandb"
    assert SECRET not in " ".join(command)
    assert SECRET not in (run_dir / "logs" / "sink_wandb.log").read_text()
    assert SECRET not in json.dumps(WandbSink(key_file=str(run_dir / "key")).words())
