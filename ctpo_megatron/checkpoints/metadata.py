"""The index of a torch_dist checkpoint, `.metadata`, which torch pickles: read so that it can hold nothing but descriptions."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import DamagedCheckpoint

METADATA = ".metadata"
# what torch 2.14 stores in it: classes that hold sizes, names and offsets, and call nothing when they are built
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "builtins": {"getattr"},  # replaced below
    "collections": {"OrderedDict"},
}


def read_metadata(checkpoint: Path) -> Any:
    """Returns torch's Metadata. Raises DamagedCheckpoint when the file names a class or function that no such index needs."""
    file = checkpoint / METADATA
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{file}: not the index of a torch_dist checkpoint: {error}.") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Returns what `ALLOWED` lists. Raises UnpicklingError for anything else."""
        import torch

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)
