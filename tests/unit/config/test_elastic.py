"""Smaller layouts in the configuration: what they are made of, and what is refused by the name of its key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ctpo_megatron.config.elastic import as_written
from ctpo_megatron.config.load import dump_config, load_config
from ctpo_megatron.errors import ConfigError

RUN = {
    "name": "r",
    "run_dir": "r",
    "model": {"path": "m"},
    "data": {"train": "d", "max_prompt_tokens": 100},
    "train": {"prompts_per_step": 4, "optimizer_steps": 2, "max_tokens_per_micro_batch": 100},
    "rollout": {"group_size": 2, "max_response_tokens": 100},
    "parallel": {"cp": 2, "dp": 4, "tp": 2, "pp": 2, "first_stage_layers": 1},
}


def write(directory: Path, layouts: object, **changes: object) -> Path:
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "elastic": {"layouts": layouts}, **changes}))
    return file


def test_a_layout_is_parallel_with_changes(tmp_path: Path) -> None:
    run = load_config(write(tmp_path, [{"dp": 2}, {"dp": 1, "pp": 1, "first_stage_layers": None}]))
    assert [each.world_size for each in run.layouts] == [32, 16, 4]
    assert [(each.tp, each.cp) for each in run.layouts] == [(2, 2)] * 3
    assert [each.first_stage_layers for each in run.layouts] == [1, 1, None]
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(run))
    assert load_config(again) == run
    assert load_config(write(tmp_path, [])).layouts == [run.parallel]


def test_a_run_in_a_smaller_layout_can_be_written_and_read(tmp_path: Path) -> None:
    """As a dump has it: the smaller layouts would not be smaller ones of the one in use."""
    run = load_config(write(tmp_path, [{"dp": 1}]))
    smaller = run.in_layout(run.layouts[1])
    (tmp_path / "again.yaml").write_text(dump_config(smaller))
    assert load_config(tmp_path / "again.yaml") == smaller
    assert smaller.parallel.dp == 1


@pytest.mark.parametrize(
    ("layouts", "said"),
    [
        (
            [{"dp": 1}, {"first_stage_layer": 1}],
            "elastic.layouts[1]: unknown key 'first_stage_layer'. Did you mean 'first_stage_layers'? Allowed are the sizes of",
        ),
        ([{"dp": 0}], "elastic.layouts[0].dp: found 0; must be greater than 0"),
        ([{"dp": "two"}], "elastic.layouts[0].dp: found 'two'; must be a whole number"),
        ([{"dp": 4}], "elastic.layouts[0] has tp*pp*cp*dp=32 ranks, and parallel has 32; each layout must have fewer"),
        ([{"dp": 1}, {"dp": 2}], "elastic.layouts[1] has tp*pp*cp*dp=16 ranks, and elastic.layouts[0] has 8;"),
        ([{"dp": 5, "tp": 1}], "elastic.layouts[0].dp=5 needs at least that many samples per optimizer step;"),
        ([{"cp": 1}], "train.max_tokens_per_micro_batch * elastic.layouts[0].cp = 100"),
        ([{"dp": 1, "ep": 3}], "elastic.layouts[0]: ep*etp=3 does not divide tp*cp*dp=4; allowed: divisors of 4"),
        ([{"pp": 1}], "elastic.layouts[0]: first_stage_layers=1 splits a pipeline, but pp=1 has only one stage"),
        ([{"tp": None}], "elastic.layouts[0].tp: Input should be a valid integer"),
        ({"dp": 1}, "elastic.layouts: found a section with dp; must be a list"),
    ],
)
def test_what_cannot_work_is_named(layouts: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, layouts))
    assert said in str(refused.value)


def test_servers_on_the_trainers_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"elastic.layouts\[0\]: weights.type=colocated keeps .* one node"):
        load_config(write(tmp_path, [{"dp": 1}], weights={"type": "colocated"}))
    load_config(write(tmp_path, [], weights={"type": "colocated"}))


def test_messages_name_what_the_layout_changes() -> None:
    assert as_written("parallel.tp = 3 does not divide", 1, {"tp": 3}) == "elastic.layouts[1].tp = 3 does not divide"
    both = as_written("parallel.pp * parallel.vpp = 6 does not divide", 0, {"pp": 3})
    assert both == "elastic.layouts[0].pp * parallel.vpp = 6 does not divide"
    assert as_written("pipeline stage 0 has none", 2, {"pp": 3}) == "elastic.layouts[2]: pipeline stage 0 has none"
