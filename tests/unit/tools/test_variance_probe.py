"""The variance probe: its closed forms against slow ones, and the command on a small run that nothing was sampled for."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gradient_variance as gv
import pytest
import torch
from torch import Tensor

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import DataError, InputError, MismatchError, NonFiniteError
from ctpo_megatron.toy.model import make_toy_model

ROOT = Path(__file__).resolve().parents[3]
TEMPERATURE = 0.7
PLAIN = len(gv.ESTIMATORS) - 1  # estimators without clipping


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("variance_probe", ROOT / "tools" / "variance_probe.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---- pure functions


def test_the_kernel_is_that_of_autograd_gradients(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_toy_model(tmp_path, seed=2, hidden=32, layers=1, heads=2, kv_heads=1, ffn=32, init_std=0.3)
    model = AutoModelForCausalLM.from_pretrained(directory).double()
    head = model.get_output_embeddings()
    ids = torch.randint(264, (1, 9), generator=torch.Generator().manual_seed(3))
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1].detach()
    labels = ids[0, 1:]
    logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1] / TEMPERATURE, -1)[torch.arange(8), labels]
    gradients = torch.stack([torch.autograd.grad(one, head.weight, retain_graph=True)[0].flatten() for one in logp])
    expected = gradients @ gradients.T
    assert expected.diagonal().min() > 0.1  # something to compare
    torch.testing.assert_close(gv.gradient_kernel(hidden, labels, head, TEMPERATURE), expected, rtol=1e-10, atol=1e-10)


def test_scales_against_a_loop() -> None:
    new, old, advantages, lengths = streams([3, 1, 5], seed=4, spread=0.2)
    new[2] = old[2] - 30.0  # beyond the bound of a token's log-ratio
    got = gv.gradient_scales(new, old, advantages, lengths, {"type": "ctpo", "dual_clip": 0.07})
    first, clipped_away = 0, 0
    for length in lengths.tolist():
        ratios = [max(min(float(new[t] - old[t]), 20.0), -20.0) for t in range(first, first + length)]
        for n in range(1, length + 1):
            t, total, root = first + n - 1, sum(ratios[:n]), math.sqrt(n)
            advantage = float(advantages[t])
            inside = total <= 0.05 * root if advantage > 0 else -0.025 * root <= total <= 0.07 * root
            clipped_away += not inside
            levels = [ratios[n - 1], total, total / n, sum(ratios)]
            expected = [math.exp(level) * advantage for level in levels] + [math.exp(total) * advantage * inside]
            assert got[:, t].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12), t
        first += length
    assert 0 < clipped_away < 9


def test_equal_policies_give_equal_scales() -> None:
    new, _, advantages, lengths = streams([4, 2], seed=5, spread=0.1)
    scales = gv.gradient_scales(new, new, advantages, lengths, {"type": "ctpo"})
    assert torch.equal(scales, advantages.expand(5, -1))


def test_policies_too_far_apart_are_refused() -> None:
    new, _, advantages, lengths = streams([50], seed=5, spread=0.1)
    with pytest.raises(NonFiniteError, match="reaches 1000"):
        gv.gradient_scales(new, new - 20.0, advantages, lengths, {"type": "ctpo"})


def test_scatter_against_repeated_gradients() -> None:
    generator = torch.Generator().manual_seed(6)
    gradients = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    scales = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    prompt = torch.tensor([0, 0, 1, 1, 1, 2, 3])
    draws = torch.tensor([[1, 1, 1, 1], [0, 3, 0, 1], [0, 0, 1, 0], [2, 0, 1, 1]]).double()
    squares, freedom = gv.scatter(gradients @ gradients.T, scales, prompt, draws)
    for b, counts in enumerate(draws.long().tolist()):
        rows = [i for i, p in enumerate(prompt.tolist()) for _ in range(counts[p])]
        assert freedom[b] == len(rows) - 1
        for e in range(2):
            taken = (scales[e, :, None] * gradients)[rows]
            expected = sum(float(((row - taken.mean(0)) ** 2).sum()) for row in taken)
            assert float(squares[e, b]) == pytest.approx(expected, rel=1e-12, abs=1e-12), (e, b)
    trace = float(torch.cov((scales[0, :, None] * gradients).T).trace())
    assert float(squares[0, 0] / freedom[0]) == pytest.approx(trace, rel=1e-12)


def test_draws_are_seeded_and_whole() -> None:
    draws = gv.bootstrap_draws(40, 300, seed=1)
    assert torch.equal(draws, gv.bootstrap_draws(40, 300, seed=1))
    assert not torch.equal(draws, gv.bootstrap_draws(40, 300, seed=2))
    assert torch.equal(draws[0], torch.ones(40).double())
    assert torch.equal(draws.sum(1), torch.full((301,), 40.0).double())
    assert abs(float(draws[1:].var()) - (1 - 1 / 40)) < 0.05  # a binomial of 40 and 1/40; its standard error here is 0.014


def test_intervals_are_paired_and_leave_out_empty_draws() -> None:
    base = torch.linspace(1.0, 3.0, 101).double()
    variance = torch.stack([torch.cat([base[50:51], base, torch.tensor([math.nan])])] * 5)
    variance[1] *= 2
    found = gv.intervals(variance)
    assert found["variance"]["token"] == pytest.approx({"value": 2.0, "low": 1.05, "high": 2.95})
    assert found["relative"]["cumulative"] == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0})


def test_intervals_of_prompts_are_wider_than_of_trajectories() -> None:
    """Eight copies of each gradient say no more than one: the interval must not shrink."""
    values = torch.randn(30, generator=torch.Generator().manual_seed(7)).double()
    widths = []
    for copies in (1, 8):
        each, prompt = values.repeat_interleave(copies), torch.arange(30).repeat_interleave(copies)
        squares, freedom = gv.scatter(
            each[:, None] * each, torch.ones(5, len(each)).double(), prompt, gv.bootstrap_draws(30, 400, 1)
        )
        row = gv.intervals(squares / freedom)["variance"]["token"]
        widths.append(row["high"] - row["low"])
    assert widths[1] == pytest.approx(widths[0], rel=0.05)  # 29/30 from n - 1; otherwise equal


def test_effective_number() -> None:
    assert gv.effective_number(torch.tensor([2.0, 2.0, 2.0, 0.0])) == 3.0
    assert gv.effective_number(torch.tensor([1.0, 3.0])) == pytest.approx(1.6)


def test_bins() -> None:
    assert gv.position_bins(1, 4) == [gv.Bin(1, 1, [1])]
    assert gv.position_bins(11, 3) == [
        gv.Bin(1, 1, [1]),
        gv.Bin(2, 3, [2, 3]),
        gv.Bin(4, 7, [4, 6, 7]),
        gv.Bin(8, 11, [8, 10, 11]),
    ]
    seen = [t for each in gv.position_bins(1000, 2000) for t in each.positions]
    assert seen == list(range(1, 1001))
    position, prompt = torch.tensor([1, 2, 3, 1, 1, 2, 1, 2]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    assert [gv.last_position(position, prompt, least) for least in (1, 2, 3, 4)] == [3, 2, 2, 0]


def streams(lengths: list[int], *, seed: int, spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probs and advantages of packed trajectories, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    old = -torch.rand(count, generator=generator, dtype=torch.float64) - 0.1
    new = old + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    signs = torch.tensor([1.0 if i % 2 else -0.5 for i in range(len(lengths))]).double()
    sizes = torch.tensor(lengths)
    return new, old, signs.repeat_interleave(sizes), sizes


# ---- the command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps: the policy it began with, the one it ended with, and trajectories of the former."""
    root = tmp_path_factory.mktemp("probe")
    for name, std in (("start", 0.30), ("model", 0.32)):  # the same random directions, a little longer
        make_toy_model(root / name, seed=1, hidden=32, layers=1, heads=2, kv_heads=1, ffn=32, init_std=std)
    config = {"name": "probe", "run_dir": str(root), "model": {"path": str(root / "start")}, "data": {"train": "none"}}
    config |= {"rollout": {"temperature": TEMPERATURE}, "drift": {"max": 1e-4}}
    (root / "config.yaml").write_text(json.dumps(config))
    (root / "summary.json").write_text('{"steps": 4}')
    write_trajectories(root / "trajectories.jsonl", root / "start")
    return root


