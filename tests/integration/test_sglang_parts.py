"""What runs inside an SGLang process, called without a server."""

from __future__ import annotations

import argparse
import importlib
import itertools
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ctpo_megatron.config.sglang_options import REFUSED, THRESHOLDS, Option
from ctpo_megatron.engine.digest import tensor_digest

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
@pytest.mark.parametrize("dim", [8, 32])
def test_attention_is_the_same_in_any_part(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """Decoding and reading, with and without shared key heads, against one sequence after the other."""
    from ctpo_megatron.engine.sglang import attention

    generator = torch.Generator().manual_seed(dim)
    cases = [([1] * 9, [3, 60, 40, 2, 50, 700, 8, 9, 701]), ([3, 1, 40, 1, 7], [3, 60, 40, 2, 50])]
    for heads, key_heads, (new, total), cost in itertools.product((4,), (1, 2, 4), cases, (0, 768)):
        monkeypatch.setattr(attention, "PART_COST", cost)
        slots = torch.randperm(len(new) * max(total), generator=generator).view(len(new), -1).int()
        keys, values = (torch.randn(slots.numel(), key_heads, dim, generator=generator) for _ in range(2))
        query = torch.randn(sum(new), heads, dim, generator=generator)
        out, row = torch.full_like(query, torch.nan), 0
        parts = attention.plan(new, total, slots)
        assert cost or len(parts) > 1
        for part in parts:
            attention.attend(query, keys, values, part, 0.3, out)
        for n, length, mine in zip(new, total, slots.long(), strict=True):
            k, v = (each[mine[:length]].repeat_interleave(heads // key_heads, 1).transpose(0, 1) for each in (keys, values))
            scores = 0.3 * query[row : row + n].transpose(0, 1) @ k.transpose(1, 2)
            scores.masked_fill_(torch.ones(n, length, dtype=torch.bool).triu(length - n + 1), -torch.inf)
            torch.testing.assert_close(out[row : row + n], (scores.softmax(-1) @ v).transpose(0, 1), atol=1e-5, rtol=0)
            row += n


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_operators_are_sglangs() -> None:
    """In fewer calls, the same numbers to the last places of float32; and SGLang's own form where ours does not fit."""
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    from ctpo_megatron.engine.sglang import operators

    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    norm = object.__new__(RMSNorm)
    torch.nn.Module.__init__(norm)
    norm.weight, norm.variance_epsilon, norm.hidden_size = torch.nn.Parameter(drawn(64)), 1e-6, 64
    norm.variance_size_override = norm.override_orig_dtype = None
    norm.fp32_residual = norm.cast_x_before_out_mul = False
    for x, residual in ((drawn(5, 64), None), (drawn(5, 64), drawn(5, 64)), (drawn(5, 64).bfloat16(), None)):
        torch.testing.assert_close(operators.rms_norm(norm, x, residual), norm.forward_native(x, residual))
    silu, x = object.__new__(SiluAndMul), drawn(7, 48)
    torch.testing.assert_close(operators.silu_and_mul(silu, x), silu.forward_native(x))
    rotary = object.__new__(RotaryEmbedding)
    torch.nn.Module.__init__(rotary)
    rotary.head_size, rotary.is_neox_style, rotary.cos_sin_cache = 16, True, drawn(100, 16)
    rotary._apply_rotary_emb_wrapped = importlib.import_module(RotaryEmbedding.__module__).apply_rotary_emb
    for rotary.rotary_dim, rotary.is_neox_style in ((16, True), (16, False), (8, True)):
        rotary.cos_sin_cache = drawn(100, rotary.rotary_dim)
        query, key = drawn(6, 96).split([64, 32], dim=-1)
        given = (torch.tensor([0, 5, 99, 7, 7, 3]), query, key)
        torch.testing.assert_close(operators.rotary(rotary, *given), rotary.forward_native(*given))


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_products_with_weights_are_the_same_in_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the weight lies in memory, it has its numbers, its digest and takes new ones; what is no float32 is left alone."""
    from ctpo_megatron.engine.sglang import products
    from ctpo_megatron.kernels.cpu import linear

    monkeypatch.setattr(linear, "pays", torch.backends.mkldnn.is_available)  # whatever the processor
    generator = torch.Generator().manual_seed(1)
    given, later = torch.randn(2, 192, 128, generator=generator)
    x, bias = torch.randn(3, 15, 128, generator=generator), torch.randn(192, generator=generator)
    layer = SimpleNamespace(weight=torch.nn.Parameter(given.clone(), requires_grad=False))
    products.lie_by_inputs(None, None, layer)
    assert layer.weight.stride() == (1, 192)
    assert torch.equal(layer.weight, given)
    assert tensor_digest(layer.weight) == tensor_digest(given)
    layer.weight.data.copy_(later)
    torch.testing.assert_close(torch.nn.functional.linear(x, layer.weight), x @ later.T)
    half = SimpleNamespace(weight=torch.nn.Parameter(given.bfloat16(), requires_grad=False))
    products.lie_by_inputs(None, None, half)
    assert half.weight.stride() == (128, 1)
    for added in (None, bias):
        found = products.by_onednn(pytest.fail, None, layer, x, added)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, later, added), rtol=1e-5, atol=1e-4)
    assert products.by_onednn(lambda *_: "SGLang's own", None, half, x.bfloat16()) == "SGLang's own"


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_qwen3_moe_still_has_experts_in_every_layer() -> None:
    """Where config.json has dense ones `jobs.agreement` refuses the model; it need not once this fails."""
    qwen3_moe = importlib.import_module("sglang.srt.models.qwen3_moe")
    config = SimpleNamespace(mlp_only_layers=[0], decoder_sparse_step=2, num_experts=4, num_hidden_layers=4)
    assert all(qwen3_moe.Qwen3MoeDecoderLayer.stage_facts(config, layer)[1].sparse for layer in range(4))


def test_a_record_of_routing_still_wants_cuda() -> None:
    """Should this not fail any more, `engine.sglang.routed` may go."""
    from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator, alloc_with_host_register

    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        alloc_with_host_register((4,), torch.int32, "cpu", True, HostTensorAllocator())


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_what_is_refused_is_all_that_its_parser_takes_for_it() -> None:
    """Every other name and every beginning of what is refused is refused too, and no other option is, by its whole name."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    actions = {name.removeprefix("--"): action for name, action in parser._option_string_actions.items() if name.startswith("--")}
    named = {*REFUSED, *THRESHOLDS}
    assert named <= actions.keys()
    refused = {name for name, action in actions.items() if action.dest in {actions[each].dest for each in named}}
    assert refused == named
    for name in actions:
        beginnings = [name[:end] for end in range(1, len(name))]
        taken = [each for each in beginnings if len(parser._get_option_tuples(f"--{each}")) == 1 and each not in actions]
        for word in [name, *(taken if name in named else [])]:
            assert bool(list(Option(word, "x").faults)) == (name in named), word


class Waiting:
    """A request as SGLang's scheduler knows it, of whose prompt so many tokens are `cached`, and `usable` if they are."""

    cache_salt = lora_id = priority = None

    def __init__(self, prompt: list[int], extra_key: str | None = None, cached: int = 0, usable: int = 39) -> None:
        self.origin_input_ids, self.extra_key, self.cached, self.usable = array("q", prompt), extra_key, cached, usable

    def _compute_max_prefix_len(self, size: int) -> int:
        return min(size - 1, self.usable)


def scheduler_of(monkeypatch: pytest.MonkeyPatch, queue: list[Waiting], **options: object) -> tuple[Any, Any, Any]:
    """A hook with a scheduler that has a queue, how to have it take so many of it, and lists of those whom it was offered."""
    from ctpo_megatron.engine.sglang import twins

    monkeypatch.setattr(twins, "match_kv_cache", lambda req, cache: SimpleNamespace(device_prefix_len=req.cached))
    plain = {"enable_overlap": False, "disable_radix_cache": False, "chunked_req": None, "tree_cache": None}
    scheduler, hook = SimpleNamespace(waiting_queue=list(queue), **plain | options), twins.Twins()
    offered: list[list[int]] = []

    def choose(of: SimpleNamespace, count: int, running_batch: SimpleNamespace) -> str:
        offered.append([queue.index(each) for each in of.waiting_queue])
        of.waiting_queue = of.waiting_queue[count:]
        return "a batch"

    def take(count: int, full: bool = False) -> str:
        running = SimpleNamespace(batch_is_full=full, is_empty=lambda: False)
        return hook(choose, scheduler, count=count, running_batch=running)

    return scheduler, take, offered


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_requests_wait_for_the_first_of_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it waits, and no longer; the queue keeps its order."""
    a, b = list(range(40)), list(range(1, 41))
    came = [Waiting(each) for each in (a, b, a, b, a, b)]
    scheduler, take, offered = scheduler_of(monkeypatch, came)
    assert take(0) == "a batch"
    assert scheduler.waiting_queue == came
    take(6, full=True)  # as SGLang's method, which returns at once
    assert offered == [[0, 1], [0, 1, 2, 3, 4, 5]]
    scheduler.waiting_queue = list(came)
    take(1)
    assert scheduler.waiting_queue == came[1:], "there was room for one prompt"
    late = Waiting(a, cached=39)
    came.append(late)
    scheduler.waiting_queue.append(late)
    take(3)
    assert offered[2:] == [[0, 1], [1, 2, 4, 6]], "those of the first prompt find it in the cache"
    assert scheduler.waiting_queue == [came[3], came[5], late]
    take(3)
    assert offered.pop() == [3, 5, 6]


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_requests_wait_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for short prompts, nor for cached ones or those whose log-probs are wanted, nor for others' caches."""
    a, b = list(range(40)), list(range(1, 41))
    for each in ({"cached": 39}, {"usable": 0}, {"prompt": [2] * 16}):
        scheduler, take, offered = scheduler_of(monkeypatch, [Waiting(**{"prompt": a} | each) for _ in range(3)])
        take(3)
        assert offered == [[0, 1, 2]], each
    scheduler, take, offered = scheduler_of(monkeypatch, [Waiting(a), Waiting(a, "another model")])
    take(2)
    assert offered == [[0, 1]]
    for option in ("enable_overlap", "disable_radix_cache"):
        scheduler, take, offered = scheduler_of(monkeypatch, [Waiting(a), Waiting(a)], **{option: True})
        take(2)
        assert offered == [[0, 1]], option
    scheduler, take, offered = scheduler_of(monkeypatch, [Waiting(a), Waiting(b)], chunked_req=Waiting(a))
    take(1)
    assert offered == [[1]], "a prompt that is read in pieces is waited for"
    scheduler.chunked_req = None
    take(1)
    assert offered[1:] == [[0]]


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
@pytest.mark.parametrize("words", [40, 512, 513, 1000, 1024])  # the share is looked for among words, or among blocks of them
def test_a_token_is_sampled_by_its_probability(monkeypatch: pytest.MonkeyPatch, words: int) -> None:
    """As often as its share says; a word without probability never, whatever number is drawn."""
    from ctpo_megatron.engine.sglang import sampling

    generator, draws = torch.Generator().manual_seed(1), 50_000
    probs = torch.rand(words, generator=generator).pow(6)
    probs[[0, 17, words - 1]] = 0.0
    probs[256:512] = 0.0
    shares = probs.double() / probs.double().sum()
    torch.manual_seed(2)
    found = sampling.sample(pytest.fail, probs.expand(draws, -1))
    assert (found.shape, found.dtype) == ((draws,), torch.int32)
    counts = torch.bincount(found, minlength=words)
    assert counts[probs == 0].sum() == 0
    deviation = (counts - draws * shares).abs() / (draws * shares * (1 - shares)).sqrt().clamp_min(1.0)
    assert deviation.max() < 5.5
    for number, word in ((0.0, 1), (1 - 2.0**-53, int(probs.nonzero().max()))):
        monkeypatch.setattr(torch, "rand", lambda *shape, number=number, **options: torch.full(shape, number, **options))
        assert sampling.sample(pytest.fail, probs[None]).item() == word


@pytest.mark.filterwarnings("ignore")  # of SGLang's imports
def test_rare_tokens_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums do not lose a rare word; with seeds SGLang samples."""
    from ctpo_megatron.engine.sglang import sampling

    rare = torch.tensor([1.0, 1e-12, 0.0, 0.5, 0.0])  # float32 sums would not tell the second word from the first
    at = {0.0: 0, (1.0 + 0.5e-12) / (1.5 + 1e-12): 1, (1.0 + 2e-12) / (1.5 + 1e-12): 3, 1 - 2.0**-53: 3}
    for number, word in at.items():
        monkeypatch.setattr(torch, "rand", lambda *shape, number=number, **options: torch.full(shape, number, **options))
        assert sampling.sample(pytest.fail, rare[None]).item() == word, number
    seeded = sampling.sample(lambda *given: given, rare[None], torch.tensor([7]), torch.tensor([0]))
    assert [each.tolist() for each in seeded[1:]] == [[7], [0]]
