"""Weights as safetensors on a file system that trainer and servers share: for servers that no process group reaches.

    sender 0, 1, ..., all at once                 the last sender, after all others                     each server
    write own files into v000012.tmp, a part ->   manifest, flush, rename to v000012
    of the manifest last                          POST /update_weights_from_disk (v000012) --------->   load all files, answer
                                                  remove older versions

A version may be a delta: only tensors that differ bitwise from the version before, for servers that hold that one. SGLang loads
what it finds and leaves the rest as it is. After `connect` the next version is full. The manifest has for each tensor its file,
digest (see `engine.digest`), number format and shape, and for a delta the version that it builds on. No update session is
opened: loading from disk is one request of its own.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ctpo_megatron.checkpoints.directories import TEMPORARY_SUFFIX, complete_directory
from ctpo_megatron.config.weights import DiskTransport
from ctpo_megatron.engine.digest import Part, tensor_digests
from ctpo_megatron.errors import WeightSyncError, reason
from ctpo_megatron.weights.protocol import Bucket, Sent
from ctpo_megatron.weights.transports.order import SenderOrder
from ctpo_megatron.weights.transports.prefetch import DigestAccount, SendAccount, send_account
from ctpo_megatron.weights.transports.sender import ConnectingSender

MANIFEST = "manifest.json"
_VERSION = re.compile(r"v\d+(\.tmp)?")


class DiskSender(ConnectingSender):
    """A `protocol.WeightSender` by way of files below `config.directory`."""

    def __init__(
        self,
        config: DiskTransport,
        order: SenderOrder | None = None,
        new_account: Callable[[], DigestAccount] | None = None,
    ) -> None:
        super().__init__(config, order, new_account)
        self._root = Path(config.directory).absolute()
        self._keep = config.keep
        self._base: int | None = None  # version that the servers hold

    def send(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Implement `WeightSender.send`. Raises WeightSyncError also when the files cannot be written."""
        deadline = time.monotonic() + self._timeout_s
        target = self._root / f"v{version:06d}"
        work = target.with_name(target.name + TEMPORARY_SUFFIX)
        try:
            with send_account(buckets, version, self._changes, self._new_account) as account:
                with self._order.take_with(lambda: self._write(account, work), deadline), account.timed("send"):
                    if self._order.last:
                        self._publish(work, target, deadline)
                self._order.conclude(deadline)  # the last sender publishes what all have written
                self._base = version
                return account.finish()
        except (OSError, SafetensorError) as error:
            self.forget()
            raise WeightSyncError(f"publishing weights: {work} cannot be written: {reason(error, work)}") from error
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Make the next publication a full one."""
        super().forget()
        self._base = None

    def _write(self, account: SendAccount, work: Path) -> None:
        """Write this sender's files, and a part of the manifest that lists them."""
        work.mkdir(parents=True, exist_ok=True)
        base = None if self._changes.full else self._base
        tensors: dict[str, dict[str, Any]] = {}
        number = 0
        while (bucket := account.next()) is not None:
            file = f"model-{self._order.place:03d}-{number:05d}.safetensors"
            with account.timed("write"):
                save_file({name: tensor.cpu() for name, tensor in bucket}, work / file, metadata={"format": "pt"})
            tensors |= _entries(file, bucket)
            number += 1
        part = {"version": account.sent.version, "base": base, "tensors": tensors}
        (work / _part(self._order.place)).write_text(json.dumps(part), encoding="utf-8")

    def _publish(self, work: Path, target: Path, deadline: float) -> None:
        """Name the version, which all senders have written, let the servers load it, and remove older ones."""
        calls = self._calls
        parts = [json.loads((work / _part(place)).read_text(encoding="utf-8")) for place in range(self._order.count)]
        tensors = {name: entry for part in parts for name, entry in part["tensors"].items()}
        bases = {part["base"] for part in parts}
        manifest = {**parts[0], "base": bases.pop() if len(bases) == 1 else None, "tensors": tensors}
        wanted = {MANIFEST, *(entry["file"] for entry in tensors.values())}
        for file in work.iterdir():  # parts, and what an earlier, interrupted attempt left
            if file.name not in wanted:
                file.unlink()
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        complete_directory(work, target)
        if tensors:
            body = {"model_path": str(target), "load_format": "safetensors", "flush_cache": False}
            what = f"loading {target}"
            calls.post("/update_weights_from_disk", lambda _: body, deadline - time.monotonic(), what).finish(deadline)
        self._remove_old(target)

    def _remove_old(self, newest: Path) -> None:
        ours = (path for path in self._root.iterdir() if _VERSION.fullmatch(path.name) and path != newest)
        by_age = sorted(ours, key=lambda path: path.stat().st_mtime, reverse=True)
        for path in by_age[self._keep - 1 :]:
            shutil.rmtree(path, ignore_errors=True)


def _entries(file: str, bucket: Bucket) -> dict[str, dict[str, Any]]:
    """What the manifest says of each tensor of `bucket`, which lies in `file`."""
    digests = tensor_digests(Part(tensor) for _, tensor in bucket)
    return {
        name: {
            "file": file,
            "digest": f"{digest:016x}",
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        for (name, tensor), digest in zip(bucket, digests, strict=True)
    }


def _part(place: int) -> str:
    return f"part-{place:03d}.json"
