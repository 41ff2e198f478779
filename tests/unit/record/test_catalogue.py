"""Every metric of a run is listed once, and the page says what the list says."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.catalogue import CATALOGUE, Reduction, charts, find, require_known
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metrics_reference", ROOT / "tools" / "metrics_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(reference: ModuleType) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == reference.render(), "run: .venv/bin/python tools/metrics_reference.py"


def test_a_row_for_every_metric(reference: ModuleType) -> None:
    rows = [line for line in reference.render().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in CATALOGUE]


def test_names_are_unique_and_explained() -> None:
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert metric.unit, metric
        assert re.fullmatch(r".+[.]", metric.meaning), metric
        assert isinstance(metric.reduction, Reduction)
        example = re.sub(r"\{\w+\}", "12", metric.name)
        assert [other for other in CATALOGUE if re.fullmatch(other.pattern, example)] == [metric]


def test_placeholders_stand_for_whole_numbers() -> None:
    assert find("drift/from_token_64").name == "drift/from_token_{position}"
    assert find("moe/load_entropy/layer_3").unit == "share"
    for name in ("drift/from_token_", "drift/from_token_x", "drift/from_token_1/2", "reward/means", "Reward/mean", ""):
        assert find(name) is None, name
    with pytest.raises(ValueError, match=r"'reward/maen' is not a metric .* Did you mean 'reward/mean'\?"):
        require_known(["reward/std", "reward/maen"])


def test_a_metric_that_is_not_listed_is_not_recorded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, LogConfig(), console=Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="'train/new' is not a metric"):
        recorder.step(1, {"train/loss": 1.0, "train/new": 1.0})
    recorder.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_each_metric_is_in_one_chart() -> None:
    shown = [name for group in charts().values() for _, names in group.values() for name in names]
    assert sorted(shown) == sorted(f"^{metric.pattern}$" for metric in CATALOGUE)
    assert charts()["time"]["time: seconds"][0] == "Multiline"
