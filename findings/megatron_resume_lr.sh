#!/bin/sh
# Megatron-Core 0.16.1: a resumed run keeps the learning rate of its checkpoint, also where the scheduler is told to override it.
#
# get_megatron_optimizer writes the bounds max_lr and min_lr into each parameter group. The optimizer's load_state_dict puts the
# groups of the checkpoint over the present ones, bounds included, and OptimizerParamScheduler.get_lr prefers the bounds of a group
# to its own. override_opt_param_scheduler=True, documented as the way to put the values of the class over those of the checkpoint,
# works on the scheduler's own bounds only: scheduler.max_lr is the new rate, its log says that the value is overridden, and the
# steps are taken with the old one. Whoever lowers the rate of a run that has become unstable goes on as before. It is the same for
# the distributed optimizer and for the plain one, and was reported as NVIDIA/Megatron-LM#1138. Setting the bounds of each group
# after load_state_dict, before the scheduler's next step, helps.
#
# Here: one process on a CPU over gloo, with torch 2.13.0. Where Megatron-Core names CUDA, a torch function mode and a current device
# that is "cpu" answer with the CPU.
#
# Seen (Python 3.11), for FP32Optimizer and DistributedOptimizer alike: a checkpoint with 1e-04 resumed with 1e-05; scheduler.max_lr
# is 1e-05, the groups take their steps with 1e-04; with the bounds set again 1e-05.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 megatron-core==0.16.1 numpy==2.3.5 packaging==26.3
cat > "$work/resume.py" <<'PROGRAM'
import copy
import logging
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from torch.overrides import TorchFunctionMode

OLD, NEW = 1e-4, 1e-5


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


def start(lr: float, distributed: bool) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Returns an optimizer of a linear layer and a scheduler of the constant rate `lr`, told to override a checkpoint."""
    model = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=distributed),
        torch.nn.Linear(4, 4),
    )
    bounds = {"lr": lr, "min_lr": lr / 10}
    settings = OptimizerConfig(optimizer="adam", use_distributed_optimizer=distributed, clip_grad=0.0, **bounds)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=lr / 10,
        lr_warmup_steps=0,
        lr_decay_steps=100,
        lr_decay_style="constant",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def rates(optimizer: MegatronOptimizer) -> set[float]:
    return {group["lr"] for group in optimizer.param_groups}


def resume(distributed: bool) -> bool:
    """Whether a run that was stored at the rate OLD goes on with it though it is resumed with NEW."""
    optimizer, scheduler = start(OLD, distributed)
    optimizer.step()
    scheduler.step(1)
    stored_optimizer, stored_scheduler = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))

    optimizer, scheduler = start(NEW, distributed)
    before = rates(optimizer)
    optimizer.load_state_dict(stored_optimizer)
    scheduler.load_state_dict(stored_scheduler)
    scheduler.step(1)
    resumed = rates(optimizer)
    for group in optimizer.param_groups:
        group.update(max_lr=NEW, min_lr=NEW / 10)
    scheduler.step(1)
    name = type(optimizer.chained_optimizers[0]).__name__
    for rate in sorted(resumed):
        print(f"{name:20} scheduler.max_lr {scheduler.max_lr:.0e}, steps are taken with {rate:.0e}")
    return before == {NEW} and scheduler.max_lr == NEW and resumed == {OLD} and rates(optimizer) == {NEW}


logging.disable(logging.CRITICAL)  # of GPU extensions that are absent
torch.cuda.current_device = lambda: "cpu"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
with CpuForCuda():
    kept = [resume(distributed) for distributed in (False, True)]
dist.destroy_process_group()
sys.exit(not all(kept))
PROGRAM
if PYTHONWARNINGS=ignore "$work/venv/bin/python" "$work/resume.py" "$work/store"; then
    echo "as described: the learning rate of the checkpoint wins"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
