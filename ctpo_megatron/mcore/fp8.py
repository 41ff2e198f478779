"""Training in fp8: Megatron-Core's options for it, and what they need.

Without TransformerEngine Megatron-Core 0.16.1 takes these options and does nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from ctpo_megatron.config.train import Fp8Config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.mcore.transformer_engine import use_transformer_engine

Capability = tuple[int, int]
NEEDED: dict[str, Capability] = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_GPUS = {(8, 9): "Ada or Hopper", (9, 0): "Hopper", (10, 0): "Blackwell"}


def fp8_options(fp8: Fp8Config | None) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig."""
    if fp8 is None:
        return {}
    start, end = fp8.bf16_layers_at_start, fp8.bf16_layers_at_end
    kept = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": start, "num_layers_at_end_in_bf16": end}
    return {"fp8": fp8.number_format, "fp8_recipe": fp8.recipe, **(kept if start or end else {})}


def check_fp8(fp8: Fp8Config | None, device: torch.device, dtype: torch.dtype, *, recompute: str, mixture: bool) -> None:
    """Raises ConfigError where products of layers cannot be in fp8 as asked. `mixture`: the model has experts."""
    if fp8 is None:
        return
    what = f"train.fp8.recipe={fp8.recipe}"
    if not use_transformer_engine(device):
        why = "the trainer runs on a CPU" if device.type != "cuda" else "the package is not installed (`make install-gpu`)"
        raise ConfigError(
            f"{what} needs the layers of TransformerEngine, but {why}: plain layers would compute in {str(dtype)[6:]} as before. "
            "Set train.fp8 to null"
        )
    found, needed = torch.cuda.get_device_capability(device), NEEDED[fp8.recipe]
    if found < needed:
        raise ConfigError(
            f"{what} needs a GPU of compute capability {_dotted(needed)} or more ({_GPUS[needed]}), but the trainer's is "
            f"{torch.cuda.get_device_name(device)}, {_dotted(found)}. {_instead(found)}"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(f"{what} is for bfloat16 weights, but the trainer's are {str(dtype)[6:]}; set model.dtype=bfloat16")
    if fp8.recipe == "delayed" and recompute == "selective" and mixture:
        raise ConfigError(
            f"{what} with train.recompute=selective: Megatron-Core computes norms and experts' activations again with other "
            "recipes only; take recipe=tensorwise, or train.recompute=full or none"
        )


def _instead(found: Capability) -> str:
    allowed = [recipe for recipe, needed in NEEDED.items() if found >= needed]
    return f"It can have {', '.join(allowed)}" if allowed else "Set train.fp8 to null"


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
