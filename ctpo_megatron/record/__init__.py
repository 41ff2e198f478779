"""What a run writes down: phase times, metrics.jsonl, TensorBoard, summary.json, progress on the console."""

from ctpo_megatron.record.files import write_summary
from ctpo_megatron.record.progress import progress
from ctpo_megatron.record.recorder import Recorder
from ctpo_megatron.record.timer import PhaseTimer, TailTimer

__all__ = ["PhaseTimer", "Recorder", "TailTimer", "progress", "write_summary"]
