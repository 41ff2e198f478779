"""What a server answers to `/weights_checker`, read with suspicion. Needs no torch."""

from __future__ import annotations

from typing import Any

from ctpo_megatron.errors import WeightSyncError

EngineDigests = list[dict[str, int]]
"""Per tensor-parallel rank of an engine, the digest (`engine.digest`) of each tensor, by the engine's own name for it."""

PartDigests = tuple[int, ...]
"""Digests of the parts of one Hugging Face tensor, one for each place that the engine has for a part of it."""

PREFIX = "ctpo2:"  # of a digest as `engine.digest` defines it; another definition gets another number


def write_digest(digest: int) -> str:
    """The digest as the server's plugin reports it."""
    return f"{PREFIX}{digest:016x}"


def read_digests(answer: Any, url: str) -> EngineDigests:
    """The digests of all tensors that the server at `url` holds, from what one `ServerControl.checksums` returned.

    Raises WeightSyncError for an answer of another form, and for hashes that are not this package's digests.
    """
    if not isinstance(answer, dict) or not answer.get("success") or not isinstance(answer.get("ranks"), list):
        raise WeightSyncError(f"{url}/weights_checker gave no checksums: {str(answer)[:500]}")
    places = sorted(
        ((place["tp_rank"], number) for number, rank in enumerate(answer["ranks"]) for place in rank["parallelism_info"])
    )
    numbers = [tp_rank for tp_rank, _ in places]
    if numbers != list(range(len(answer["ranks"]))):
        raise WeightSyncError(
            f"{url}/weights_checker answered for the tensor-parallel ranks {numbers}; weights are proven for "
            "servers of one pipeline stage, one replica and one model: rollout.engine.extra_args must not ask for more."
        )
    ranks = [answer["ranks"][number] for _, number in places]
    return [{name: _read(text, name, url) for name, text in rank["checksums"].items()} for rank in ranks]


def _read(text: str, name: str, url: str) -> int:
    if not text.startswith(PREFIX):
        raise WeightSyncError(
            f"{url} reports the hash {text!r} of {name}, which is SGLang's own and proves nothing here. Its plugin `ctpo_digest` "
            "(entry-point group sglang.srt.plugins) was not loaded: install this version of ctpo_megatron in the server's Python "
            "environment (`pip install .` or `pip install -e .`), and name ctpo_digest where SGLANG_PLUGINS is set."
        )
    return int(text.removeprefix(PREFIX), 16)
