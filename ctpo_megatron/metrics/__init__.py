"""What a run writes down: phase times, metrics.jsonl, TensorBoard, summary.json, progress on the console."""

from ctpo_megatron.metrics.files import write_summary
from ctpo_megatron.metrics.progress import progress
from ctpo_megatron.metrics.recorder import Recorder
from ctpo_megatron.metrics.timer import PhaseTimer

__all__ = ["PhaseTimer", "Recorder", "progress", "write_summary"]
