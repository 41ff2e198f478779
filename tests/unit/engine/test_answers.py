"""Recorded experts and likeliest tokens: from a server's answers to a rank's part of a pack."""

from __future__ import annotations

import asyncio
import base64
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.data.packing import pack
from ctpo_megatron.data.samples import build_samples
from ctpo_megatron.engine.answers import read_experts, read_supports, read_top
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.errors import EngineError
from ctpo_megatron.loop.statistics import load_histograms, rollout_metrics, train_metrics
from ctpo_megatron.parallel import RankCoords, own_experts, zigzag_shard
from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.record.trajectories import as_row
from ctpo_megatron.record.values import Mean
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score
from ctpo_megatron.types import WHOLE, Generation, Prompt, RoutingShape, TopK, Trajectory, TrajectoryGroup, Truncation
from tests.support.trajectories import ATTEMPT, GROUP

SHAPE = RoutingShape(num_layers=3, expert_layers=(1, 2), experts=16, top_k=2)
STOP = 9
CUT = Truncation(top_p=0.9, top_k=20)
Run = tuple[list[int], int, str]  # what an answer holds: tokens, version, why it ended


def of_position(position: int, version: int) -> int:
    """The server below routes by it, so that every row of a record tells where it comes from."""
    return (3 * position + version) % 16


class Server(EngineClient):
    """Answers from a script as SGLang does; the rows of a record are those of the version that answers."""

    def __init__(self, runs: list[Run], *, top_k: int = 0, silent_at: int | None = None) -> None:
        fleet = Fleet(patience_s=1)
        self.member = fleet.join("server", "http://server")
        fleet.serve([self.member], runs[0][1])
        super().__init__(fleet, "key", request_timeout_s=1, routing=SHAPE, top_k=top_k)
        self.requests = self
        self.runs, self.asked, self.silent_at = runs, [], silent_at

    async def post(self, url: str, body: Any) -> Any:
        tokens, version, reason = self.runs[len(self.asked)]
        self.asked.append(body)
        self.fleet.serve([self.member], version)
        meta: dict[str, Any] = {
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
            "weight_version": str(version),
            "finish_reason": {"type": reason},
        }
        if body.get("return_routed_experts") and len(self.asked) != self.silent_at:
            positions = range(body["routed_experts_start_len"], len(body["input_ids"]) + len(tokens) - 1)
            rows = np.array([of_position(p, version) for p in positions], np.int32)
            record = np.broadcast_to(rows[:, None, None], (len(rows), 3, 2)) + np.array([0, 1, 2])[:, None]
            meta["routed_experts"] = base64.b64encode((record % 16).astype(np.int32).tobytes()).decode()
        if body.get("return_sampling_mask"):
            meta["output_token_sampling_mask"] = [[token, token + 1] for token in tokens]
            meta["output_token_sampling_logprobs"] = [-0.25] * len(tokens)
        if k := body.get("top_logprobs_num"):
            meta["output_top_logprobs"] = [[[-0.5 - i, token + i, None] for i in range(k)] for token in tokens]
        return {"output_ids": tokens, "meta_info": meta}


def sample(server: Server, recorded: int | None = 0, truncation: Truncation = WHOLE) -> Generation:
    options = {"temperature": 1.0, "truncation": truncation, "stop_token_ids": [STOP], "session": 0, "recorded": recorded}
    return asyncio.run(server.generate([5, 6, 7], max_new_tokens=8, **options))


def expected(versions: list[int | None]) -> list[int]:
    """The first expert of each position in the model's second layer; None: unknown."""
    return [-1 if version is None else (of_position(p, version) + 1) % 16 for p, version in enumerate(versions)]


def test_one_answer() -> None:
    """A row for every token but the last, layers without experts left out."""
    generation = sample(Server([([1, 2, STOP], 4, "stop")]))
    assert generation.routed_experts.shape == (5, 2, 2)
    assert generation.routed_experts.dtype == np.int8
    assert generation.routed_experts[:, 0, 0].tolist() == expected([4] * 5)
    assert (generation.routed_experts[:, 1] == (generation.routed_experts[:, 0] + 1) % 16).all()