def write_trajectories(file: Path, model: Path) -> None:
    """Three attempts at twelve prompts: five tokens, a tool's answer, one to three tokens more; log-probs one by one."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(8)
    lines = []
    for prompt in range(12):
        for attempt in range(3):
            parts = [torch.randint(256, (n,), generator=generator).tolist() for n in (3 + prompt % 2, 5, 4, 1 + attempt)]
            ids = [token for part in parts for token in part]
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([ids])).logits[0] / TEMPERATURE
            logp = [0.0, *torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]
            turns, first = [], len(parts[0])
            for role, tokens in zip(("assistant", "tool", "assistant"), parts[1:], strict=True):
                own, there = role == "assistant", slice(first, first + len(tokens))
                logprobs = logp[there] if own else [0.0] * len(tokens)
                turns.append(
                    {"role": role, "token_ids": tokens, "rollout_logp": logprobs, "versions": [0 if own else -1] * len(tokens)}
                )
                first += len(tokens)
            record = {"prompt_index": prompt, "prompt_ids": parts[0], "turns": turns, "reward": float(attempt == prompt % 3)}
            lines.append(json.dumps(record))
    file.write_text("\n".join(lines) + "\n")


def test_positions_count_policy_tokens_only(probe: ModuleType, run_dir: Path) -> None:
    packed = probe.read_trajectories(run_dir / "trajectories.jsonl")
    records = [json.loads(line) for line in (run_dir / "trajectories.jsonl").read_text().splitlines()]
    written = [[t for turn in r["turns"] if turn["role"] == "assistant" for t in turn["token_ids"]] for r in records]
    assert packed.labels.tolist() == [token for tokens in written for token in tokens]
    assert packed.position.tolist() == [n for tokens in written for n in range(1, len(tokens) + 1)]
    assert packed.lengths.tolist() == [6, 7, 8] * 12
    assert packed.prompt.tolist() == [prompt for prompt in range(12) for _ in range(21)]
    assert sorted(set(packed.advantages.round(decimals=3).tolist())) == [-0.577, 1.155]


@pytest.mark.thorough
def test_the_command_on_a_run(probe: ModuleType, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    probe.main(run_dir, [], trajectories=run_dir / "trajectories.jsonl", out=tmp_path)
    result = json.loads((tmp_path / "variance.json").read_text())
    assert (result["target"], result["behaviour"]) == (str(run_dir / "model"), str(run_dir / "start"))
    assert (result["trajectories"], result["prompts"]) == (36, 12)
    assert [(row["first"], row["last"], row["tokens"]) for row in result["bins"]] == [
        (1, 1, 36),
        (2, 3, 72),
        (4, 7, 132),
        (8, 8, 12),
    ]
    first, point = result["bins"][0]["variance"], result["by_position"][0]["variance"]
    assert {name: found["value"] for name, found in first.items()} == pytest.approx(point)
    one, last = result["bins"][0]["relative"], result["bins"][3]["relative"]
    assert one["cumulative"] == one["geometric mean"] == {"value": 1.0, "low": 1.0, "high": 1.0}  # one token: the same ratio
    assert last["cumulative"] == last["full sequence"]  # position 8 is the end of all that have one
    assert last["cumulative"] != last["token"]
    assert_slow_variance(result, run_dir)
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "36 trajectories of 12 held-out prompts" in table
    assert "4-7" in table


def assert_slow_variance(result: dict[str, Any], run_dir: Path) -> None:
    """Position 6, behind the tool's answer, from autograd gradients of single trajectories without padding."""
    from transformers import AutoModelForCausalLM

    policies = [AutoModelForCausalLM.from_pretrained(run_dir / name, dtype=torch.float32) for name in ("model", "start")]
    weights: dict[str, list[Tensor]] = {name: [] for name in gv.ESTIMATORS[:PLAIN]}
    for line in (run_dir / "trajectories.jsonl").read_text().splitlines():
        record = json.loads(line)
        advantage = 1.1547 if record["reward"] else -0.57735
        ids, places = list(record["prompt_ids"]), []
        for turn in record["turns"]:
            places += [len(ids) + i for i in range(len(turn["token_ids"])) if turn["role"] == "assistant"]
            ids += turn["token_ids"]
        new, old = (
            torch.log_softmax(policy(input_ids=torch.tensor([ids])).logits[0].double() / TEMPERATURE, -1)[:-1].gather(
                1, torch.tensor(ids[1:])[:, None]
            )[:, 0][[place - 1 for place in places]]
            for policy in policies
        )
        (gradient,) = torch.autograd.grad(new[5], policies[0].get_output_embeddings().weight, retain_graph=True)
        ratio = (new - old).detach()
        for name, level in zip(weights, (ratio[5], ratio[:6].sum(), ratio[:6].mean(), ratio.sum()), strict=True):
            weights[name].append(gradient.double() * advantage * level.exp())
    assert {len(gradients) for gradients in weights.values()} == {36}
    got = next(point for point in result["by_position"] if point["position"] == 6)
    for name, gradients in weights.items():
        stacked = torch.stack(gradients)
        expected = float((stacked - stacked.mean(0)).square().sum() / 35)
        assert got["variance"][name] == pytest.approx(expected, rel=1e-4), name


