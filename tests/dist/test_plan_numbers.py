"""What `ctpo plan` computes, held against the real thing: megatron's models, its distributed optimizer, its groups of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctpo_megatron.batch import Sequences
from ctpo_megatron.config.adapter import TARGETS, LoraConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.kernels.cpu.lanes import LANES
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import HeadAttention, ModelShape
from ctpo_megatron.planning import activations
from ctpo_megatron.planning.activations import layer_kept
from ctpo_megatron.planning.adapted import adapters_kept
from ctpo_megatron.planning.groups import rank_groups
from ctpo_megatron.planning.memory import state_bytes
from ctpo_megatron.planning.parameters import stage_parameters
from ctpo_megatron.planning.work import FLOAT, Work
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 299, "max_position_embeddings": 512}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, **MIXTURE},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        **MIXTURE,
    },
}
LAYOUTS: list[tuple[str, int, dict[str, int], str]] = [  # model, layers, layout of four ranks, number format
    ("qwen3", 2, {"tp": 2, "pp": 2}, "float32"),
    ("qwen3", 4, {"pp": 2, "vpp": 2, "cp": 2}, "float32"),
    ("qwen2", 2, {"tp": 2, "dp": 2}, "bfloat16"),
    ("qwen3_moe", 2, {"tp": 2, "dp": 2, "ep": 2, "etp": 2}, "float32"),
    ("qwen3_moe", 2, {"pp": 2, "cp": 2, "ep": 2}, "bfloat16"),
    ("qwen3_moe", 2, {"dp": 4, "ep": 2}, "float32"),
    ("deepseek_v3", 3, {"tp": 2, "pp": 2, "first_stage_layers": 2, "last_stage_layers": 1, "ep": 2}, "float32"),
]
KEPT: list[tuple[str, dict[str, int]]] = [
    ("qwen3", {"dp": 4}),
    ("qwen3", {"tp": 2, "dp": 2}),
    ("qwen3_moe", {"dp": 4}),
    ("deepseek_v3", {"dp": 4}),
]
ADAPTED: list[tuple[str, dict[str, int], tuple[str, ...], bool]] = [  # model, layout, targets, whether DoRA has them
    ("qwen3", {"dp": 4}, TARGETS, True),
    ("qwen3", {"tp": 2, "dp": 2}, TARGETS, True),
    ("qwen2", {"tp": 2, "dp": 2}, ("q_proj", "v_proj", "down_proj"), True),
    ("qwen3_moe", {"dp": 4}, ("q_proj", "k_proj", "v_proj", "o_proj"), True),
    ("qwen3_moe", {"dp": 4}, ("gate_proj", "up_proj", "down_proj"), False),
]
RANK = 8
GROUPS = [
    {"tp": 2, "cp": 2, "dp": 2, "pp": 2, "ep": 4, "etp": 2},
    {"tp": 4, "cp": 2, "dp": 2, "pp": 8, "ep": 8},
    {"cp": 3, "dp": 4, "ep": 2, "etp": 3},
]
SEQUENCES, LENGTH = 2, 64


def shape_of(model: str, layers: int) -> ModelShape:
    return parse_config({"model_type": model, "num_hidden_layers": layers, **COMMON, **MODELS[model]})


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(4, built)


def test_parameters_of_every_rank(ranks: list[dict[str, Any]]) -> None:
    for number, (model, layers, layout, _) in enumerate(LAYOUTS):
        planned = stage_parameters(shape_of(model, layers), ParallelConfig(**layout))
        for rank in ranks:
            found = rank["layouts"][number]
            assert (found["dense"], found["experts"]) == (
                planned[found["stage"]].dense,
                planned[found["stage"]].experts,
            ), f"{model} {layout}"


def test_optimizer_states_of_all_ranks_together(ranks: list[dict[str, Any]]) -> None:
    """To the byte: megatron cuts its buffers unevenly over ranks, but each number's state is held once."""
    for number, (model, layers, layout, dtype) in enumerate(LAYOUTS):
        parallel = ParallelConfig(**layout)
        planned = stage_parameters(shape_of(model, layers), parallel)
        held = sum(stage.dense * parallel.tp + stage.experts * parallel.ep * parallel.etp for stage in planned)
        each = state_bytes(OptimizerConfig(), 2 if dtype == "bfloat16" else 4)
        assert sum(rank["layouts"][number]["states"] for rank in ranks) == held * each, f"{model} {layout}"


