"""The environment variables of a run's processes: which are set, to what, for whom, and why.

What the user has set in the shell of the `ctpo` command wins, and reaches every process of a run on GPUs, so that both ends of a
communicator read the same. A value that a run cannot work with is refused by name (`check_environment`), and two are set aside:
Ray's NOSET variable, and expandable segments where another process opens a GPU's memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ctpo_megatron.errors import InputError

Reader = Literal["trainer", "server"]
TRAINER: tuple[Reader, ...] = ("trainer",)
SERVER: tuple[Reader, ...] = ("server",)
BOTH: tuple[Reader, ...] = ("trainer", "server")


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of the processes in `readers`. `fixed`: the user's own value is set aside, else it wins."""

    name: str
    value: str
    readers: tuple[Reader, ...]
    why: str
    fixed: bool = False


_RECORDER = Variable(
    "TORCH_FR_BUFFER_SIZE",
    "2000",
    TRAINER,
    "torch's flight recorder: which rank has come how far is told by its collective calls",
)
_LOGPROBS = Variable(
    "SGLANG_RETURN_ORIGINAL_LOGPROB",
    "0",
    SERVER,
    "with 1 servers report log-probs at temperature 1, whatever the temperature of sampling",
    fixed=True,
)
KERNELS = f"/tmp/ctpo-kernels-{os.getuid()}"  # on the node's own disk: home directories are often shared by all nodes
_CACHE = "compiled kernels stay on the node: a shared home directory means locks and a compilation per process"

ON_CPUS = (
    _RECORDER,
    _LOGPROBS,
    Variable("OMP_WAIT_POLICY", "passive", BOTH, "threads that wait must sleep: spinning, they take cores from other processes"),
    Variable(
        "GOMP_SPINCOUNT",
        "3000",
        BOTH,
        "GNU OpenMP's: but not at once; to wake a thread costs more than most operators of a small model",
    ),
    Variable(
        "THP_MEM_ALLOC_ENABLE", "1", BOTH, "torch's: buckets of weights come in large pages; small ones cost more than sending"
    ),
    Variable(
        "MALLOC_MMAP_MAX_", "0", SERVER, "glibc's: memory of a bucket of weights is kept; new memory costs more than receiving it"
    ),
    Variable("MALLOC_TRIM_THRESHOLD_", str(2**40), SERVER, "as MALLOC_MMAP_MAX_"),
    Variable(
        "SGLANG_ENABLE_TORCH_INFERENCE_MODE", "1", SERVER, "torch keeps no account of views and versions, so steps cost less"
    ),
    Variable(
        "SGLANG_FORCE_STREAM_INTERVAL",
        "1024",
        SERVER,
        "tokens of a request that are sent to the HTTP process at once; with SGLang's 50 there is a message in nearly every step",
    ),
)
ON_GPUS = (
    _RECORDER,
    _LOGPROBS,
    Variable("NCCL_CUMEM_ENABLE", "0", BOTH, "SGLang sets it where it is unset; NCCL fails or hangs where two ends differ"),
    Variable("NCCL_NVLS_ENABLE", "0", BOTH, "as NCCL_CUMEM_ENABLE"),
    Variable("NCCL_MNNVL_ENABLE", "0", BOTH, "SGLang sets both to 1 on GB200 and GB300 where they are unset; there set both"),
    Variable("NCCL_DEBUG", "WARN", BOTH, "NCCL's errors come with their cause"),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "1", TRAINER, "Megatron overlaps tensor parallelism by the order of launches"),
    Variable("TRITON_CACHE_DIR", f"{KERNELS}/triton", BOTH, _CACHE),
    Variable("TORCHINDUCTOR_CACHE_DIR", f"{KERNELS}/inductor", BOTH, _CACHE),
    Variable("TORCH_EXTENSIONS_DIR", f"{KERNELS}/extensions", BOTH, _CACHE),
    Variable("CUDA_CACHE_PATH", f"{KERNELS}/nv", BOTH, _CACHE),
    Variable("SGLANG_CACHE_DIR", f"{KERNELS}/sglang", SERVER, f"{_CACHE}; also flashinfer's, TileLang's and DeepGEMM's"),
    Variable("SGLANG_JIT_CACHE_DIR", f"{KERNELS}/sglang/jit", SERVER, _CACHE),
    Variable("TVM_FFI_CACHE_DIR", f"{KERNELS}/tvm-ffi", SERVER, _CACHE),
    Variable(
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
        "0",
        BOTH,
        "with 1 Ray hides no GPU from a process, and every rank takes the first one",
        fixed=True,
    ),
)
EXPANDABLE = Variable(
    "PYTORCH_CUDA_ALLOC_CONF",
    "expandable_segments:True",
    TRAINER,
    "micro-batches of all lengths would fragment memory; not where servers open that memory, nor in servers",
)
_OF_THE_NODE = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SGLANG_CPU_OMP_THREADS_BIND")  # which are decided there
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch's old name and the new one; the old one wins
PASSED_ON = ("NCCL_", "TORCH_NCCL_", "GLOO_", "NVSHMEM_", "UCX_", "FI_")  # what describes the network, by its beginning

