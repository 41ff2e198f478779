"""The bench of the record records what a run may."""

from __future__ import annotations

from bench_record import names

from ctpo_megatron.record.catalogue import CATALOGUE, find, require_known


def test_it_records_every_metric_of_a_training_step() -> None:
    require_known(names())
    left_out = {metric.group for metric in CATALOGUE} - {find(name).group for name in names()}
    assert left_out == {"eval", "sft"}
