"""Sinks whose packages are as published, and not part of the run's environment: nothing of them needs a network.

Weights & Biases and MLflow are fed by a run that is resumed, and go on in the same run. OpenTelemetry's exporter sends to a
receiver that takes OTLP over HTTP, as a collector does. The packages lie in an environment of their own, which `make test-sinks`
makes (tests/published/sinks.lock). Where there is none these tests are skipped.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from ctpo_megatron.config.sinks import AnySink, MlflowSink, OtelSink, WandbSink
from ctpo_megatron.record import sink_process
from ctpo_megatron.record.alarm_events import AlarmRaised
from ctpo_megatron.record.events import ServerLost
from ctpo_megatron.record.sink_process import RunWords, SinkProcess, check_sinks
from ctpo_megatron.record.story_events import How, IncarnationEnded

VENV = Path(__file__).resolve().parents[2] / ".venv-sinks"
PYTHON = str(VENV / "bin" / "python")
LIMIT_S = 300.0

pytestmark = pytest.mark.skipif(not (VENV / ".installed").exists(), reason="no .venv-sinks; `make test-sinks` makes it")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer to import them than a run that ends would wait."""
    monkeypatch.setattr(sink_process, "DRAIN_S", LIMIT_S)
    monkeypatch.setattr(sink_process, "END_S", LIMIT_S)


LOST = ServerLost("inference server 3", "it died", again=True)
RAISED = AlarmRaised("entropy", "train/entropy", 2, 1, 0.1, 0.2, "entropy fell", "look", "tell")


def feed(sink: AnySink, run_dir: Path, *, resumed: bool, steps: range, how: How = "done") -> str:
    """Feeds one incarnation, and returns the name of the run in the sink."""
    (run_dir / "logs").mkdir(exist_ok=True)
    check_sinks([sink])
    fed = SinkProcess(sink, RunWords("toy", run_dir, {"optimizer.lr": 1e-3, "seed": 1}, resumed))
    for step in steps:
        fed.step(step, {"train/loss": 1.0 / step, "train/ratio": math.nan}, 8.0 * step, 1000.0 + step)
        fed.event(LOST, 1000.0 + step)
    fed.event(RAISED, 1000.25 + steps[-1])
    fed.event(IncarnationEnded(1, how, "", 1000.5 + steps[-1]), 1000.5 + steps[-1])
    fed.close()
    assert fed.lost() == (0, ""), (run_dir / "logs" / f"sink_{sink.type}.log").read_text()
    return json.loads((run_dir / "sinks" / f"{sink.type}.json").read_text())["id"]


def test_mlflow_keeps_one_run_in_files(tmp_path: Path) -> None:
    sink = MlflowSink(python=PYTHON, experiment="toys")
    names = [feed(sink, tmp_path, resumed=resumed, steps=steps) for resumed, steps in ((False, range(1, 4)), (True, range(4, 6)))]
    assert names[0] == names[1]
    (run,) = (path for path in (tmp_path / "mlruns").glob("*/*") if path.is_dir())
    assert run.name == names[0]
    loss = [line.split() for line in (run / "metrics" / "train" / "loss").read_text().splitlines()]
    assert [(int(at), float(value), int(step)) for at, value, step in loss] == [
        (1000 * (1000 + step), pytest.approx(1.0 / step), step) for step in range(1, 6)
    ]
    assert (run / "params" / "optimizer.lr").read_text() == "0.001"
    assert "status: 3" in (run / "meta.yaml").read_text(), "not finished"
    texts = sorted((run / "artifacts" / "events").iterdir())
    lines = [line for text in texts for line in text.read_text().splitlines()]
    assert len(lines) == 5 + 2 + 2
    assert lines[0] == "1970-01-01 00:16:41 UTC  server lost: inference server 3 is lost: it died"
    assert f"1970-01-01 00:16:43 UTC  alarm raised: {RAISED.sentence}" in lines
    shutil.rmtree(run / "artifacts" / "events")
    (run / "artifacts" / "events").write_text("not a directory")
    feed(sink, tmp_path, resumed=True, steps=range(6, 7), how="failed")
    assert (run / "metrics" / "train" / "loss").read_text().splitlines()[-1].endswith(" 6"), "numbers get through"
    assert "events are not told" in (tmp_path / "logs" / "sink_mlflow.log").read_text()
    assert "status: 4" in (run / "meta.yaml").read_text(), "a run that failed is not finished"


READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2 as pb

HEAD, BLOCK, RECORD = 7, 1 << 15, struct.Struct("<IHB")  # a log of LevelDB's form behind a head of its own

def records(data):
    at, whole = HEAD, bytes()
    while at + RECORD.size <= len(data):
        if BLOCK - at % BLOCK < RECORD.size:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = RECORD.unpack_from(data, at)
        at += RECORD.size + size
        whole += data[at - size : at]
        if kind in (1, 4):  # the whole, or its last part
            yield pb.Record.FromString(whole)
            whole = bytes()

for path in sorted(Path(sys.argv[1]).glob("wandb/offline-run-*/run-*.wandb")):
    for record in records(path.read_bytes()):
        if record.HasField("run"):
            print(json.dumps({"id": record.run.run_id, "name": record.run.display_name}))
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            print(json.dumps({"row": items}))
        if record.HasField("alert"):
            print(json.dumps({"alert": [record.alert.title, record.alert.text, record.alert.level]}))
        if record.HasField("exit"):
            print(json.dumps({"exit": record.exit.exit_code}))
