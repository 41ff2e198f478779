"""What a configuration may say of advantages and shaped rewards, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.config.advantages import (
    GroupAdvantage,
    LengthShaping,
    OverlongShaping,
    ReinforceAdvantage,
    ShapingConfig,
)
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError

GOOD = "name: t\nrun_dir: r\nmodel: {path: m}\ndata: {train: d.parquet}\n"


def test_configuration_of_each_part(tmp_path: Path):
    path = tmp_path / "run.yaml"
    shaping = "{overlong: {max_tokens: '${rollout.max_response_tokens}', buffer: 64}}"
    path.write_text(GOOD + f"rollout: {{max_response_tokens: 512}}\nalgorithm: {{shaping: {shaping}}}\n")
    algorithm = load_config(path, ["algorithm.advantage.type=reinforce++", "algorithm.advantage.gamma=0.99"]).algorithm
    assert algorithm.advantage == ReinforceAdvantage(gamma=0.99)
    assert algorithm.shaping == ShapingConfig(overlong=OverlongShaping(max_tokens=512, buffer=64))
    plain = load_config(path, ["algorithm.shaping.overlong=null", "algorithm.shaping.length={}"]).algorithm
    assert (plain.advantage, plain.shaping) == (GroupAdvantage(), ShapingConfig(length=LengthShaping()))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "algorithm.advantage.type=rlo",
            "algorithm.advantage: type: found 'rlo'; allowed: 'group', 'rloo', 'reinforce++', 'tempo', 'gae'",
        ),
        ("algorithm.advantage={type: rloo, gamma: 1}", "unknown key. It is an option of another type than 'rloo'."),
        ("algorithm.advantage={type: reinforce++, gamma: 1.5}", "algorithm.advantage.gamma: found 1.5; must be at most 1."),
        ("algorithm.advantage={type: reinforce++, baseline: mean}", "found 'mean'; allowed: 'none' or 'group'."),
        ("algorithm.shaping.overlong.buffer=8", "algorithm.shaping.overlong.max_tokens: missing; it must be given."),
        (
            "algorithm.shaping.overlong={max_tokens: 4, buffer: 8}",
            "algorithm.shaping.overlong: buffer=8 is longer than max_tokens=4; allowed: 1 to max_tokens.",
        ),
        ("algorithm.shaping.length.alpha=1.5", "algorithm.shaping.length.alpha: found 1.5; must be at most 1."),
        ("algorithm.shaping.length.fraction=0", "algorithm.shaping.length.fraction: found 0; must be greater than 0."),
    ],
)
def test_wrong_configuration_is_refused(tmp_path: Path, override: str, expected: str):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert expected in str(caught.value)
