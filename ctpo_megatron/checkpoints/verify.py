"""Is a checkpoint still what was written? Needs neither megatron nor a GPU; torch only to name a damaged tensor."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctpo_megatron.checkpoints.files import SHARDS, read_manifest
from ctpo_megatron.checkpoints.hashes import bytes_hash, file_hash, tensor_hash
from ctpo_megatron.errors import DamagedCheckpoint, StorageError, storage_words

_OUT_OF_REACH = {
    errno.EACCES,
    errno.EPERM,
    errno.EKEYEXPIRED,
    errno.ENOKEY,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
}


def verify_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """Read every file and compare its hash with the manifest's; returns the manifest.

    Raises DamagedCheckpoint, naming the file and, where it holds tensors, the damaged one; CheckpointError for what is no
    finished checkpoint.
    """
    checkpoint = Path(checkpoint)
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest, manifest["files"])
    return manifest


def verify_files(checkpoint: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Compare the hashes of the files called `names` with the manifest's. Raises as `verify_checkpoint` does.

    A file that is missing or that the disk cannot read is damage. One that is out of reach for another reason may be as it was
    written: StorageError.
    """
    for name in names:
        try:
            found = file_hash(checkpoint / name)
        except OSError as error:
            if error.errno in _OUT_OF_REACH:
                raise StorageError(storage_words(error, checkpoint / name)) from error
            raise DamagedCheckpoint(f"{checkpoint / name}: cannot be read: {error}.") from error
        if found != manifest["files"][name]["digest"]:
            what = _damaged_tensor(checkpoint, name) or "its content"
            raise DamagedCheckpoint(f"{checkpoint / name}: {what} does not have the hash that was written.")


def _damaged_tensor(checkpoint: Path, name: str) -> str | None:
    """Returns the first tensor of a file that is not as its rank held it; None without tensors, or where their list is broken."""
    try:
        shards = json.loads((checkpoint / SHARDS).read_text(encoding="utf-8")).get(name, [])
        content = (checkpoint / name).read_bytes()
        damaged = [key for key, *_, digest, begin, end in shards if _hash_of_stored(content[begin:end], digest) != digest]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return f"tensor {damaged[0]}" if damaged else None


def _hash_of_stored(content: bytes, expected: str) -> str | None:
    """Returns the hash of the tensor stored as `content`; None when it cannot be read."""
    import torch

    if bytes_hash(content) == expected:  # an object, stored as its bytes
        return expected
    try:
        return tensor_hash(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception:  # noqa: BLE001 - torch raises many kinds for broken archives; the caller reports the damage
        return None