for path in sorted(Path(sys.argv[1]).glob("wandb/offline-run-*/files/media/table/*.table.json")):
    print(json.dumps({"table": json.loads(path.read_text()), "at": path.stat().st_mtime}))
"""


def test_wandb_keeps_one_run_offline(tmp_path: Path) -> None:
    sink = WandbSink(python=PYTHON, mode="offline")
    names = [feed(sink, tmp_path, resumed=resumed, steps=steps) for resumed, steps in ((False, range(1, 4)), (True, range(4, 6)))]
    assert names[0] == names[1]
    read = subprocess.run([PYTHON, "-c", READ_WANDB, str(tmp_path)], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    lines = [json.loads(line) for line in read.stdout.splitlines()]
    assert {line["id"] for line in lines if "id" in line} == {names[0]}
    assert {line["name"] for line in lines if "id" in line} == {"toy"}
    logged = [{key: json.loads(value) for key, value in line["row"].items()} for line in lines if "row" in line]
    rows = [row for row in logged if "train/loss" in row]
    assert [(row["step"], row["samples"], row["train/loss"]) for row in rows] == [
        (step, 8.0 * step, pytest.approx(1.0 / step)) for step in range(1, 6)
    ]
    counted = [row["_step"] for row in logged]
    assert counted == sorted(set(counted)), "rows that do not count on would be dropped"
    assert [line["alert"] for line in lines if "alert" in line] == [["alarm entropy", RAISED.sentence, "WARN"]] * 2
    assert [line["exit"] for line in lines if "exit" in line] == [0, 0]
    told = [row for line in lines if "table" in line for row in line["table"]["data"]]
    assert told.count(["1970-01-01 00:16:41 UTC", "server lost", LOST.sentence]) == 1
    assert [event for _, event, _ in told].count("server lost") == 5
    assert {tuple(line["table"]["columns"]) for line in lines if "table" in line} == {("time", "event", "what happened")}


class Receiver(ThreadingHTTPServer):
    """Takes OTLP over HTTP at a free port of the loopback, as a collector does: spans in protocol buffers, perhaps compressed."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        super().__init__(("127.0.0.1", 0), _Receiving)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Receiving(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        found = ExportTraceServiceRequest.FromString(body) if self.path == "/v1/traces" else None
        self.server.headers.append(dict(self.headers))
        for of_resource in () if found is None else found.resource_spans:
            self.server.resources.append({each.key: each.value.string_value for each in of_resource.resource.attributes})
            for scope in of_resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()
        if found is not None:
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_receiver_of_otlp_gets_spans_and_their_events(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=not-a-secret")
    sink = OtelSink(python=PYTHON, endpoint=receiver.endpoint)
    check_sinks([sink])
    fed = SinkProcess(sink, RunWords("toy", tmp_path, {}, resumed=False))
    fed.event(LOST, 101.0)
    for step in (1, 2):
        fed.phase("rollout", step, 100.0 * step, 2.0)
        fed.phase("train", step, 100.0 * step + 3.0, 1.5)
    fed.event(RAISED, 300.0)
    fed.close()
    assert fed.lost() == (0, ""), (tmp_path / "logs" / "sink_otel.log").read_text()
    steps = {span.name: span for span in receiver.spans if not span.parent_span_id}
    assert steps.keys() == {"step 1", "step 2", "outside the steps"}
    assert (steps["step 1"].start_time_unix_nano, steps["step 1"].end_time_unix_nano) == (100 * 10**9, 104_500_000_000)
    below = [span for span in receiver.spans if span.parent_span_id == steps["step 2"].span_id]
    assert [span.name for span in below] == ["rollout", "train"]
    assert {span.trace_id for span in below} == {steps["step 2"].trace_id}
    (event,) = steps["step 1"].events
    assert (event.name, event.time_unix_nano) == ("server lost", 101 * 10**9)
    attributes = {each.key: each.value for each in event.attributes}
    assert attributes["sentence"].string_value == LOST.sentence
    assert attributes["again"].bool_value is True
    assert [each.name for each in steps["outside the steps"].events] == ["alarm raised"]
    assert {each["ctpo.run"] for each in receiver.resources} == {"toy"}
    assert {each["service.name"] for each in receiver.resources} == {"ctpo"}
    assert all(each["api-key"] == "not-a-secret" for each in receiver.headers), receiver.headers
    assert not (tmp_path / "spans.jsonl").exists()


def test_a_receiver_that_is_away_holds_up_nobody(tmp_path: Path) -> None:
    sink = OtelSink(python=PYTHON, endpoint="http://127.0.0.1:9/v1/traces")
    fed = SinkProcess(sink, RunWords("toy", tmp_path, {}, resumed=False))
    fed.phase("rollout", 1, 100.0, 2.0)
    begun = time.monotonic()
    fed.phase("rollout", 2, 200.0, 2.0)
    assert time.monotonic() - begun < 1.0
    fed.close()
    assert "127.0.0.1" in (tmp_path / "logs" / "sink_otel.log").read_text()
