"""What megatron-core and torch lack on a CPU, each seen failing without its bridge and working with it.

A test here that fails says that a release can do without the bridge: remove it from mcore/host.py (or mcore/model/).
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.mcore.host import DEPRECATED_COLLECTIVES, megatron_region, prepare_host, silence_deprecated_collectives
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = [pytest.mark.dist, pytest.mark.skipif(torch.cuda.is_available(), reason="the bridges are for hosts without CUDA")]


@pytest.fixture(scope="module")
def bare() -> dict[str, str]:
    return run_ranks(1, probe_bare, bare=True)[0]


@pytest.fixture(scope="module")
def bridged() -> dict[str, str]:
    return run_ranks(1, probe_bridged, bare=True)[0]


def test_a_package_for_gpus_fails_in_a_way_that_megatron_does_not_catch(bare: dict[str, str]) -> None:
    assert bare["flash_mla"] == "OSError"


def test_megatron_still_imports_what_is_slow_and_of_no_use(bare: dict[str, str], bridged: dict[str, str]) -> None:
    assert bare["loaded"] == "flashinfer torch._inductor"
    assert bridged["loaded"] == ""


def test_gloo_gathers_only_what_is_of_one_size() -> None:
    """With the bridge it does more: the layouts with etp in test_parity.py rest on that."""
    assert run_ranks(2, probe_uneven_gather, bare=True) == ["RuntimeError", "RuntimeError"]


@pytest.mark.parametrize(
    "call",
    [
        "current_device",
        "stream",
        "random state",
        "factory",
        "to cuda",
        "pinned memory",
        "type name",
        "expert routing",
        "split sizes",
    ],
)
def test_call_needs_its_bridge(bare: dict[str, str], bridged: dict[str, str], call: str) -> None:
    assert bare[call] != "fine"
    assert bridged[call] == "fine"


def test_megatron_norm_refuses_sequence_parallelism_and_its_attention_context_parallelism(bridged: dict[str, str]) -> None:
    assert bridged["norm"] == bridged["attention"] == "AssertionError"


def test_latent_attention_takes_a_mock_for_a_class(bridged: dict[str, str]) -> None:
    assert bridged["TransformerEngine's linear layer"] == "TypeError"


@pytest.mark.skipif(not hasattr(dist, "all_gather_single"), reason="this torch has the old names only")
def test_megatron_still_calls_collectives_by_names_that_torch_deprecates(tmp_path: Path) -> None:
    """Should it learn the new ones, `host.silence_deprecated_collectives` may go."""
    (found,) = run_ranks(1, deprecated_collectives, write_model(tmp_path / "model", "qwen3"))
    assert found == {"heard": sorted(DEPRECATED_COLLECTIVES), "silenced": []}


def test_groups_that_megatron_does_not_forget_keep_their_store(bridged: dict[str, str]) -> None:
    assert bridged["port after megatron's end"] == "DistNetworkError"
    assert bridged["port after groups' end"] == "fine"


def test_interleaved_stages_free_what_is_still_being_sent(tmp_path: Path) -> None:
    """Where CUDA's allocator does not watch over it, the next stage may read something else; more often on a busy host."""
    for freed in run_ranks(2, freed_before_sent, write_model(tmp_path, "qwen3", layers=4)):
        assert freed["as chosen"] == 0
        assert freed["as on GPUs"] > 0


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.device is cuda"):
        prepare_host("cuda")
    with pytest.raises(ConfigError, match="allowed are auto, cpu, cuda"):
        prepare_host("gpu")


# ---- what runs in the processes


