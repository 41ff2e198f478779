"""How variables get to the processes of a run, what a node adds to them, and the run's record of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctpo_megatron.cluster import environment
from ctpo_megatron.cluster.environment import (
    decide,
    interface_of,
    make_private,
    node_environment,
    ray_environment,
    set_own,
    write_record,
)
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import InputError


def config(device: str, weights: str = "broadcast") -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "r",
            "run_dir": "r",
            "model": {"path": "m"},
            "data": {"train": "d"},
            "weights": {"type": weights},
            "cluster": {"device": device},
        }
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_rank_sets_its_variables_where_ray_does_not(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On CPUs Ray hands on none: it would start the process twice."""
    given = decide(config(device), {})["trainer"]
    own = dict[str, str]()
    monkeypatch.setattr(environment.os, "environ", own)
    set_own(device, given)
    assert ray_environment(device, given) == ({} if own else {"env_vars": given})
    assert own == (given if device == "cpu" else {})
    assert given["TORCH_FR_BUFFER_SIZE"]


def test_on_gpus_both_ends_get_theirs_from_the_driver() -> None:
    given = decide(config("cuda"), {"NCCL_IB_HCA": "mlx5"})
    for reader in ("trainer", "server"):
        handed = ray_environment("cuda", given[reader])["env_vars"]  # type: ignore[index]
        assert (handed["NCCL_CUMEM_ENABLE"], handed["NCCL_IB_HCA"]) == ("0", "mlx5")
        assert handed["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "0"


def test_memory_that_servers_open_does_not_expand() -> None:
    assert "PYTORCH_CUDA_ALLOC_CONF" in decide(config("cuda"), {})["trainer"]
    assert "PYTORCH_CUDA_ALLOC_CONF" not in decide(config("cuda", "colocated"), {})["trainer"]


def test_a_refusal_comes_before_anything_is_started() -> None:
    with pytest.raises(InputError, match="SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"):
        decide(config("cuda"), {"SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "1"})


def test_the_record_says_what_and_why(tmp_path: Path) -> None:
    run = config("cuda")
    write_record(run, decide(run, {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}), tmp_path / "environment.json")
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["device"] == "cuda"
    assert record["trainer"]["NCCL_DEBUG"] == {"value": "INFO", "why": "set by the user"}
    assert record["server"]["NCCL_IB_HCA"] == {"value": "mlx5", "why": "set by the user"}
    assert "two ends differ" in record["server"]["NCCL_CUMEM_ENABLE"]["why"]


def test_gloo_and_nccl_are_told_the_interface_of_the_nodes_address() -> None:
    """The host name may resolve to the loopback, or to another network; NCCL takes the first one."""
    (loopback,) = {interface_of("127.0.0.1")}
    assert loopback is not None
    both = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}
    assert node_environment("cuda", "127.0.0.1", {}) == both
    assert node_environment("cuda", "127.0.0.1", {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"}) == {}
    assert node_environment("cuda", "203.0.113.9", {}) == {}, "no interface has that address"
    assert node_environment("cpu", "127.0.0.1", {}) == {"GLOO_SOCKET_IFNAME": loopback}


def test_kernels_are_kept_where_only_the_user_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "kernels"
    monkeypatch.setattr(environment, "KERNELS", str(own))
    node_environment("cuda", "203.0.113.9", {"TRITON_CACHE_DIR": "/scratch/mine"})
    assert not own.exists(), "the user keeps them elsewhere"
    node_environment("cuda", "203.0.113.9", {"TRITON_CACHE_DIR": f"{own}/triton"})
    assert own.stat().st_mode & 0o777 == 0o700
    make_private(own)


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "kernels"
    foreign.mkdir()
    foreign.chmod(0o777)
    with pytest.raises(InputError, match="not a directory that only you may write"):
        make_private(foreign)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="not a directory that only you may write"):
        make_private(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a directory that only you may write"):
        make_private(tmp_path / "file")
    foreign.chmod(0o700)
    monkeypatch.setattr(environment, "os", SimpleNamespace(getuid=lambda: os.getuid() + 1))
    with pytest.raises(InputError, match="remove it"):
        make_private(foreign)
