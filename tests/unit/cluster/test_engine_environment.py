"""What an actor starts its server with on GPUs; the server itself is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.cluster.engines import actor
from ctpo_megatron.cluster.teachers import _as_sampled
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.distillation import StartedTeacher
from ctpo_megatron.engine.capability import Gpu
from ctpo_megatron.errors import InputError

CONFIG = RunConfig.model_validate(
    {
        "name": "r",
        "run_dir": "r",
        "model": {"path": "m"},
        "data": {"train": "d"},
        "weights": {"type": "colocated"},
        "cluster": {"device": "cuda"},
    }
)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What SGLangServer was asked to start with; empty where it was not asked."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(actor, "redirect_output", lambda _path: None)
    monkeypatch.setattr(actor, "SGLangServer", lambda arguments, **options: found.update(options, arguments=arguments))
    monkeypatch.setattr(actor, "node_environment", lambda _device, address, _environment: {"GLOO_SOCKET_IFNAME": f"of {address}"})
    return found


def test_a_server_gets_its_variables_and_says_so(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(actor, "sees_gpu", lambda: False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    actor.EngineActor(CONFIG, 1, str(tmp_path / "log"), "key", gpus=("2", "0")).launch()
    given = started["env"]
    assert (given["CUDA_VISIBLE_DEVICES"], given["NCCL_CUMEM_ENABLE"], given["GLOO_SOCKET_IFNAME"]) == (
        "2,0",
        "0",
        "of 127.0.0.1",
    )
    assert given["SGLANG_HOST_IP"] == "127.0.0.1", "a server on several nodes would listen at another interface"
    assert given["PYTORCH_CUDA_ALLOC_CONF"] == "", "torch-memory-saver would end the server"
    assert "--enable-memory-saver" in started["arguments"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("environment: ")]
    assert "NCCL_CUMEM_ENABLE=0" in line
    assert "CUDA_VISIBLE_DEVICES=2,0" in line


def test_a_node_without_a_toolkit_starts_no_server(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the server would end minutes later, with an error of nvcc in its log."""
    monkeypatch.setattr(actor, "sees_gpu", lambda: True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"SGLang compiles kernels when it starts .* nvcc: .*nothing/bin/nvcc does not run"):
        actor.EngineActor(CONFIG, 1, str(tmp_path / "log"), "key").launch()
    assert started == {}


def test_servers_with_weights_in_fp8(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They start with random ones; those of teachers, to which nothing is published, read their files. GPUs are looked at."""
    monkeypatch.setattr(actor, "sees_gpu", lambda: False)
    quantised = {"type": "broadcast", "quantization": "fp8"}
    config = RunConfig.model_validate(CONFIG.model_dump() | {"weights": quantised, "drift": {"mean": 0.2}})
    teacher = StartedTeacher(name="t", path="m")
    gpus = [Gpu("H-what", (9, 0))]
    monkeypatch.setattr(actor, "visible_gpus", lambda _environment: gpus)
    for each, format_ in ((config, "dummy"), (_as_sampled(config, teacher), None), (config.without_trainer, None)):
        actor.EngineActor(each, 1, str(tmp_path / "log"), "key").launch()
        arguments = started.pop("arguments")
        assert (arguments[arguments.index("--load-format") + 1] if "--load-format" in arguments else None) == format_
    gpus[0] = Gpu("B-what", (10, 0))
    with pytest.raises(InputError, match="B-what"):
        actor.EngineActor(config, 1, str(tmp_path / "log"), "key").launch()
    assert "arguments" not in started