def outcome(call: Callable[[], Any]) -> str:
    """`fine`, or the class of what it raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - its class is the result
        return type(error).__name__
    return "fine"


def probe_bare(rank: RankInfo) -> dict[str, str]:
    found = {"flash_mla": outcome(lambda: importlib.import_module("flash_mla"))}
    sys.modules["flash_mla"] = None  # without this one megatron cannot be imported at all
    return found | probe(rank)


def probe_bridged(rank: RankInfo) -> dict[str, str]:
    with megatron_region(prepare_host("cpu")):
        return probe(rank) | probe_megatron_modules() | probe_ends()


def probe(rank: RankInfo) -> dict[str, str]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{rank.master_port}", rank=0, world_size=1)
    pair, sizes = torch.ones(2), torch.tensor([2])
    tracker = random.CudaRNGStatesTracker()

    def draw() -> None:
        tracker.add("some", 5)
        with tracker.fork("some"):
            pass

    def name_type() -> None:
        if pair.type() != "torch.cuda.FloatTensor" or pair.bfloat16().type() != "torch.cuda.BFloat16Tensor":
            raise TypeError(pair.type())

    return {
        "loaded": " ".join(name for name in ("flashinfer", "torch._inductor") if sys.modules.get(name) is not None),
        "current_device": outcome(torch.cuda.current_device),
        "stream": outcome(lambda: torch.cuda.Stream().wait_stream(torch.cuda.current_stream())),
        "random state": outcome(draw),
        "factory": outcome(lambda: torch.zeros(1, device="cuda")),
        "to cuda": outcome(pair.cuda),
        "pinned memory": outcome(lambda: torch.tensor([1.0], pin_memory=True)),
        "type name": outcome(name_type),
        "expert routing": outcome(lambda: moe_utils.router_gating_linear(pair[None], pair[None], None, torch.float32)),
        "split sizes": outcome(lambda: dist.all_to_all_single(torch.empty(2), pair, sizes, sizes)),
    }


def probe_ends() -> dict[str, str]:
    """Whether the store of the process groups is gone after them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ctpo_megatron.mcore import groups

    dist.destroy_process_group()

    def store(port: int) -> dist.TCPStore:
        return dist.TCPStore("127.0.0.1", port, 1, is_master=True)

    def port_after(end: Callable[[], None]) -> str:
        port = free_port()
        dist.init_process_group("gloo", store=store(port), rank=0, world_size=1)
        groups.init_parallel_groups(ParallelConfig(), seed=0, timeout_minutes=1)
        end()
        dist.destroy_process_group()
        return outcome(lambda: store(port))

    return {
        "port after megatron's end": port_after(parallel_state.destroy_model_parallel),
        "port after groups' end": port_after(groups.destroy_parallel_groups),
    }


def probe_uneven_gather(rank: RankInfo) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{rank.master_port}", rank=rank.rank, world_size=2)
    return outcome(lambda: dist.all_gather([torch.empty(1), torch.empty(2)], torch.ones(1 + rank.rank)))


class Watched:
    """A send under way, which notes when it has gone whether its memory was given back meanwhile."""

    def __init__(self, work: Any, tensor: torch.Tensor, freed: list[bool]) -> None:
        self.work, self.tensor, self.freed = work, tensor, freed
        self.place = tensor.data_ptr()

    def wait(self) -> None:
        self.work.wait()
        self.freed.append(self.tensor.data_ptr() != self.place)


def freed_before_sent(rank: RankInfo, path: Path) -> dict[str, int]:
    """How many of an optimizer step's sends it happens to, as this package sets `deallocate_pipeline_outputs` and switched on."""
    engine = TrainerRank(str(path), ParallelConfig(pp=2, vpp=2), OptimizerConfig(), rank, device="cpu", seed=1)
    from megatron.core.pipeline_parallel import p2p_communication

    from ctpo_megatron.mcore.hf.load import unwrap

    original, freed = p2p_communication._p2p_ops, []

    def watched(**options: Any) -> dict[str, Any]:
        works = original(**options)
        sent = {name: Watched(work, options[f"tensor_{name}"], freed) for name, work in works.items() if name.startswith("send")}
        return works | sent

    config, found = unwrap(engine.models[0]).config, {}
    with patch.object(p2p_communication, "_p2p_ops", watched):
        for case in ("as chosen", "as on GPUs"):
            config.deallocate_pipeline_outputs |= case == "as on GPUs"
            engine.train_step(engine.place(micro_batches()), lambda logp, *_: (logp.sum(), Stats()), 1.0)
            assert freed, "nothing was sent"
            found[case] = sum(freed)
            freed.clear()
    engine.close()
    return found


def deprecated_collectives(rank: RankInfo, path: Path) -> dict[str, list[str]]:
    """The collectives that torch warns of in an optimizer step, with all warnings heard and with those of megatron silenced."""
    engine = TrainerRank(str(path), ParallelConfig(), OptimizerConfig(), rank, device="cpu", seed=1)
    found = {}
    for case in ("heard", "silenced"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if case == "silenced":
                silence_deprecated_collectives()
            engine.train_step(engine.place(micro_batches()), lambda logp, *_: (logp.sum(), Stats()), 1.0)
        said = [str(each.message) for each in caught if each.category is FutureWarning]
        found[case] = sorted({text.split("`")[1].rpartition(".")[2] for text in said})
    engine.close()
    return found


def probe_megatron_modules() -> dict[str, str]:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization="RMSNorm",
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        context_parallel_size=2,
    )
    local = LocalSpecProvider()
    return {
        "norm": outcome(lambda: local.layer_norm(rms_norm=True)(config, 8)),
        "attention": outcome(lambda: local.core_attention()(config, 1, AttnMaskType.causal, "self")),
        # mcore/model/latent.py
        "TransformerEngine's linear layer": outcome(lambda: isinstance(local, multi_latent_attention.TELinear)),
    }
