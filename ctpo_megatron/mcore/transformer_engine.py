"""Whether layers are TransformerEngine's: where there are GPUs and it is installed. It then has to load."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from ctpo_megatron.errors import InputError

PACKAGE = "transformer_engine"


def use_transformer_engine(device: torch.device) -> bool:
    """True where the layers are TransformerEngine's.

    Raises InputError where it is installed and does not load. `import transformer_engine` hides that, and Megatron then takes it
    for absent; a build against another torch is the usual cause.
    """
    if device.type != "cuda" or importlib.util.find_spec(PACKAGE) is None:
        return False
    try:
        importlib.import_module(f"{PACKAGE}.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"TransformerEngine is installed and does not load: {type(error).__name__}: {error}. Build it against this torch "
            f"({torch.__version__}) with `make install-gpu`, or remove it to train with slower layers: "
            "`uv pip uninstall transformer-engine transformer-engine-torch transformer-engine-cu13`"
        ) from error
    return True
