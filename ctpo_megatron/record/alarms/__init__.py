"""Alarms: pure detectors over the rows of metrics, and what raises, keeps and clears them. See docs/alarms.md."""

from ctpo_megatron.record.alarms.watch import Alarms

__all__ = ["Alarms"]
