"""What every trainer rank imports, five seconds of it. `ranks.run_ranks` forks ranks from a process that has it already."""

from __future__ import annotations

import gc
import os

# Layouts are compared to the last places of float32. On an Intel Xeon, with torch's kernels for AVX-512, the gradient norm of one
# case (ctpo, packed) under tp=2 is 1.7e-5 from one rank's; with those for AVX2 it is within the bound of 1e-5.
KERNELS = "ATEN_CPU_CAPABILITY"
chosen_here = KERNELS not in os.environ
os.environ.setdefault(KERNELS, "avx2")

gc.disable()  # what is imported is no garbage; looking for some takes a fifth of the time

from ctpo_megatron.mcore.host import megatron_region, prepare_host  # noqa: E402

with megatron_region(prepare_host("cpu")):
    import torch._dynamo  # which torch imports at the first optimizer of a process

    import ctpo_megatron.mcore.checkpoint.background
    import ctpo_megatron.mcore.checkpoint.checkpoint
    import ctpo_megatron.mcore.hf.export
    import ctpo_megatron.mcore.hf.load
    import ctpo_megatron.mcore.model.build
    import ctpo_megatron.mcore.optimizer
    import ctpo_megatron.mcore.policy
    import ctpo_megatron.mcore.rank
    import ctpo_megatron.mcore.step  # noqa: F401 - to be there

if chosen_here:
    torch.backends.cpu.get_cpu_capability()  # torch chooses once
    del os.environ[KERNELS]  # else servers of the ranks could not be forked from a process without it (`engine.nursery`)

gc.enable()
gc.freeze()  # pages of what was imported stay shared with the ranks
