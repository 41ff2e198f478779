"""Weights & Biases and MLflow as published, fed by a run that is resumed: both go on in the same run, without a network.

Their packages lie in an environment of their own, which `make test-sinks` makes (tests/published/sinks.lock). Where there is none
these tests are skipped.
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from ctpo_megatron.config.sinks import AnySink, MlflowSink, WandbSink
from ctpo_megatron.record import sink_process
from ctpo_megatron.record.sink_process import RunWords, SinkProcess, check_sinks

VENV = Path(__file__).resolve().parents[2] / ".venv-sinks"
PYTHON = str(VENV / "bin" / "python")
LIMIT_S = 300.0

pytestmark = pytest.mark.skipif(not (VENV / ".installed").exists(), reason="no .venv-sinks; `make test-sinks` makes it")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer to import them than a run that ends would wait."""
    monkeypatch.setattr(sink_process, "DRAIN_S", LIMIT_S)
    monkeypatch.setattr(sink_process, "END_S", LIMIT_S)


def feed(sink: AnySink, run_dir: Path, *, resumed: bool, steps: range) -> str:
    """Feeds one incarnation, and returns the name of the run in the sink."""
    (run_dir / "logs").mkdir(exist_ok=True)
    check_sinks([sink])
    fed = SinkProcess(sink, RunWords("toy", run_dir, {"optimizer.lr": 1e-3, "seed": 1}, resumed))
    for step in steps:
        fed.step(step, {"train/loss": 1.0 / step, "train/ratio": math.nan}, 8.0 * step, 1000.0 + step)
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
"""


def test_wandb_keeps_one_run_offline(tmp_path: Path) -> None:
    sink = WandbSink(python=PYTHON, mode="offline")
    names = [feed(sink, tmp_path, resumed=resumed, steps=steps) for resumed, steps in ((False, range(1, 4)), (True, range(4, 6)))]
    assert names[0] == names[1]
    read = subprocess.run([PYTHON, "-c", READ_WANDB, str(tmp_path)], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    lines = [json.loads(line) for line in read.stdout.splitlines()]
    assert {line["id"] for line in lines if "id" in line} == {names[0]}
    assert {line["name"] for line in lines if "id" in line} == {"toy"}
    rows = [{key: json.loads(value) for key, value in line["row"].items()} for line in lines if "row" in line]
    assert [(row["step"], row["samples"], row["train/loss"]) for row in rows] == [
        (step, 8.0 * step, pytest.approx(1.0 / step)) for step in range(1, 6)
    ]
    counted = [row["_step"] for row in rows]
    assert counted == sorted(set(counted)), "rows that do not count on would be dropped"
