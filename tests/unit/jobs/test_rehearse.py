"""`ctpo plan --rehearse` around the step itself: what is rehearsed of a configuration, and what is printed of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.rehearse import left_out, rehearsal_of, report
from ctpo_megatron.mcore.rehearsal.ledger import Traffic
from ctpo_megatron.mcore.rehearsal.rank import Rehearsed
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.files import read_json
from ctpo_megatron.models.shape import ModelShape

CONFIGS = Path(__file__).parents[3] / "configs"
GIB = 2**30


def loaded(name: str, *overrides: str) -> tuple[RunConfig, ModelShape]:
    source = CONFIGS / "models" / name / "config.json"
    return load_config(CONFIGS / f"{name}.yaml", list(overrides)), parse_config(read_json(source), str(source))


@pytest.mark.parametrize(
    ("name", "micro_batches"), [("qwen3-4b", 2), ("qwen3-30b-a3b", 2), ("qwen3-235b-a22b", 8), ("deepseek-v3", 8)]
)
def test_the_fullest_stage_is_rehearsed(name: str, micro_batches: int) -> None:
    config, shape = loaded(name)
    what, planned = rehearsal_of(config, shape, None)
    assert (what.micro_batches, what.tokens) == (micro_batches, 12288)
    assert (what.dtype, what.recompute, what.fused) == ("bfloat16", "full", True)
    each = what.parallel.world_size // what.parallel.pp
    stages = [rehearsal_of(config, shape, each * stage)[1] for stage in range(what.parallel.pp)]
    assert what.rank % each == 0
    assert planned == stages[what.rank // each] == max(stages, key=lambda stage: stage.total)


def test_a_rank_that_is_not_there_is_refused() -> None:
    config, shape = loaded("qwen3-235b-a22b")
    assert rehearsal_of(config, shape, 127)[0].rank == 127
    with pytest.raises(ConfigError, match="--rank 128, but the trainer has ranks 0 to 127"):
        rehearsal_of(config, shape, 128)


def test_what_needs_a_gpu_is_named_and_left_out() -> None:
    fp8 = "train.fp8={recipe: blockwise}"
    config, shape = loaded("qwen3-4b", "optimizer.cpu_offload=1.0", "train.recompute=selective", fp8)
    what, _ = rehearsal_of(config, shape, None)
    assert (what.optimizer.precision_aware, what.optimizer.cpu_offload) == (False, 0.0)
    named = left_out(config).keys() - left_out(loaded("qwen3-4b")[0]).keys()
    assert named == {"optimizer.precision_aware, optimizer.cpu_offload", "train.recompute: selective", "train.fp8"}


def test_the_report_has_parts_traffic_and_what_was_not_rehearsed() -> None:
    config, shape = loaded("qwen3-4b")
    what, planned = rehearsal_of(config, shape, 1)
    found = Rehearsed(
        weights=planned.weights,
        gradients=planned.gradients,
        optimizer=planned.optimizer,
        batch=0,
        step=planned.activations + planned.working + planned.head + 2 * GIB,
        stage=0,
        seconds=61.0,
        traffic=(Traffic("all-to-all", "EP", 8, 1234, 5 * 2**20),),
        made_up=(("experts' choices", "are even"),),
    )
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115 - the process ends soon
    for part in report(what, planned, found, left_out(config)):
        console.print(part)
    text = console.export_text()
    lines = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words}
    assert "Rehearsal of rank 1 of 4, pipeline stage 0: 2 micro-batches of 12,288 tokens, in 61 s" in " ".join(text.split())
    assert lines["weights"] == [f"{planned.weights / GIB:.2f}"] * 2 + ["+0.00", "+0%"]
    assert lines["step"][2] == "+2.00"
    assert lines["together"][2] == "+2.00"
    assert lines["EP"] == ["8", "all-to-all", "1,234", "5.0"]
    assert lines["reserve"] == ["6.0", "GiB", "in", "the", "plan"]
    assert "experts' choices" in text
    assert "samples of several lengths" in text
