"""One SGLang server for all tests that only need one, and where others are forked: starting them is most of their time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ctpo_megatron.toy.model import make_toy_model
from tests.support.engines import RunningServer, endless, start_server
from tests.support.forked_servers import forking
from tests.support.whole_runs import make_toy

torch.set_num_threads(1)  # models that are judges are small, and threads that wait for more would take the servers' cores


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model whose logits are far from uniform, so that a wrong one is seen, and which recommends another way to sample."""
    model = endless(make_toy_model(tmp_path_factory.mktemp("qwen3"), "qwen3", seed=1, init_std=0.2))
    file = model / "generation_config.json"
    recommended = {"do_sample": True, "temperature": 0.6, "top_k": 1, "top_p": 0.5, "repetition_penalty": 1.5}
    file.write_text(json.dumps(json.loads(file.read_text()) | recommended))
    return model


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy task's files and a drawn model of each kind, for whole runs."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def forks() -> Iterator[Path]:
    """Where servers are forked that have imported SGLang already."""
    with forking() as place:
        yield place


@pytest.fixture(scope="session")
def server(qwen3: Path, forks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A healthy server of that model; its weights change from test to test."""
    running = start_server(qwen3, tmp_path_factory.mktemp("server") / "server.log", forks=forks)
    yield running
    running.server.stop()
