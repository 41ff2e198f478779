"""What a process that is killed has left in TensorBoard's files, and that the next one goes on from there."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.record import Recorder

SCRIPT = """
import os, signal, sys, threading
from pathlib import Path
from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.record import Recorder

written = threading.Semaphore(0)

def through(write):
    write()
    written.release()

recorder = Recorder(Path(sys.argv[1]), LogConfig(), aside=through)
for _ in range(10):
    written.acquire(timeout=0)  # what opened the files
for step in range(1, 21):
    recorder.step(step, {"reward/mean": float(step)})
    recorder.text("rollout/0", f"text {step}", step)
for _ in range(40):
    assert written.acquire(timeout=60)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    read = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [event.step for event in read.Scalars("reward/mean")] == list(range(1, 21))
    assert len(read.Tensors("rollout/0/text_summary")) == 20
    with closing(Recorder(tmp_path, LogConfig(), first_step=10, console=Console(file=io.StringIO()))) as again:
        again.step(11, {"reward/mean": 11.5})
    read = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0}).Reload()
    assert [event.value for event in read.Scalars("reward/mean")] == [*map(float, range(1, 11)), 11.5]
