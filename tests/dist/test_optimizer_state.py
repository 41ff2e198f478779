"""What of the optimizer only GPUs would show otherwise: when its state is made, how it is gathered, what is stored of it.

Real megatron-core on gloo. Its offloaded optimizer runs here too: on a CPU it finds everything where it would move it, unless it
is told otherwise (`SomeGpu`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import CheckpointError, ConfigError
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.planning.parameters import stage_parameters
from ctpo_megatron.planning.saving import plan_saving
from tests.support.checkpoints import begin_together
from tests.support.families import MODELS
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

LAYOUT = {"dp": 2, "ep": 2}  # two optimizers: of experts, and of all else
PLAIN, OFFLOADED = OptimizerConfig(lr=1e-2), OptimizerConfig(lr=1e-2, cpu_offload=1.0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("optimizer")
    model = write_model(root / "model", "qwen3_moe", 2, MODELS["qwen3_moe"])
    return run_ranks(2, observed, model, root, [free_port() for _ in range(5)])


def test_state_is_there_when_the_trainer_is_built(ranks: list[dict[str, Any]]) -> None:
    """Servers on the same GPU size their cache by the memory that is left then."""
    for rank in ranks:
        assert rank["moments after build"] == rank["moments after a step"] > 0


def test_the_state_is_gathered_in_pieces_and_is_megatrons(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["megatron gathers"] > rank["piece"] >= rank["we gather"] > 0
        assert rank["equal"] == [True] * rank["compared"]
        assert rank["compared"] == 6


def test_what_a_save_holds_is_what_is_planned(ranks: list[dict[str, Any]]) -> None:
    """Of all ranks together to the byte, as each tensor is written once; gathered, up to the padding of megatron's buffers."""
    (parameters,) = stage_parameters(read_hf_config(ranks[0]["model"]), ParallelConfig(**LAYOUT))
    saving = plan_saving(parameters, ParallelConfig(**LAYOUT), 2)
    assert sum(rank["written"] for rank in ranks) == 2 * saving.writing
    for rank in ranks:
        planned = saving.gathering - saving.writing
        assert planned <= rank["gathered"] <= planned + 12 * (64 * rank["tensors"] + 2 * 512)


def test_an_offloaded_optimizer_gives_the_numbers_of_the_plain_one(ranks: list[dict[str, Any]]) -> None:
    """After two steps, with all of the state on the host and with half of it. `SomeGpu` says what of it is the real thing."""
    for rank in ranks:
        for share, found in rank["offloaded"].items():
            assert found["apart"], "the host has copies of its own"
            assert found["moved"] == found["numbers"] if share == 1.0 else 0 < found["moved"] < found["numbers"]
            assert found["steps"] > 0.01, "both have gone somewhere"
            assert found["distance"] == 0.0, f"and to the same place, with {share} of the state on the host"
            assert found["weights"] == 1.0, "of both the weights are these numbers, rounded"


def test_an_offloaded_optimizer_is_saved_and_goes_on(ranks: list[dict[str, Any]]) -> None:
    """Its parameter groups hold classes, which are not unpickled: they are not stored."""
    for rank in ranks:
        assert rank["classes in groups"]
        assert rank["classes after loading"]
        assert rank["offloaded resumed"] == rank["offloaded held"] != rank["offloaded at first"]


