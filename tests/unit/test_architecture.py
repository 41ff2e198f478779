"""The layers hold, and the checker that says so finds planted faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.layers import MAX_FILE_LINES, MAX_FUNCTION_LINES, ORDER, offences

PACKAGE = Path(__file__).resolve().parents[2] / "ctpo_megatron"


def test_the_package_keeps_its_layers() -> None:
    assert offences(PACKAGE) == []


def test_every_unit_in_the_order_exists() -> None:
    missing = [unit for unit in ORDER if not (PACKAGE / unit).is_dir() and not (PACKAGE / f"{unit}.py").is_file()]
    assert missing == []


@pytest.mark.parametrize(
    ("place", "source", "expected"),
    [
        ("algorithms/a.py", "from ctpo_megatron.batch import MicroBatch\n", "algorithms/a.py:1: algorithms imports batch, which"),
        ("algorithms/a.py", "import ctpo_megatron.mcore.step\n", "algorithms imports mcore, which is not below it"),
        ("algorithms/a.py", "from ..parallel import layout\n", "algorithms imports parallel, which is not below it"),
        ("errors.py", "from ctpo_megatron import config\n", "errors imports config, which is not below it"),
        ("rollout/a.py", "def f():\n    from ctpo_megatron.data.samples import x\n", "rollout/a.py:2: rollout imports data"),
        ("rollout/a.py", "import torch.nn\n", "rollout/a.py:1: imports torch; rollout does without"),
        ("config/a.py", "from torch import Tensor\n", "imports torch; config does without"),
        ("loop/a.py", "from ctpo_megatron.cluster import runtime\n", "loop imports cluster; it may know it by a Protocol only"),
        ("weights/a.py", "from ctpo_megatron.cluster import runtime\n", "weights imports cluster, which is not below it"),
        ("loop/a.py", "import ray\n", "imports ray, which belongs in cluster/"),
        ("data/a.py", "from megatron.core import parallel_state\n", "imports megatron, which belongs in mcore/"),
        ("engine/a.py", "import sglang\n", "imports sglang, which belongs in engine/sglang/"),
        ("weights/a.py", "import ray\n", "weights/a.py:1: imports ray, which belongs in cluster/"),
        ("loop/a.py", "from ctpo_megatron.mcore import step\n", "loop imports mcore; it may know it by a Protocol only"),
        ("models/a.py", "import torch\n", "imports torch; models does without"),
        ("planning/a.py", "from ctpo_megatron.config import RunConfig\n", "planning/a.py:1: planning uses RunConfig; give it"),
        ("models/a.py", "from ctpo_megatron.config.run import RunConfig as R\n", "models/a.py:1: models uses RunConfig; give it"),
        ("mcore/a.py", "from ..config.run import RunConfig\n", "mcore/a.py:1: mcore uses RunConfig; give it sections of it"),
        ("data/a.py", "import ctpo_megatron.config.load\n", "data/a.py:1: data uses RunConfig; give it sections of it"),
        ("weights/a.py", "from ctpo_megatron import config as c\nx = c.RunConfig\n", "weights/a.py:2: weights uses RunConfig"),
        ("helpers/a.py", "x = 1\n", "'helpers' has no place in the layers"),
        ("data/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), f"401 lines; at most {MAX_FILE_LINES}"),
        ("data/a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, f"f has 61 lines; at most {MAX_FUNCTION_LINES}"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, place: str, source: str, expected: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(source)
    found = offences(tmp_path)
    assert len(found) == 1, found
    assert expected in found[0]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    good = {
        "engine/sglang/platform.py": "import sglang, torch\nfrom ctpo_megatron.models import tensors\n",
        "mcore/a.py": "import megatron.core\nfrom ctpo_megatron.batch import MicroBatch\nfrom .b import x\n",
        "cluster/a.py": "from ctpo_megatron.config import RunConfig\n",
        "config/load.py": "from ctpo_megatron.config.run import RunConfig\n",
        "cli.py": "from ctpo_megatron.jobs.train import train_job\n",
    }
    for place, source in good.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(source)
    assert offences(tmp_path) == []