def test_a_large_record_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that other answers are not held up by it: what it says is the same."""
    small = sample(Server([([1, 2, STOP], 4, "stop")]))
    threads: list[threading.Thread] = []

    def read(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return read_experts(*arguments)

    monkeypatch.setattr("ctpo_megatron.engine.client.read_experts", read)
    monkeypatch.setattr("ctpo_megatron.engine.http.LARGE_CHARACTERS", 1)
    large = sample(Server([([1, 2, STOP], 4, "stop")]))
    assert (large.routed_experts == small.routed_experts).all()
    assert [thread is threading.main_thread() for thread in threads] == [False]


def test_nothing_is_asked_for_where_nothing_is_wanted() -> None:
    server = Server([([STOP], 4, "stop")], top_k=3)
    generation = sample(server, recorded=None)
    assert (generation.routed_experts, generation.top_k) == (None, None)
    assert not {"return_routed_experts", "top_logprobs_num"} & server.asked[0].keys()


def test_an_update_in_flight() -> None:
    """Each answer's record is its own version's; of what older weights sampled, the newer routing is not taken."""
    server = Server([([1, 2], 4, "abort"), ([3, STOP], 5, "stop")])
    generation = sample(server)
    assert generation.versions == [4, 4, 5, 5]
    assert generation.routed_experts[:, 0, 0].tolist() == expected([4, 4, 4, 4, 5, 5])
    assert server.asked[1]["routed_experts_start_len"] == 4

    held_back = Server([([1, 2], 4, "abort"), ([], 4, "abort"), ([3, STOP], 5, "stop")])
    assert sample(held_back).routed_experts[:, 0, 0].tolist() == expected([4, 4, 4, 4, 5, 5])


def test_an_aborted_answer_without_a_record() -> None:
    """The next answer tells of all tokens, but the routing that sampled the earlier ones is lost."""
    generation = sample(Server([([1, 2], 4, "abort"), ([3, STOP], 5, "stop")], silent_at=1))
    assert generation.routed_experts[:, 0, 0].tolist() == expected([5, 5, None, None, 5, 5])


def test_a_server_that_never_reports_is_an_error() -> None:
    with pytest.raises(EngineError, match="--enable-return-routed-experts"):
        sample(Server([([STOP], 4, "stop")], silent_at=1))


@pytest.mark.parametrize(
    ("values", "words"), [([0] * 11, "11 experts; 2 tokens, 3 layers and 2 experts"), ([0] * 11 + [16], "from 0 to 16")]
)
def test_a_record_of_another_model_is_an_error(values: list[int], words: str) -> None:
    text = base64.b64encode(np.array(values, np.int32).tobytes()).decode()
    with pytest.raises(EngineError, match=words):
        read_experts({"routed_experts": text}, SHAPE, 2, "http://server")


def test_top_log_probs() -> None:
    top = sample(Server([([1, 2], 4, "abort"), ([3, STOP], 5, "stop")], top_k=3)).top_k
    assert top.ids.tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [9, 10, 11]]
    assert top.logp[0].tolist() == [-0.5, -1.5, -2.5]
    with pytest.raises(EngineError, match="asked for 3"):
        read_top({"output_top_logprobs": [[[-0.5, 1, None]]]}, 3, 1, "http://server")


def test_supports_come_with_the_log_probs_among_them() -> None:
    """Part by part; each support is one token more than the one that was drawn, the first answer's, and so on."""
    server = Server([([1, 2], 4, "abort"), ([], 4, "abort"), ([3, STOP], 5, "stop")])
    generation = sample(server, truncation=CUT)
    assert generation.supports.counts.tolist() == [2] * 4
    assert generation.supports.rows(3).tolist() == [[1, 2, -1], [2, 3, -1], [3, 4, -1], [9, 10, -1]]
    assert generation.rollout_logp == [-0.25] * 4
    sampling = server.asked[0]["sampling_params"]
    assert (sampling["top_p"], sampling["top_k"], sampling["min_p"]) == (0.9, 20, 0.0)
    assert server.asked[0]["return_sampling_mask"]


def test_without_truncation_or_without_a_record_no_supports_are_asked_for() -> None:
    for options in ({"truncation": WHOLE}, {"truncation": CUT, "recorded": None}):
        server = Server([([1, STOP], 4, "stop")])
        generation = sample(server, **options)
        assert (generation.supports, generation.rollout_logp) == (None, [-0.5] * 2)
        assert "return_sampling_mask" not in server.asked[0]