def test_what_is_no_plain_value_is_refused_and_named(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "cannot be read into this model" in rank["foreign"]
        assert "weights_only" in rank["foreign"]


def test_weights_are_kept_whole_by_the_precision_aware_optimizer(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["remainders"] is False


def test_products_in_bfloat16_are_added_up_in_float32(ranks: list[dict[str, Any]]) -> None:
    """torch lets cuBLAS add the parts of a sum in bfloat16; the setting exists without a GPU."""
    assert ranks[0]["bfloat16 sums"] is False


# ---- in the ranks


def observed(rank: RankInfo, model: Path, root: Path, ports: list[int]) -> dict[str, Any]:
    from ctpo_megatron.mcore.host import megatron_region, prepare_host

    prepare_host("cpu")
    from ctpo_megatron.mcore import optimizer as builder
    from ctpo_megatron.mcore.checkpoint.snapshot import take_snapshot

    found: dict[str, Any] = {"remainders": builder.optimizer_settings(PLAIN, torch.bfloat16).store_param_remainders}
    trainer = start(replace(rank, master_port=ports[0]), model, PLAIN)
    found["bfloat16 sums"] = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    found["moments after build"] = moments(trainer)
    for part in trainer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["fused"] = True  # the offloaded one's kernel; another one rounds otherwise, and Adam makes that large
    first = [each.clone() for each in masters(trainer)]
    step(trainer)
    found["moments after a step"] = moments(trainer)
    step(trainer)
    plain = [each.clone() for each in masters(trainer)]
    found |= gathered(trainer) | {"model": str(model)}
    with megatron_region(trainer.device):
        snapshot = take_snapshot(trainer.models, trainer.optimizer)
    found["written"] = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    found["tensors"] = len(list(trainer.models[0].parameters()))
    trainer.close()

    from megatron.core.optimizer import optimizer_config

    with pytest.raises(ConfigError, match="needs the package transformer_engine"):
        builder.check_optimizer(OFFLOADED, torch.device("cuda"), torch.bfloat16)
    with (
        patch.object(builder.importlib.util, "find_spec"),
        pytest.raises(ConfigError, match=r"is for bfloat16 weights: .* float32"),
    ):
        builder.check_optimizer(OFFLOADED, torch.device("cuda"), torch.float32)

    builder.check_optimizer = lambda *_: None  # which refuses it where there is no GPU
    optimizer_config.is_te_min_version = lambda *_: True  # which fails where there is no TransformerEngine
    found["offloaded"] = {}
    for share, port in ((1.0, ports[3]), (0.5, ports[4])):
        with SomeGpu.of_hybrid_optimizers():
            trainer = start(replace(rank, master_port=port), model, OptimizerConfig(lr=1e-2, cpu_offload=share))
        step(trainer)
        step(trainer)
        found["offloaded"][share] = beside(trainer, first, plain)
        trainer.close()
    trainer = start(replace(rank, master_port=ports[1]), model, OFFLOADED)
    groups = [group for part in trainer.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    found["classes in groups"] = all(isinstance(group["cpu_optimizer_cls"], type) for group in groups)
    found["offloaded held"] = marked(trainer)
    save(trainer, root / "step_00000001")
    trainer.close()
    trainer = start(replace(rank, master_port=ports[2]), model, OFFLOADED)
    found["offloaded at first"] = held(trainer)
    trainer.load(root / "step_00000001")
    found["offloaded resumed"] = held(trainer)
    groups = [group for part in trainer.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    found["classes after loading"] = all(isinstance(group["cpu_optimizer_cls"], type) for group in groups)
    found["foreign"] = foreign(trainer, root / "step_00000002")
    trainer.close()
    return found


def start(rank: RankInfo, model: Path, optimizer: OptimizerConfig) -> TrainerRank:
    return TrainerRank(str(model), ParallelConfig(**LAYOUT), optimizer, rank, device="cpu", dtype="bfloat16", seed=1)


def step(trainer: TrainerRank) -> dict[str, Any]:
    from ctpo_megatron.algorithms import Stats

    mine = trainer.place(micro_batches()[2 * trainer.coords.dp_rank :][:2])

    def share(logp: Any, pack: Any, _scan: Any) -> Any:
        return -torch.where(pack.tokens.mask, logp, 0.0).sum() / 80, Stats()

    return trainer.train_step(mine, share, 1.0)


def moments(trainer: TrainerRank) -> int:
    """Numbers that the optimizers hold besides the parameters."""
    parts = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    return sum(state[name].numel() for part in parts for state in part.state.values() for name in ("exp_avg", "exp_avg_sq"))


class SomeGpu(TorchFunctionMode):
    """A CPU on which tensors are said to be on a GPU, but for those that `.cpu()` has copied and what is made of these.

    What an optimizer that is built inside it splits, copies, computes and copies back is as on a GPU. Streams and pinned memory
    are not: copies are done when the call returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host: dict[int, torch.Tensor] = {}  # held, so that no id comes twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = args and isinstance(args[0], torch.Tensor) and id(args[0]) in self.host
        if func == torch.Tensor.is_cuda.__get__:  # another object each time
            return not mine
        if func is torch.Tensor.pin_memory:
            return args[0]
        made = args[0].clone() if func is torch.Tensor.cpu else func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and (mine or func is torch.Tensor.cpu):
            self.host[id(made)] = made
        return made

    @staticmethod
    @contextlib.contextmanager
    def of_hybrid_optimizers() -> Iterator[None]:
        from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

        plain = HybridDeviceOptimizer.__init__

        def inside(self: Any, *args: Any, **options: Any) -> None:
            with SomeGpu():
                plain(self, *args, **options)

        HybridDeviceOptimizer.__init__ = inside
        try:
            yield
        finally:
            HybridDeviceOptimizer.__init__ = plain


def masters(trainer: TrainerRank) -> list[torch.Tensor]:
    """The float32 numbers that the optimizers move, in their order."""
    parts = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    whole = [(getattr(part, "param_to_fp32_param", {}), each) for part in parts for each in part.param_groups]
    return [copies.get(parameter, parameter).detach() for copies, group in whole for parameter in group["params"]]


def beside(trainer: TrainerRank, first: list[torch.Tensor], plain: list[torch.Tensor]) -> dict[str, Any]:
    """What an offloaded optimizer has done, beside the plain one's numbers, which began at `first`."""
    now, parts = masters(trainer), [part.optimizer for part in trainer.optimizer.chained_optimizers]
    moved = [(own, copy) for part in parts for own, copy in part.gpu_params_map_cpu_copy.items()]
    groups = [(part, group) for part in parts for group in part.param_groups]
    rounded = [(own, part.param_to_fp32_param.get(own, own)) for part, group in groups for own in group["params"]]
    return {
        "apart": all(own.data_ptr() != copy.data_ptr() for own, copy in moved),
        "moved": sum(copy.numel() for _, copy in moved),
        "numbers": sum(each.numel() for each in now),
        "distance": max((a - b).abs().max().item() for a, b in zip(now, plain, strict=True)),
        "steps": max((a - b).abs().max().item() for a, b in zip(now, first, strict=True)),
        "weights": sum(torch.equal(own, copy.to(own.dtype)) for own, copy in rounded) / len(rounded),
    }


def held(trainer: TrainerRank) -> list[float]:
    """A number for each tensor of the optimizers' state."""
    parts = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    names = ("master_param", "exp_avg", "exp_avg_sq")
    return [state[name].double().sum().item() for part in parts for state in part.state.values() for name in names]


def marked(trainer: TrainerRank) -> list[float]:
    """The same, after each moment was given numbers of its own: on a CPU this optimizer cannot step, as nothing is moved."""
    states = [state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    for number, state in enumerate(states):
        state["exp_avg"].fill_(number + 1)
        state["exp_avg_sq"].fill_(number + 1.5)
    return held(trainer)


def gathered(trainer: TrainerRank) -> dict[str, Any]:
    """The most numbers that one collective brings, and whether both ways bring the same."""
    from ctpo_megatron.mcore.checkpoint import gathering
    from ctpo_megatron.mcore.checkpoint.optimizer_state import padding_counted
    from ctpo_megatron.mcore.host import megatron_region

    gathering.GATHERED, sizes, ours = 1000, [0], [0]
    theirs, single = torch.distributed.all_gather, gathering.all_gather_single

    def counted(tensors: Any, *args: Any, **options: Any) -> Any:
        sizes.append(sum(tensor.numel() for tensor in tensors))
        return theirs(tensors, *args, **options)

    def single_counted(whole: Any, *args: Any) -> None:
        ours.append(whole.numel())
        single(whole, *args)

    equal, whole = [], 0
    with megatron_region(trainer.device), padding_counted(trainer.optimizer):
        for part in trainer.optimizer.chained_optimizers:
            torch.distributed.all_gather = counted
            megatrons = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
            torch.distributed.all_gather, gathering.all_gather_single = theirs, single_counted
            with gathering.gathered_in_pieces(trainer.optimizer):
                pieces = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
            gathering.all_gather_single = single
            assert pieces.keys() == megatrons.keys()
            for dtype, tensors in megatrons[0].items():
                equal += [bool(torch.equal(pieces[0][dtype][key], tensors[key])) for key in gathering.STATES]
                assert pieces[0][dtype]["numel_unpadded"] == tensors["numel_unpadded"]
                whole += sum(pieces[0][dtype][key].nbytes for key in gathering.STATES)
    gathering.GATHERED = 2**26
    most = {"megatron gathers": max(sizes), "we gather": max(ours), "piece": 1000}
    return most | {"equal": equal, "compared": len(equal), "gathered": whole}


def save(trainer: TrainerRank, directory: Path) -> None:
    begin_together(directory)
    trainer.save(directory)


def foreign(trainer: TrainerRank, directory: Path) -> str:
    """What is said of a checkpoint whose settings hold a class."""
    from ctpo_megatron.mcore.checkpoint import optimizer_state

    plain, optimizer_state._plain = optimizer_state._plain, lambda _value: True
    save(trainer, directory)
    try:
        with pytest.raises(CheckpointError) as caught:
            trainer.load(directory)
    finally:
        optimizer_state._plain = plain
    return str(caught.value)
