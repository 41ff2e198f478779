"""The variables of a run's processes: whose value wins, what is refused, and that both ends of a communicator agree."""

from __future__ import annotations

import pytest

from ctpo_megatron.environment import (
    BOTH,
    ON_CPUS,
    ON_GPUS,
    check_environment,
    environment_of,
    in_force,
    without_expandable_segments,
)
from ctpo_megatron.errors import InputError


@pytest.mark.parametrize("reader", BOTH)
def test_the_users_own_values_win_and_reach_every_process(reader: str) -> None:
    user = {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "TRITON_CACHE_DIR": "/scratch/t"}
    given = environment_of(reader, "cuda", user | {"HOME": "/root", "API_TOKEN": "x"})  # type: ignore[arg-type]
    assert user.items() <= given.items()
    assert not {"HOME", "API_TOKEN"} & given.keys()


def test_what_rays_workers_need_is_not_the_users_to_set() -> None:
    name = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    assert environment_of("trainer", "cuda", {name: "1"})[name] == "0"
    assert environment_of("server", "cuda", {name: "1"})[name] == "0"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_the_trainers_alone(name: str) -> None:
    """And not even there where servers open its memory."""
    user = {name: "max_split_size_mb:128,expandable_segments:True"}
    assert environment_of("trainer", "cuda", {})["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment_of("trainer", "cuda", {}, shares_gpus=True)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment_of("server", "cuda", {})
    own = environment_of("trainer", "cuda", user)
    assert {key: value for key, value in own.items() if "ALLOC_CONF" in key} == user, "torch reads the old name first"
    for given in (environment_of("server", "cuda", user), environment_of("trainer", "cuda", user, shares_gpus=True)):
        assert given[name] == "max_split_size_mb:128"


def test_other_allocator_options_stay_as_they_are() -> None:
    options = "roundup_power2_divisions:[256:1,512:2], expandable_segments:True,garbage_collection_threshold:0.8"
    assert without_expandable_segments(options) == "roundup_power2_divisions:[256:1,512:2],garbage_collection_threshold:0.8"
    assert without_expandable_segments("expandable_segments:True") == ""


@pytest.mark.parametrize(
    ("user", "arguments", "told"),
    [
        ({"SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "true"}, (), r"SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED=true .* unset it"),
        ({"NCCL_CUMEM_ENABLE": "0"}, ("--enable-symm-mem",), r"NCCL_CUMEM_ENABLE=0 .*extra_args make servers use 1"),
        ({"NCCL_NVLS_ENABLE": "0"}, ("--enable-nccl-nvls",), r"NCCL_NVLS_ENABLE=0 .* unset NCCL_NVLS_ENABLE"),
    ],
)
def test_values_that_a_run_cannot_work_with_are_refused_by_name(
    user: dict[str, str], arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        check_environment(user, "cuda", arguments)
    check_environment(user, "cpu", arguments)
    check_environment({name: "0" if value == "true" else "1" for name, value in user.items()}, "cuda", arguments)


def test_on_cpus_only_what_cpus_need() -> None:
    user = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "lo"}
    assert environment_of("trainer", "cpu", user) == {
        "GOMP_SPINCOUNT": "3000",
        "OMP_WAIT_POLICY": "passive",
        "THP_MEM_ALLOC_ENABLE": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    assert environment_of("server", "cpu", {}).keys() == {each.name for each in ON_CPUS} - {"TORCH_FR_BUFFER_SIZE"}
    own = environment_of("trainer", "cpu", {"OMP_WAIT_POLICY": "active"})
    assert own["OMP_WAIT_POLICY"] == "active"
    assert "GOMP_SPINCOUNT" not in own


def test_every_variable_says_why() -> None:
    names = [each.name for each in ON_GPUS]
    assert len(set(names)) == len(names)
    assert all(each.why and each.readers for each in (*ON_CPUS, *ON_GPUS))


def test_the_log_has_what_a_process_was_given_and_nothing_else() -> None:
    environment = {"NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5", "HOME": "/root", "SECRET": "x", "OMP_NUM_THREADS": "4"}
    shown = in_force("trainer", "cuda", environment)
    assert list(shown) == ["NCCL_DEBUG", "NCCL_IB_HCA", "OMP_NUM_THREADS"]
