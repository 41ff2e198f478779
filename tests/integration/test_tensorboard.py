"""What TensorBoard shows of a run of several incarnations, asked through its own endpoints, with each of its two loaders."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.recorder import SAMPLES
from tests.support.tensorboard import data_server, tensorboard

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

# (incarnation, the step of its checkpoint, the last step that it wrote): each of the first three lost what it wrote behind the
# checkpoint that the next one went on from
PER_STEP = 8  # samples
INCARNATIONS = [(1, 0, 7), (2, 4, 9), (3, 7, 10), (4, 9, 12)]
KEPT = {1: range(5), 2: range(5, 8), 3: range(8, 10), 4: range(10, 13)}
EXPECTED = [(step, 1000.0 * number + step) for number, steps in KEPT.items() for step in steps]


def write(run_dir: Path, number: int, checkpoint: int, last: int) -> None:
    """What one incarnation writes until it is killed."""
    known = {"samples": PER_STEP * checkpoint, "settings": {"optimizer.lr": float(number), "algorithm.objective.type": "ctpo"}}
    console = Console(file=io.StringIO())
    with closing(Recorder(run_dir, LogConfig(), first_step=checkpoint, console=console, **known)) as recorder:
        for step in range(checkpoint + 1 if checkpoint else 0, last + 1):
            value = 1000.0 * number + step
            metrics = {"reward/mean": value, "train/loss": value, SAMPLES: float(PER_STEP * step)}
            if step % 3 == 0:
                metrics["eval/accuracy"] = value  # a tag whose next point comes late, or never
            if (number, step) == (1, 6):
                metrics["reward/std"] = value  # a tag that only a lost branch has
            recorder.step(step, metrics)
            recorder.histogram("response_tokens", [value, value + 1.0], step)
            recorder.text("rollout/0", f"text {number} {step}", step)
            recorder.loads("moe/load", np.ones((2, 4)), step)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    for number, checkpoint, last in INCARNATIONS:
        write(run_dir, number, checkpoint, last)
        newest = max((run_dir / "tb").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        with newest.open("ab") as file:  # killed in the middle of a record
            file.write(b"\x30\0\0\0\0\0\0\0half")
    return run_dir


@pytest.mark.parametrize("loader", ["data server", "python"])
def test_one_point_per_step_and_tag_of_the_last_branch(run_dir: Path, tmp_path: Path, loader: str) -> None:
    fast = data_server(tmp_path) if loader == "data server" else None
    with tensorboard(run_dir / "tb", tmp_path, fast) as board:
        assert board.tags("scalars") == ["eval/accuracy", SAMPLES, "reward/mean", "train/loss"]
        assert board.scalars("reward/mean") == EXPECTED
        assert board.scalars("train/loss") == EXPECTED
        assert board.scalars("eval/accuracy") == [(step, value) for step, value in EXPECTED if step % 3 == 0]
        assert board.histogram_steps("response_tokens") == [step for step, _ in EXPECTED]
        assert board.texts("rollout/0/text_summary") == [(step, f"text {int(value) // 1000} {step}") for step, value in EXPECTED]
        assert [each["title"] for each in board.get("plugin/custom_scalars/layout")["category"]].count("reward") == 1
        by_samples = [(PER_STEP * step, value) for step, value in EXPECTED]
        assert board.scalars("samples/reward/mean", "by_samples") == by_samples
        assert {each["step"] for each in board.get("plugin/images/images", run=".", tag="moe/load", sample="0")} <= {*range(13)}
        (session,) = board.sessions("optimizer.lr", "reward/mean")
        assert session["hparams"] == {"optimizer.lr": 4.0, "algorithm.objective.type": "ctpo"}
        values = {each["name"]["tag"]: each["value"] for each in session["metricValues"]}
        assert values == {"reward/mean": EXPECTED[-1][1], "eval/accuracy": EXPECTED[-1][1]}