def test_gradients_are_four_bytes_per_parameter_and_padding(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for found in rank["layouts"]:
            parameters = found["dense"] + found["experts"]
            padding = 64 * found["tensors"] + 8 * 512  # megatron starts tensors at multiples of 64, buckets at 128 * ranks
            assert 4 * parameters <= found["gradients"] <= 4 * (parameters + padding)


def test_groups_are_megatrons(ranks: list[dict[str, Any]]) -> None:
    for layout, theirs in zip(GROUPS, ranks[0]["groups"], strict=True):
        assert {group.name: group.ranks for group in rank_groups(ParallelConfig(**layout))} == theirs


def test_activations_that_a_layer_keeps(ranks: list[dict[str, Any]]) -> None:
    """To the byte: the plan's formula, which is for TransformerEngine, and what its kernels spare the portable layers."""
    for number, (model, layout) in enumerate(KEPT):
        shape, parallel = shape_of(model, 2), ParallelConfig(**layout)
        for layer, measured in enumerate(ranks[0]["kept"][number]):
            planned = layer_kept(shape, layer, parallel, Work(SEQUENCES * LENGTH, FLOAT)).total
            assert planned + spared(shape, layer, parallel) == measured, f"{model} {layout} layer {layer}"


def test_what_adapters_keep_besides(ranks: list[dict[str, Any]]) -> None:
    """To the byte, of the second layer, whose input has a gradient: what twice the rank adds to it, and what DoRA does."""
    for number, (model, layout, targets, has_dora) in enumerate(ADAPTED):
        shape, parallel, work = shape_of(model, 2), ParallelConfig(**layout), Work(SEQUENCES * LENGTH, FLOAT)
        planned = {
            name: adapters_kept(shape, 1, adapter, parallel, work) for name, adapter in adapters_of(targets, has_dora).items()
        }
        found = ranks[0]["adapted"][number]
        assert found.keys() == planned.keys()
        for name in found.keys() - {"lora"}:
            assert found[name] - found["lora"] == planned[name] - planned["lora"] > 0, f"{model} {layout} {name}"


def adapters_of(targets: tuple[str, ...], has_dora: bool) -> dict[str, LoraConfig]:
    found = {"lora": LoraConfig(rank=RANK, targets=targets), "twice": LoraConfig(rank=2 * RANK, targets=targets)}
    return found | ({"dora": LoraConfig(rank=RANK, targets=targets, use_dora=True)} if has_dora else {})


def spared(shape: ModelShape, layer: int, parallel: ParallelConfig) -> int:
    """Bytes in float32 that the portable layers keep more than the plan says."""
    tokens, tp, attention, experts = SEQUENCES * LENGTH, parallel.tp, shape.attention, shape.experts
    width = head_width(attention, shape.num_heads // tp, tp) if isinstance(attention, HeadAttention) else latent_width(shape)
    if experts is not None and experts.layers[layer]:
        # three more of each expert's width, gates before and after permutation; what sigmoid gates are divided by
        width += experts.top_k * (3 * experts.ffn_hidden_size + 2) + (experts.score == "sigmoid")
        width += 2 * experts.shared_ffn_hidden_size // tp
    elif experts is not None:
        width += 2 * shape.ffn_hidden_size // tp  # silu's output and a copy: models with experts have megatron's activation
    return width * tokens * FLOAT


def head_width(attention: HeadAttention, heads: int, tp: int) -> int:
    """Numbers per token: cosines and sines, which all layers have in common, and with several groups a copy of the queries."""
    groups, d = attention.num_kv_heads // tp, attention.head_dim
    return d * LENGTH // (SEQUENCES * LENGTH) + (heads * d if groups > 1 else 0)


def latent_width(shape: ModelShape) -> int:
    """Numbers per token at tp 1. Attention of queries wider than values keeps its probabilities, and its inputs in place of what
    they were made of.
    """
    a, heads = shape.attention, shape.num_heads
    query = a.nope_dim + a.rope_dim
    here = 2 * query + 2 * a.value_dim + LENGTH
    planned = 3 * query + a.nope_dim + 3 * a.value_dim + 1
    rotation = 4 * a.rope_dim  # cosines and sines, made anew for queries and keys
    norms = sum(rank + 1 for rank in (a.q_rank, a.kv_rank) if rank % LANES)  # those that are not compiled keep what they normed
    return rotation + norms + heads * (here - planned)


def test_blocks_of_the_head_are_those_of_the_plan() -> None:
    from ctpo_megatron.parallel import words

    assert (activations.BLOCK, activations.FEWEST_WORDS) == (words.BLOCK, words.FEWEST_WORDS)


# ---- in the ranks ----


def built(info: RankInfo) -> dict[str, Any]:
    import torch.distributed as dist

    from ctpo_megatron.mcore.host import megatron_region, prepare_host

    device = prepare_host("cpu")
    where = f"tcp://{info.master_addr}:{info.master_port}"
    dist.init_process_group("gloo", init_method=where, rank=info.rank, world_size=info.world_size)
    with megatron_region(device):
        answer = {
            "layouts": [
                numbers(shape_of(model, layers), ParallelConfig(**layout), dtype) for model, layers, layout, dtype in LAYOUTS
            ],
            "kept": [kept_by_layers(shape_of(model, 2), ParallelConfig(**layout)) for model, layout in KEPT],
            "adapted": [kept_with_adapters(*each) for each in ADAPTED],
            "groups": [megatron_groups(ParallelConfig(**layout)) for layout in GROUPS],
        }
    dist.destroy_process_group()
    return answer


def build(
    shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, adapter: LoraConfig | None = None
) -> list[torch.nn.Module]:
    from megatron.core import parallel_state

    from ctpo_megatron.mcore.groups import init_parallel_groups
    from ctpo_megatron.mcore.model.build import build_model

    parallel_state.destroy_model_parallel()
    init_parallel_groups(parallel, 1, 2)
    models = build_model(shape, parallel, dtype, torch.device("cpu"), adapter=adapter)
    for parameter in (p for model in models for p in model.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)  # whatever the memory held might not be finite
    return models


def numbers(shape: ModelShape, parallel: ParallelConfig, dtype: str) -> dict[str, int]:
    """Parameters, and bytes of gradients and optimizer states after a step with gradients of zero."""
    from megatron.core import parallel_state

    from ctpo_megatron.mcore.optimizer import build_optimizer

    models = build(shape, parallel, getattr(torch, dtype))
    optimizer = build_optimizer(models, OptimizerConfig(), getattr(torch, dtype))
    for model in models:
        model.zero_grad_buffer()
    optimizer.step()
    states = 0
    for part in optimizer.chained_optimizers:
        states += sum(
            t.nbytes for state in part.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()
        )
        copies = getattr(part, "shard_fp32_from_float16_groups", [])
        states += sum(t.nbytes for group in copies for t in group if t is not None)
    named = [item for model in models for item in model.named_parameters()]
    experts = sum(p.numel() for name, p in named if ".experts." in name)
    buffers = [b for model in models for b in (*model.buffers, *model.expert_parallel_buffers)]
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "dense": sum(p.numel() for _, p in named) - experts,
        "experts": experts,
        "tensors": len(named),
        "states": states,
        "gradients": sum(b.grad_data.nbytes for b in buffers),
    }


def kept_with_adapters(model: str, layout: dict[str, int], targets: tuple[str, ...], has_dora: bool) -> dict[str, int]:
    """Bytes that the second layer saves with each of the adapters."""
    shape, parallel = shape_of(model, 2), ParallelConfig(**layout)
    adapters = adapters_of(targets, has_dora)
    return {name: kept_by_layers(shape, parallel, adapter)[1] for name, adapter in adapters.items()}


def kept_by_layers(shape: ModelShape, parallel: ParallelConfig, adapter: LoraConfig | None = None) -> list[int]:
    """Bytes of floating-point tensors that each layer saves for its backward pass, weights apart, each storage once."""
    from ctpo_megatron.mcore.model.attention import compiled_layout, packed_layout
    from ctpo_megatron.mcore.model.routing import Routers

    models = build(shape, parallel, torch.float32, adapter)
    model = models[0].module
    nothing, lengths = torch.zeros(SEQUENCES), torch.full((SEQUENCES,), LENGTH)
    sequences = Sequences(torch.arange(SEQUENCES + 1, dtype=torch.int32) * LENGTH, lengths, nothing, nothing, nothing)
    way = compiled_layout if isinstance(shape.attention, HeadAttention) else packed_layout
    layout = way(sequences, torch.device("cpu"), 0, 1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    counts = [Saved(layer, weights) for layer in model.decoder.layers]
    ids = torch.arange(SEQUENCES * LENGTH) % 299
    all_count = torch.ones(len(ids) // parallel.tp, dtype=torch.bool)
    Routers(models, shape, torch.device("cpu")).set_micro_batch(models[0], all_count, len(ids), routed_experts=None)
    model(ids[None], (ids % LENGTH)[None], None, packed_seq_params=layout)
    return [count.bytes for count in counts]


class Saved:
    """Counts what autograd saves while `layer` runs forward."""

    def __init__(self, layer: torch.nn.Module, weights: set[int]) -> None:
        self.weights = weights
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.save, lambda tensor: tensor)
        layer.register_forward_pre_hook(lambda *_: self.hooks.__enter__())
        layer.register_forward_hook(lambda *_: self.hooks.__exit__(None, None, None))

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in self.weights and tensor.dim():
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def megatron_groups(parallel: ParallelConfig) -> dict[str, list[list[int]]]:
    """By megatron's own generators, called as parallel_state.initialize_model_parallel calls them."""
    from megatron.core.parallel_state import RankGenerator

    p = parallel
    dense = RankGenerator(tp=p.tp, ep=1, dp=p.dp, pp=p.pp, cp=p.cp, order="tp-cp-ep-dp-pp")
    edp = p.tp * p.cp * p.dp // (p.ep * p.etp)
    expert = RankGenerator(tp=p.etp, ep=p.ep, dp=edp, pp=p.pp, cp=1, order="tp-cp-ep-dp-pp")
    names = {"TP": "tp", "CP": "cp", "DP": "dp", "DP x CP": "dp-cp", "PP": "pp"}
    found = {name: dense.get_ranks(token) for name, token in names.items()}
    return found | {name: expert.get_ranks(token) for name, token in {"EP": "ep", "ETP": "tp", "EDP": "dp"}.items()}
