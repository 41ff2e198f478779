"""The device and its communication backend, chosen in one place, and what Megatron-Core needs where there is no CUDA.

Megatron-Core 0.16.1 asks for CUDA by name in many places. On a CPU `prepare_host` bridges them before megatron is imported;
where CUDA is used it adds only the name that TransformerEngine alone would bring. Every bridge has a test in
tests/dist/test_host.py that fails once megatron can do without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.rendezvous.gloo import share_gloo_device

# Optional imports of megatron that come with SGLang. Without a GPU flash_mla fails with OSError, where megatron catches only
# ImportError; flashinfer loads, but takes 5 s and is of no use.
ABSENT_ON_CPU = ("flash_mla", "flashinfer")
# Optional too, and of no use to a rank on a CPU, which imports them when megatron is there if it wants them: kernels that are
# compiled for GPUs, and writers of TensorBoard's files. 0.3 s.
ABSENT_AT_FIRST_ON_CPU = ("triton", "torch.utils.tensorboard")
DEPRECATED_COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor")


def prepare_host(device: str = "auto", local_rank: int = 0) -> torch.device:
    """Make this process ready for megatron on `device` (auto, cpu or cuda) and return the device that it is to use.

    Call it before anything imports megatron. Raises ConfigError for `cuda` where torch sees no such GPU.
    """
    silence_deprecated_collectives()
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"cluster.device is {device!r}; allowed are auto, cpu, cuda.")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        _bridge_cpu()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"cluster.device is cuda, but this process would use GPU {local_rank} of {torch.cuda.device_count()} visible ones; "
            "set cluster.device to cpu or give the trainer more GPUs."
        )
    torch.cuda.set_device(local_rank)
    name_general_gemm()
    return torch.device("cuda", local_rank)


def dtype_on(device: torch.device, name: str) -> torch.dtype:
    """The number format `name`, float32, bfloat16 or auto, of weights on `device`."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def silence_deprecated_collectives() -> None:
    """Ignore torch's warnings of `all_gather_into_tensor` and `reduce_scatter_tensor`, in this process.

    Megatron-Core 0.16.1 calls both for its distributed optimizer, and torch 2.14 warns that they have new names. What is of this
    package uses the new names (`parallel.gather`). tests/dist/test_host.py tells when megatron no longer needs it.
    """
    for name in DEPRECATED_COLLECTIVES:
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)


def backend_for(device: torch.device) -> str:
    """Communication backend of torch.distributed for `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def megatron_region(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which to call megatron: on a CPU, calls that name CUDA are answered with the CPU."""
    return contextlib.nullcontext() if device.type == "cuda" else CudaMeansCpu()


def forward_region(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context within `megatron_region` in which to call a model.

    On a CPU it ends the watch over every call of torch, which takes an eighth of a small model's time. Layers do not name CUDA.
    """
    return contextlib.nullcontext() if device.type == "cuda" else torch._C.DisableTorchFunction()


class CudaMeansCpu(TorchFunctionMode):
    """Inside it `device="cuda"` makes a CPU tensor, `.cuda()` changes nothing, and `.type()` says `torch.cuda.`.

    The last is for megatron's optimizers, which compare those strings to tell number formats apart.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):  # asks for CUDA's host allocator
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        return func(*args)


class NullStream:
    """Stands for a CUDA stream or event: on a CPU, work is done when the call returns."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _stream: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, _event: Any = None) -> Self:
        """An event that has already happened."""
        return self

    def wait(self, _stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None: ...


@functools.cache
def _bridge_cpu() -> None:
    """Apply every bridge, once per process."""
    modules: dict[str, Any] = sys.modules
    for name in ABSENT_ON_CPU:
        modules.setdefault(name, None)  # makes `import name` raise ImportError
    share_gloo_device()
    _bridge_torch_cuda()
    _import_megatron()
    _bridge_random_state()
    name_general_gemm()
    _bridge_moe()


def name_general_gemm() -> None:
    """Give the routers of experts a name that they look up on every device and only TransformerEngine defines."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # tested against None where it is used


def _bridge_torch_cuda() -> None:
    """Functions of torch.cuda that megatron calls, with the meaning they have on a CPU."""
    cpu, stream, generator = torch.device("cpu"), NullStream(), torch.Generator()
    cuda: Any = torch.cuda  # whose own types these functions are not to have
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda _device=None: None
    cuda.Stream = cuda.Event = NullStream
    cuda.current_stream = cuda.default_stream = lambda _device=None: stream
    cuda.stream = lambda _stream: stream
    # megatron's model-parallel random states live in the "CUDA generator", here one more CPU generator
    cuda.manual_seed = generator.manual_seed
    cuda.get_rng_state = lambda _device="cuda": generator.get_state()
    cuda.set_rng_state = lambda state, _device="cuda": generator.set_state(state)


def _import_megatron() -> None:
    """Import megatron without torch.compile: its fusions are meant for GPUs, and the compiler takes seconds to load."""
    module: Any = torch
    modules: dict[str, Any] = sys.modules
    compiler = module.compile
    module.compile = lambda model=None, **_options: model if model is not None else (lambda function: function)
    hidden = [name for name in ABSENT_AT_FIRST_ON_CPU if name not in modules]
    modules.update(dict.fromkeys(hidden))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each optional GPU extension that is absent warns once
            for name in ("models.gpt.gpt_layer_specs", "optimizer", "pipeline_parallel"):
                importlib.import_module(f"megatron.core.{name}")
    finally:
        module.compile = compiler
        for name in hidden:
            if modules[name] is None:
                del modules[name]


def _bridge_random_state() -> None:
    """Two helpers of megatron reach into torch's CUDA generators."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.cuda.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.cuda.set_rng_state(new_state)


def _bridge_moe() -> None:
    """What mixtures of experts need of gloo: its idea of sizes."""
    collectives: Any = dist
    original = collectives.all_to_all_single

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor, input: torch.Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **options: Any
    ) -> Any:
        # megatron passes tensors or arrays, gloo takes lists
        sizes = (None if s is None else [int(n) for n in s] for s in (output_split_sizes, input_split_sizes))
        return original(output, input, *sizes, **options)

    collectives.all_to_all_single = all_to_all_single
    collectives.all_gather = _gather_uneven(collectives.all_gather)


def _gather_uneven(gather: Callable[..., Any]) -> Callable[..., Any]:
    """gloo gathers tensors of one size, but the ranks that share an expert's matrices (etp) bring different numbers of tokens."""

    @functools.wraps(gather)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        rows = [out.shape[0] if out.dim() else 1 for out in tensor_list]
        if len(set(rows)) == 1:
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = [tensor.new_empty(max(rows), *tensor.shape[1:]) for _ in rows]
        mine = torch.cat([tensor, tensor.new_zeros(max(rows) - tensor.shape[0], *tensor.shape[1:])])
        gather(padded, mine, group=group)
        for out, whole in zip(tensor_list, padded, strict=True):
            out.copy_(whole[: out.shape[0]])
        return None

    return all_gather
