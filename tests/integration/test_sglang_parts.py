"""What runs inside an SGLang process, called without a server."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.integration


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_attention_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the parts: every query belongs to one part, looks at itself and all before it, and at nothing else."""
    from ctpo_megatron.engine.sglang import attention

    new, total = [3, 1, 40, 1, 7], [3, 60, 40, 2, 50]
    slots = torch.arange(5)[:, None] * 100 + torch.arange(60)  # slot 100 * i + k holds token k of sequence i
    for limit in (1, 500, 2**22):
        monkeypatch.setattr(attention, "MAX_SCORES", limit)
        parts = attention.plan(new, total, slots)
        assert len(parts) == (5 if limit == 1 else len(parts))
        seen = {}
        for part in parts:
            count, queries = part.shape
            keys = part.keys.view(count, -1)
            for row, slot in zip(part.query_rows.tolist(), part.query_slots.tolist(), strict=True):
                sequence, query = divmod(slot, queries)
                seen[row] = keys[sequence][part.mask[sequence, 0, query]].tolist()
        expected = [
            [100 * i + k for k in range(total[i] - new[i] + query + 1)] for i in range(len(new)) for query in range(new[i])
        ]
        assert [seen[row] for row in range(sum(new))] == expected


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_a_record_of_routing_still_wants_cuda() -> None:
    """Should this not fail any more, `engine.sglang.routed` may go."""
    from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator, alloc_with_host_register

    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        alloc_with_host_register((4,), torch.int32, "cpu", True, HostTensorAllocator())
