"""What may be said about sinks, and what is refused."""

from __future__ import annotations

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.sinks import MlflowSink, OtelSink, PrometheusSink, WandbSink
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.sinks.worker import TYPES
from tests.support.runs import ROOT


def config(sinks: str) -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml", [f"log.sinks={sinks}"])


def test_sinks_are_a_list_of_types() -> None:
    found = config("[{type: wandb, mode: offline}, {type: mlflow}, {type: prometheus}, {type: otel}]").log.sinks
    assert [type(each) for each in found] == [WandbSink, MlflowSink, PrometheusSink, OtelSink]
    assert [each.type for each in found] == list(TYPES)
    assert found[2].host == "127.0.0.1"
    assert config("[]").log.sinks == ()


@pytest.mark.parametrize(
    ("sinks", "words"),
    [
        ("[{type: wandb}, {type: wandb}]", r"one of each type at most; found: wandb, wandb"),
        ("[{type: wanbd}]", r"log\.sinks\[0\]: type: found 'wanbd'; allowed: .*Did you mean 'wandb'"),
        ("[{type: wandb, projct: x}]", r"log\.sinks.*projct.*project"),
        ("[{type: mlflow, uri: 'http://me:secret@host:5000'}]", r"log\.sinks.*a name, a password or a query"),
        ("[{type: otel, endpoint: 'http://host/v1?token=secret'}]", r"log\.sinks.*a name, a password or a query"),
        ("[{type: prometheus, port: 0}]", r"log\.sinks.*port.*at least 1"),
    ],
)
def test_mistakes_are_explained(sinks: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        config(sinks)
    assert "secret" not in str(caught.value)
