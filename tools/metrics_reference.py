"""Writes docs/metrics.md: every metric of a run, from the catalogue in ctpo_megatron/record/catalogue.py.

.venv/bin/python tools/metrics_reference.py
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from ctpo_megatron.record.catalogue import CATALOGUE, Metric

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEAD = """# Metrics

Every metric of a run, written by `tools/metrics_reference.py` from `ctpo_megatron/record/catalogue.py`. `metrics.jsonl` has them
by these names, and TensorBoard shows them in groups by the first part; its tab `custom scalars` has a chart for each unit.
What is not listed here is not recorded.

- A `{placeholder}` stands for a whole number, `{benchmark}` for one of `eval.benchmarks` or for `held_out`, which is `data.eval`,
  and `{term}` for the name of a term of the reward.
  A metric is left out of a step for which there is nothing to say.
- Units: a `share` is of 1, a `ratio` has no unit, `nats` are of natural logarithms of probabilities.
- Of those with ↕ TensorBoard shows, besides their points, least, mean and most over windows of 100 steps (`windows/...`), and
  the points over the samples trained on (`samples/...`): see [tensorboard.md](tensorboard.md).
- The third column says how values become one, over micro-batches, ranks and the optimizer steps of a training step.
- Of `train/`, prompt and tool tokens count nowhere. [health.md](health.md) explains S_t and how to read the groups `health` and
  `drift`, [weights.md](weights.md) the steps of a publication, [routing_replay.md](routing_replay.md) the group `routing`.
"""


def render() -> str:
    """Returns the whole page."""
    parts = [HEAD]
    for name, metrics in groupby(CATALOGUE, key=lambda metric: metric.group):
        parts += [f"## {name}", "", "| name | unit | over steps | |", "|---|---|---|---|", *map(_row, metrics), ""]
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    return f"| `{metric.name}`{' ↕' if metric.watched else ''} | {metric.unit} | {metric.reduction} | {metric.meaning} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE.name}: {len(CATALOGUE)} metrics")
