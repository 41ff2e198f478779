"""Where `ctpo serve-agents` listens when it is started again."""

from __future__ import annotations

import json
from pathlib import Path

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config.agents import ExternalAgent
from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.serve_agents import with_earlier_ports
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.ports import listen
from tests.support.qwen import QWEN3
from tests.support.runs import ROOT

HOST = "127.0.0.1"


def test_servers_without_a_trainer_read_the_models_files(tmp_path: Path) -> None:
    """Nothing is published to them, so their weights are not those that are quantised at a publication."""
    words = ["model.dtype=bfloat16", "weights.quantization=fp8", "drift.max=null", "algorithm.correction={type: truncate}"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", words)
    for trainer, quantised in ((False, None), (True, "fp8")):
        runtime = Runtime(config, parse_config(QWEN3), topology_of(config, trainer=trainer), tmp_path)
        assert runtime.config.weights.quantization == quantised


def test_it_listens_where_it_did_unless_somebody_else_does(tmp_path: Path) -> None:
    file = tmp_path / "agents.json"
    assert with_earlier_ports(ExternalAgent(), file) == ExternalAgent()
    with listen(HOST) as free, listen(HOST) as taken:
        ports = free.getsockname()[1], taken.getsockname()[1]
        free.close()
        file.write_text(json.dumps({"attempts": f"http://{HOST}:{ports[0]}/attempts", "agents": f"http://{HOST}:{ports[1]}"}))
        found = with_earlier_ports(ExternalAgent(), file)
        assert (found.admin_port, found.port) == (ports[0], 0)
        chosen = ExternalAgent(admin_port=4711, port=4712)
        assert with_earlier_ports(chosen, file) == chosen