def test_trajectories_of_another_policy_are_refused(probe: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    packed = probe.read_trajectories(run_dir / "trajectories.jsonl")
    config = load_config(run_dir / "config.yaml")
    right, wrong = (probe.read_policy(run_dir / name, packed, TEMPERATURE).logp for name in ("start", "model"))
    assert probe.check_behaviour(packed.engine_logp, right, config)["max"] < 1e-4
    with pytest.raises(MismatchError, match=r"drift.max allows 0.0001"):
        probe.check_behaviour(packed.engine_logp, wrong, config)
    with pytest.raises(MismatchError, match="nan"):
        probe.check_behaviour(packed.engine_logp * math.nan, right, config)


def test_hidden_states_of_the_wanted_tokens(probe: ModuleType, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the trajectories are cut into forward passes."""
    packed = probe.read_trajectories(run_dir / "trajectories.jsonl")
    keep = packed.position % 3 == 1
    whole = probe.read_policy(run_dir / "model", packed, TEMPERATURE, torch.ones_like(keep))
    monkeypatch.setattr(probe, "FORWARD_TOKENS", 40)
    monkeypatch.setattr(probe, "LOGITS", 264 * 5)
    some = probe.read_policy(run_dir / "model", packed, TEMPERATURE, keep)
    torch.testing.assert_close(some.logp, whole.logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(some.hidden, whole.hidden[keep], rtol=0, atol=1e-5)


def test_which_policies_are_compared(probe: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((run_dir / "config.yaml").read_text())

    def pair(source: Path, behaviour: Path | None = None) -> tuple[Path, Path]:
        found = probe.find_policies(source, behaviour, [])
        return found.target, found.behaviour

    with pytest.raises(InputError, match="no older policy"):
        pair(run)
    steps = [run / "checkpoints" / f"step_{step:08d}" for step in (2, 4, 6)]
    for step in steps:
        step.mkdir(parents=True)
        (step / "checkpoint.json").write_text("{}")
    (run / "checkpoints" / "step_00000008").mkdir()  # never finished
    assert pair(run) == (steps[2], steps[1])
    assert pair(steps[0]) == (steps[0], run_dir / "start")
    assert pair(steps[2], steps[0]) == (steps[2], steps[0])
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    (run / "summary.json").write_text('{"steps": 6}')
    for source in (run, run / "model", steps[2]):  # the same weights, and no export is needed
        assert pair(source) == (run / "model", steps[1])
    with pytest.raises(InputError, match=r"not a policy of this run; it has .*step_00000002"):
        pair(run / "checkpoints" / "step_00000008")
    with pytest.raises(InputError, match="neither a run"):
        pair(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:6], "2 prompts"),
        (lambda records: records[::3], "1 attempts at one"),
        (lambda records: [{**record, "reward": 1.0} for record in records], "every gradient is zero"),
        (lambda records: [{"prompt": 1}], "not a file of trajectories"),
    ],
)
def test_trajectories_that_cannot_be_used(probe: ModuleType, run_dir: Path, tmp_path: Path, change: Any, message: str) -> None:
    records = [json.loads(line) for line in (run_dir / "trajectories.jsonl").read_text().splitlines()]
    file = tmp_path / "changed.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in change(records)))
    with pytest.raises(DataError, match=message):
        probe.read_trajectories(file)