def test_requests_leave_no_default_to_the_server() -> None:
    server = Server([([STOP], 4, "stop")])
    sample(server)
    sampling = server.asked[0]["sampling_params"]
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0}
    assert not {"stop", "stop_regex", "n", "logit_bias"} & sampling.keys()  # a stop string would end a turn within a token
    assert sampling.items() >= (neutral | {"presence_penalty": 0.0, "min_new_tokens": 0, "temperature": 1.0}).items()


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, "0 supports and 0 log-probs among these for 2 tokens"),
        ({"output_token_sampling_mask": [[1], [2]], "output_token_sampling_logprobs": [0.0]}, "2 supports and 1 log-probs"),
        ({"output_token_sampling_mask": [[1], [3]], "output_token_sampling_logprobs": [0.0, 0.0]}, "token 2, which is not in"),
    ],
)
def test_supports_that_do_not_fit_are_an_error(meta: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        read_supports(meta, [1, 2], "http://server")


def test_large_models_need_two_bytes() -> None:
    assert RoutingShape(2, (0, 1), 128, 8).unknown(1).dtype == np.int8
    assert RoutingShape(2, (0, 1), 129, 8).unknown(1).dtype == np.int16


# ---- over several turns, to the trainer


class Chat:
    stop_token_ids = [STOP]  # noqa: RUF012

    def prompt_ids(self, messages: Any) -> list[int]:
        return [5, 6, 7]

    def tool_ids(self, text: str, *, earlier: Any = (), end: int | None = None) -> list[int]:
        return [20, 21]

    def decode(self, ids: Any, *, special: bool = False) -> str:
        return "```python\nx\n```" if 1 in ids else "an answer"


class Tool:
    async def run(self, code: str) -> Any:
        from ctpo_megatron.rollout.protocols import ToolResult

        return ToolResult("said", ok=True, seconds=0.0)


class Worth:
    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        return Score(1.0)


PROMPT = Prompt(0, ({"role": "user", "content": "q"},), "a")


def played(truncation: Truncation = WHOLE) -> Trajectory:
    """Two turns with a tool's text between them, the second at a newer version."""
    server = Server([([1, STOP], 4, "stop"), ([2, 3, STOP], 5, "stop")], top_k=2)
    environment = ToolEnvironment(server, Chat(), Tool(), Worth())
    sampling = Sampling(1.0, 3, 50, record=True, truncation=truncation)
    trajectory = asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 0, sampling))
    assert [body["routed_experts_start_len"] for body in server.asked] == [0, 4]
    return trajectory


def test_every_input_of_a_trajectory_has_its_experts() -> None:
    """The tool's text, and the token that ended the turn before it, come with the next request."""
    trajectory = played()
    assert trajectory.routed_experts[:, 0, 0].tolist() == expected([4, 4, 4, 4, 5, 5, 5, 5, 5])
    (sample_,) = build_samples(TrajectoryGroup(PROMPT, [trajectory], id=GROUP), [1.0], 0)
    assert len(sample_.routed_experts) == len(sample_) == 9
    for t, wrote in enumerate(sample_.mask):
        assert (sample_.top_k.ids[t, 0] == sample_.labels[t]) == wrote
        assert np.isfinite(sample_.top_k.logp[t]).all() == wrote
    trajectory.routed_experts = trajectory.routed_experts[:-1]
    with pytest.raises(ValueError, match="differ in length"):
        build_samples(TrajectoryGroup(PROMPT, [trajectory], id=GROUP), [1.0], 0)


def test_every_label_of_a_trajectory_has_its_support() -> None:
    """Also in the pack, and in each context-parallel part of it; what the tool wrote and padding have none."""
    group = TrajectoryGroup(PROMPT, [played(CUT), played(CUT)], id=GROUP)
    first, second = build_samples(group, [1.0, 1.0], 0)
    assert first.supports.counts.tolist() == [2 * wrote for wrote in first.mask]
    ((whole,),) = pack([first, replace(second, supports=None)], dp=1, max_tokens=200, cp=2)
    for rank in range(2):
        tokens = whole.shard(rank, 2).tokens
        told = tokens.support_ids[:, 0] >= 0
        assert torch.equal(tokens.support_ids[told, 0], tokens.labels[told].int())
        assert torch.equal(tokens.support_ids[told, 1], tokens.labels[told].int() + 1)
    of_first = whole.tokens.support_ids[: len(first), 0] >= 0
    assert of_first.tolist() == first.mask
    assert not (whole.tokens.support_ids[len(first) :] >= 0).any()
    assert all("supports" not in turn for turn in as_row(PROMPT, played(CUT))["turns"])
    ((bare,),) = pack([build_samples(TrajectoryGroup(PROMPT, [played()], id=GROUP), [1.0], 0)[0]], dp=1, max_tokens=200)
    assert bare.tokens.support_ids is None