# what `rollout.engine.extra_args` makes SGLang set, whatever it finds (srt/entrypoints/engine.py, 0.5.23)
_FORCED_BY = {
    "--enable-symm-mem": ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"),
    "--enable-nccl-nvls": ("NCCL_NVLS_ENABLE",),
}


def check_environment(user: Mapping[str, str], device: str, engine_args: Sequence[str] = ()) -> None:
    """Raises InputError where `user`, the environment of the command, has a value that a run on `device` cannot work with.

    `engine_args`: `rollout.engine.extra_args`.
    """
    if device == "cpu":
        return
    interleaved = "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"
    if user.get(interleaved, "").lower() in ("1", "true", "yes", "y"):
        raise InputError(
            f"{interleaved}={user[interleaved]} in the environment: servers would reorder the experts' matrices when they load, "
            "and weights that are published later would not fit; unset it"
        )
    for name, value in _forced(engine_args).items():
        if user.get(name, value) != value:
            raise InputError(
                f"{name}={user[name]} in the environment, but rollout.engine.extra_args make servers use {value}; "
                f"the trainer must use the same: unset {name}, or leave that argument out"
            )


def variables(reader: Reader, device: str, *, shares_gpus: bool = False, engine_args: Sequence[str] = ()) -> list[Variable]:
    """What a process of a run on `device`, cpu or cuda, is given where the user has set nothing.

    `shares_gpus`: the servers use the trainer's GPUs. `engine_args`: `rollout.engine.extra_args`.
    """
    if device == "cpu":
        return [each for each in ON_CPUS if reader in each.readers]
    forced = _forced(engine_args)
    found = [replace(each, value=forced.get(each.name, each.value)) for each in ON_GPUS if reader in each.readers]
    return found if shares_gpus or reader not in EXPANDABLE.readers else [*found, EXPANDABLE]


def environment_of(
    reader: Reader, device: str, user: Mapping[str, str], *, shares_gpus: bool = False, engine_args: Sequence[str] = ()
) -> dict[str, str]:
    """The variables of a process of the run, to be added to what it inherits: the user's values first."""
    known = variables(reader, device, shares_gpus=shares_gpus, engine_args=engine_args)
    given = {each.name: each.value if each.fixed else user.get(each.name, each.value) for each in known}
    if "OMP_WAIT_POLICY" in user and "GOMP_SPINCOUNT" not in user:
        given.pop("GOMP_SPINCOUNT", None)  # it would win over what the user says of the same
    if device == "cpu":
        return given
    given |= {name: value for name, value in user.items() if name.startswith(PASSED_ON)}
    own = {name: user[name] for name in _ALLOCATOR if user.get(name)}
    if own and reader == "trainer":
        given.pop(EXPANDABLE.name, None)
    if reader == "server" or shares_gpus:
        own = {name: without_expandable_segments(value) for name, value in own.items()}
    return given | own


def without_expandable_segments(options: str) -> str:
    """torch's allocator options without that one: torch-memory-saver refuses it, and such memory does not go by CUDA IPC."""
    return ",".join(each for each in options.split(",") if not each.strip().startswith("expandable_segments"))


def in_force(reader: Reader, device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables above, and of those that are passed on, that `environment` has; sorted by name."""
    names = {each.name for each in variables(reader, device)} | {*_ALLOCATOR, *_OF_THE_NODE}
    return {name: environment[name] for name in sorted(environment) if name in names or name.startswith(PASSED_ON)}


def _forced(engine_args: Sequence[str]) -> dict[str, str]:
    return {name: "1" for argument in engine_args for name in _FORCED_BY.get(argument, ())}
