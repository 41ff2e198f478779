"""What is written down of a step: scalars, histograms, some trajectories as text, and all of them as files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.loop.alarms import RunAlarms, numbers
from ctpo_megatron.loop.alarms import as_markdown as alarm_text
from ctpo_megatron.loop.evaluation.files import ResultFiles
from ctpo_megatron.loop.evaluation.results import Evaluation
from ctpo_megatron.loop.evaluation.table import as_table
from ctpo_megatron.loop.health import health_histograms
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.loop.ratios import RatioFile
from ctpo_megatron.loop.statistics import load_histograms
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.alarms.replay import Memory
from ctpo_megatron.record.files import Through, at_once
from ctpo_megatron.record.token_files import TokenFiles, TokenRecord
from ctpo_megatron.record.trajectories import TrajectoryFiles, as_markdown
from ctpo_megatron.record.values import Value
from ctpo_megatron.types import TrajectoryGroup


class RunRecord:
    """Passes a run's steps and evaluations on to the recorder and to the files of trajectories, as `config` asks for it.

    `through`: how these files are written. `alarms`: what judges the rows; None: nothing does.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        recorder: Recorder,
        through: Through = at_once,
        alarms: RunAlarms | None = None,
    ) -> None:
        self._recorder, self._alarms = recorder, alarms
        self._texts = config.rollouts_per_step
        self._files = TrajectoryFiles(run_dir, recorder.stale, through) if config.save_rollouts else None
        self._tokens = TokenFiles(run_dir, recorder.stale, through)
        self._results = ResultFiles(run_dir, recorder.stale, through)
        self._counts_ratios = config.counts_ratios
        self._ratios = RatioFile(run_dir, recorder.stale, through)

    def tokens(self, step: int, made: TokenRecord) -> None:
        """Write down what training step `step` made of each token that the policy wrote."""
        self._tokens.write(step, made)

    def step(
        self,
        step: int,
        groups: list[TrajectoryGroup],
        metrics: dict[str, float],
        expert_load: NDArray[np.float64] | None = None,
    ) -> None:
        """Write down training step `step`, counted from 1. `expert_load` [layers, experts]: None where there are no experts."""
        self._numbers(step, metrics)
        if expert_load is not None:
            self._recorder.loads("moe/load", expert_load, step)
        attempts = [(group.prompt, trajectory) for group in groups for trajectory in group.trajectories]
        self._recorder.histogram("reward", [t.reward for _, t in attempts], step)
        self._recorder.histogram("response_tokens", [t.response_length for _, t in attempts], step)
        for name, (edges, heights) in (health_histograms(metrics) | load_histograms(metrics)).items():
            self._recorder.buckets(name, edges, heights, step)
        for index, (prompt, trajectory) in enumerate(attempts[: self._texts]):
            self._recorder.text(f"rollout/{index}", as_markdown(prompt, trajectory), step)
        if self._files is not None:
            self._files.write("step", step, groups)

    def ratios(self, step: int, stats: Mapping[str, Value]) -> None:
        """Write down how log-ratios were distributed in training step `step`, where that is due."""
        if self._counts_ratios(step):
            self._ratios.write(step, stats)

    def evaluation(self, step: int, made: Evaluation, *, late: bool = False) -> None:
        """Write down an evaluation of the policy after `step` training steps; `late`: behind one after more steps."""
        self._numbers(step, made.metrics(), board=not late)
        if made.has_more_to_tell:
            self._recorder.show(as_table(made))
        if self._files is not None:
            self._files.write("eval", step, made.groups)
        self._results.write(step, made.results)

    def phase(self, step: int, phase: str, seconds: float) -> None:
        """Write down that a phase of training step `step` is over, which took so many seconds."""
        self._recorder.phase(phase, step, time.time() - seconds, seconds)

    def checkpoint(self, step: int, seconds: float) -> None:
        """Write down how long training stood still for the checkpoint after `step` training steps."""
        self._numbers(step, {"time/checkpoint": seconds})

    def obey(self, orders: Orders) -> None:
        """Let the run save or stop where an alarm wants it."""
        if self._alarms is not None:
            self._alarms.obey(orders)

    def alarms_memory(self) -> Memory | None:
        """Returns what alarms remember, for the run's checkpoint."""
        return None if self._alarms is None else self._alarms.memory()

    def _numbers(self, step: int, metrics: dict[str, float], *, board: bool = True) -> None:
        written = self._recorder.step(step, metrics, board=board)
        for told in [] if self._alarms is None else self._alarms.row(numbers(written)):
            if board:
                self._recorder.text(f"alarms/{told.alarm}", alarm_text(told), step)

    def close(self) -> None:
        """Flush what is not yet on disk. Safe to call twice."""
        self._ratios.close()
        self._recorder.close()