def test_what_is_written_down() -> None:
    trajectory = played()
    trajectory.routed_experts[:3] = -1
    metrics = rollout_metrics([TrajectoryGroup(PROMPT, [trajectory], id=GROUP)], 5)
    assert metrics["routing/replayed"] == pytest.approx(6 / 9)
    trajectory.routed_experts = None
    assert "routing/replayed" not in rollout_metrics([TrajectoryGroup(PROMPT, [trajectory], id=GROUP)], 5)
    trajectory.terms, other = {"answer": 1.0, "style": 0.5}, played()
    other.terms = {"answer": 0.5}
    metrics = rollout_metrics([TrajectoryGroup(PROMPT, [trajectory, other], id=GROUP)], 5)
    require_known(metrics)
    assert {name: value for name, value in metrics.items() if "term" in name} == {
        "reward/term/answer": 0.75,
        "reward/term/style": 0.5,  # of the one that has it
    }
    row = as_row(PROMPT, played())
    assert "routed_experts" not in row
    assert [turn.keys() for turn in row["turns"]] == [{"role", "token_ids", "rollout_logp", "versions"}] * 3
    metrics = train_metrics({"moe/load_entropy/layer_1": Mean(0.5), "moe/load_entropy/layer_2": Mean(0.75)})
    assert load_histograms(metrics) == {"moe/load_entropy": ([0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 0.75])}


@pytest.mark.parametrize(("cp", "tp", "stages"), [(1, 1, [(0, 1)]), (2, 1, [(0, 1)]), (1, 2, [(0,), (1,)]), (2, 2, [(1,), (0,)])])
def test_all_seats_together_hold_every_entry_once(cp: int, tp: int, stages: list[tuple[int, ...]]) -> None:
    samples = build_samples(TrajectoryGroup(PROMPT, [played() for _ in range(3)], id=GROUP), [1.0, 1.0, 1.0], 0)
    ((whole,),) = pack(samples, dp=1, max_tokens=200, cp=cp, tp=tp)
    padding = whole.replay.routed_experts[:, 0, 0] == -1
    assert len(whole.replay.routed_experts) == whole.positions
    assert int((~padding).sum()) == 27
    assert not (whole.tokens.mask & padding).any()
    assert torch.equal(whole.tokens.top_k_logp.isfinite().all(1), whole.tokens.mask)
    entries = torch.arange(whole.replay.routed_experts.numel()).view(whole.replay.routed_experts.shape)
    found = []
    for c in range(cp):
        local = whole.shard(c, cp)
        assert torch.equal(local.tokens.top_k_ids[local.tokens.mask][:, 0], local.tokens.labels[local.tokens.mask].int())
        for layers in stages:
            where = [RankCoords(cp_rank=c, cp_size=cp, tp_rank=t, tp_size=tp, expert_layers=layers) for t in range(tp)]
            parts = [own_experts(entries, whole.sequences.cu_seqlens, coords) for coords in where]
            assert {part.shape for part in parts} == {(whole.positions // (cp * tp), len(layers), 2)}
            found += parts
            coords = RankCoords(cp_rank=c, cp_size=cp, expert_layers=layers)
            of_stage = whole.replay.for_rank(coords, whole.sequences.cu_seqlens)
            cut = zigzag_shard(whole.replay.routed_experts, whole.sequences.cu_seqlens, c, cp)
            assert torch.equal(of_stage.routed_experts, cut[:, list(layers)])
            assert of_stage.for_rank(coords, whole.sequences.cu_seqlens) is of_stage
            with pytest.raises(ValueError, match="is that of the rank at"):
                of_stage.for_rank(replace(coords, tp_size=8), whole.sequences.cu_seqlens)
    assert torch.equal(torch.cat([part.flatten() for part in found]).sort().values, entries.flatten())


def test_samples_with_and_without_a_record_go_into_one_pack() -> None:
    first, second = (build_samples(TrajectoryGroup(PROMPT, [played()], id=GROUP), [1.0], 0)[0] for _ in range(2))
    second = type(second)(**{**{name: getattr(second, name) for name in second.__slots__}, "routed_experts": None, "top_k": None})
    ((whole,),) = pack([first, second], dp=1, max_tokens=200)
    known = whole.replay.routed_experts[:, 0, 0] >= 0
    assert known.tolist() == [True] * 9 + [False] * 9
    assert pack([second], dp=1, max_tokens=200)[0][0].replay is None
    assert TopK.unused(2, 3).logp.tolist() == [[-np.inf] * 3] * 2
