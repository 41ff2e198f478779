#!/bin/sh
# Megatron-Core 0.16.1 with torch 2.14.1: a mixture of experts with a stage of dense layers only cannot store its optimizer.
#
# Of a model of two layers, a dense one and one with experts (moe_layer_freq [0, 1]), in two pipeline stages, the first stage has
# no expert. get_megatron_optimizer aligns the parameter groups over all ranks of the job, so that stage too gets an optimizer for
# experts, with a group that is empty. Its Adam has no state, and DistributedOptimizer.state_dict takes `step` from that state and
# asserts that there is exactly one: sharded_state_dict raises AssertionError, without a message, on each rank of the dense stage.
# The stage with experts describes its part, and the optimizer's step before it works on both. This is the way of torch's Adam,
# taken where neither TransformerEngine nor Apex is there. With experts in both stages all ranks describe their parts.
#
# Here: 4 processes on a CPU over gloo, 2 stages of 2 ranks, the 2 experts of a layer spread over the ranks of its stage. Where
# Megatron-Core names CUDA, a torch function mode and a current device that is "cpu" answer with the CPU.
#
# Seen (Python 3.11), with how many parameters this rank's two optimizers have a share of, the other one and that of experts:
#   [0, 1] rank 0 stage 0: 2 + 0 parameters, AssertionError in distrib_optimizer.py, state_dict
#   [0, 1] rank 1 stage 0: 6 + 0 parameters, AssertionError in distrib_optimizer.py, state_dict
#   [0, 1] rank 2 stage 1: 5 + 2 parameters, described
#   [0, 1] rank 3 stage 1: 3 + 2 parameters, described
# and for [1, 1] `described` on all four.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 megatron-core==0.16.1 numpy==2.3.5 packaging==26.3
cat > "$work/save.py" <<'PROGRAM'
import datetime
import logging
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.overrides import TorchFunctionMode

STAGES, EXPERTS, WORLD = 2, 2, 4
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
RAISED, DESCRIBED = "AssertionError in distrib_optimizer.py, state_dict", "described"


class CpuForCuda(TorchFunctionMode):
    """Megatron-Core puts tensors on "cuda" and tells them apart by type names that begin with torch.cuda; there is none here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        named = function is torch.Tensor.type and isinstance(result, str)
        return result.replace("torch.", "torch.cuda.", 1) if named else result


def save(moe_layer_freq: list[int]) -> tuple[list[int], str]:
    """Build this rank's part of the model, take a step, and ask the optimizer what it would store.

    Returns how many parameters each of its optimizers has, and what came of it.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=len(moe_layer_freq),
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_layer_freq=moe_layer_freq,
        pipeline_model_parallel_size=STAGES,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=EXPERTS,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=32,
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, clip_grad=0.0)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    optimizer.step()  # with gradients of zero; Adam has its state from here on
    adams = [part.optimizer for part in optimizer.chained_optimizers]
    sizes = [sum(len(group["params"]) for group in adam.param_groups) if adam else 0 for adam in adams]
    try:
        optimizer.sharded_state_dict(model.module.sharded_state_dict(), is_loading=False, metadata=FORMAT)
    except AssertionError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return sizes, f"AssertionError in {Path(place.filename).name}, {place.name}"
    return sizes, DESCRIBED


def rank_main(rank: int, store: str, moe_layer_freq: list[int], results: dict) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # of GPU extensions that are absent
    torch.cuda.current_device = lambda: "cpu"
    from megatron.core import parallel_state

    timeout = datetime.timedelta(seconds=120)  # a rank that waits for one that raised would end with this
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timeout)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=STAGES, expert_model_parallel_size=EXPERTS, create_gloo_process_groups=False
    )
    with CpuForCuda():
        results[rank] = (parallel_state.get_pipeline_model_parallel_rank(), *save(moe_layer_freq))
    dist.barrier()
    dist.destroy_process_group()


def run(moe_layer_freq: list[int], store: Path) -> list[tuple[int, bool, str]]:
    """Returns each rank's stage, whether its optimizer of experts has parameters, and what came of saving."""
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(rank_main, (str(store), moe_layer_freq, shared), nprocs=WORLD)
        results = sorted(shared.items())
    for rank, (stage, sizes, outcome) in results:
        print(f"{moe_layer_freq} rank {rank} stage {stage}: {' + '.join(map(str, sizes))} parameters, {outcome}", flush=True)
    return [(stage, sizes[-1] > 0, outcome) for _, (stage, sizes, outcome) in results]


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    dense_first, experts_everywhere = run([0, 1], root / "store_dense"), run([1, 1], root / "store_experts")
    expected = [(0, False, RAISED)] * 2 + [(1, True, DESCRIBED)] * 2
    control = [(0, True, DESCRIBED)] * 2 + [(1, True, DESCRIBED)] * 2
    sys.exit(not (dense_first == expected and experts_everywhere == control))
PROGRAM
if PYTHONWARNINGS=ignore "$work/venv/bin/python" "$work/save.py" "$work"; then
    echo "as described: a stage without experts cannot store its optimizer"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
