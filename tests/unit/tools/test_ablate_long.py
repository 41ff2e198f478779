"""The long ablation: its task and loss against slow readings, its runs by seed, its sweep without repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablate_long
import ablate_long_report as tables
import ablate_long_run
import gradient_variance as gv
import pytest
import torch
import typer
from ablate_long_probe import probe
from ablate_long_run import Job, Rollouts, Size, batch_loss, make_cold_start, rollouts, run
from ablate_long_world import BLOCK, MOVES, STATES, VOCABULARY, ColdStart, Policy, Recurrence, World, length_of, state_places

from ctpo_megatron.algorithms import make_recipe, recipe_loss
from tests.support import oracles

TINY = Size(
    blocks=1,
    groups=8,
    samples=4,
    batches=2,
    optimizer_steps=4,
    evaluation=64,
    probes=(1,),
    cold=ColdStart(width=24, blocks=1, batch=64, rate=1e-2, check=10, goal=0.06),
)
UNTAUGHT = replace(TINY, cold=replace(TINY.cold, goal=0.0))
METHODS = ablate_long.methods_for(length_of(TINY.blocks))


# ---- the task


def slow_reward(world: World, prompt: list[int], written: list[int]) -> float:
    state, kinds = prompt[0] - MOVES, "s" + ("m" * BLOCK + "s") * ((len(written) - 1) // (BLOCK + 1))
    for token in prompt[1:]:
        state = int(world.after[token, state])
    for token, kind in zip(written, kinds, strict=True):
        if (kind == "s") != (token >= MOVES) or (kind == "s" and token - MOVES != state):
            return 0.0
        if kind == "m":
            state = int(world.after[token, state])
    return 1.0


def test_rewards_against_a_walk_through_the_machine() -> None:
    world, generator = World.drawn(5), torch.Generator().manual_seed(5)
    prompts, written = world.demonstrations(200, 2, generator)
    assert world.rewards(prompts, written).all()
    noise = torch.randint(VOCABULARY, written.shape, generator=generator)
    spoiled = torch.where(torch.rand(written.shape, generator=generator) < 0.1, noise, written)
    found = world.rewards(prompts, spoiled)
    assert 0 < found.sum() < 150
    assert found.tolist() == [slow_reward(world, p, w) for p, w in zip(prompts.tolist(), spoiled.tolist(), strict=True)]


def test_the_first_written_state_decides() -> None:
    """Who goes on faultlessly from a wrong first state has no reward."""
    world, generator = World.drawn(6), torch.Generator().manual_seed(6)
    prompts, written = world.demonstrations(50, 4, generator)
    wrong = (written[:, 0] - MOVES + 1) % STATES
    continued = written.clone()
    continued[:, 0], state = wrong + MOVES, wrong
    for place in range(1, written.shape[1]):
        if state_places(written.shape[1])[place]:
            continued[:, place] = state + MOVES
        else:
            state = world.after[written[:, place], state]
    assert not world.rewards(prompts, continued).any()


def test_samples_are_the_policys() -> None:
    """Log-probs of sampling are those of teacher forcing, and tokens come as often as these say."""
    policy = Policy(16, 3)
    prompts = World.drawn(3).prompts(1, torch.Generator().manual_seed(3)).expand(4000, -1)
    written, logp = policy.sample(prompts, 5, torch.Generator().manual_seed(4))
    torch.testing.assert_close(logp, policy.logp(prompts, written).detach(), rtol=1e-5, atol=1e-5)
    first = torch.softmax(policy.head(policy.hidden(prompts[:1], written[:1]))[0, 0], -1)
    counts = torch.bincount(written[:, 0], minlength=VOCABULARY) / 4000
    assert (counts - first).abs().max() < 5 * math.sqrt(0.25 / 4000)
    assert first.max() - first.min() > 0.05  # something to tell


def test_the_recurrence_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs, weight, grad = (torch.randn(shape, generator=generator) for shape in ((9, 3, 5), (5, 5), (9, 3, 5)))
    net = torch.nn.RNN(5, 5, bias=False)
    net.load_state_dict({"weight_ih_l0": torch.eye(5), "weight_hh_l0": weight})
    inputs.requires_grad_()
    want = torch.autograd.grad(net(inputs)[0], [inputs, net.weight_hh_l0], grad)
    weight.requires_grad_()
    got = torch.autograd.grad(Recurrence.apply(inputs, weight), [inputs, weight], grad)
    torch.testing.assert_close(got, want)


# ---- a run


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cold") / "cold-1.pt"
    make_cold_start(1, TINY, file)
    return file


def drawn(cold: Path, seed: int = 2) -> tuple[Policy, Rollouts]:
    """A policy that has moved on from the one that sampled, and what that one sampled, with advantages that differ."""
    policy = ablate_long_run.load(cold, TINY)
    batch = rollouts(World.drawn(1), policy, TINY, torch.Generator().manual_seed(seed))
    batch = batch._replace(advantages=torch.randn(len(batch.rewards), generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return policy, batch


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_projects(cold: Path, method: str) -> None:
    """Value and gradient of what a run descends, against the scalar readings of the definitions."""
    assert ablate_long_run.recipe_loss is recipe_loss
    policy, batch = drawn(cold)
    recipe = make_recipe(METHODS[method], "sequence-mean", None, has_rollout=True)
    found = batch_loss(recipe, policy, batch)
    logp = policy.logp(batch.prompts, batch.written)
    options = {key: value for key, value in METHODS[method].items() if key != "type"}
    total, slopes = 0.0, torch.zeros(logp.shape)
    for number, (now, old, advantage) in enumerate(
        zip(logp.tolist(), batch.logp.tolist(), batch.advantages.tolist(), strict=True)
    ):
        count = len(now)
        plain = {"advantage": [advantage] * count, "mask": [True] * count, "restart": [False] * count}
        row = oracles.Row(logp=now, old_logp=old, rollout_logp=old, top_logp=[], top_rollout=[], **plain)
        points = oracles.OBJECTIVES[METHODS[method]["type"]](row, oracles.Decisions(), **options)
        for place, (loss, slope) in points.items():
            total += loss / count / len(batch.rewards)
            slopes[number, place] = slope / count / len(batch.rewards)
    assert found.loss.item() == pytest.approx(total, rel=1e-4, abs=1e-6)
    parameters = list(policy.parameters())
    expected = torch.autograd.grad(logp, parameters, slopes)
    for got, want in zip(torch.autograd.grad(found.loss, parameters), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_a_run_is_the_same_by_seed(cold: Path) -> None:
    def once(method: str, rate: float, purpose: str = "test") -> dict[str, Any]:
        found = run(Job(method, rate, 1, purpose), METHODS[method], TINY, cold)
        assert found.pop("cpu_s") > 0
        return found

    first = once("ctpo", 0.01)
    assert first == once("ctpo", 0.01)
    other = once("grpo", 0.01, "tune")
    assert (first["before"], first["rewards"][0]) == (other["before"], other["rewards"][0])  # what methods share
    assert first["steps"][0]["log_ratio_rms"] != other["steps"][0]["log_ratio_rms"], "each looks at a ratio of its own"
    assert (len(first["probes"]), len(other["probes"]), len(first["rewards"]), first["error"]) == (1, 0, 2, None)


def test_the_first_step_alone_is_on_policy(cold: Path) -> None:
    """One optimizer step: nothing has moved, so no ratio differs from 1. Two: the second is off-policy."""
    ratios = []
    for steps in (1, 2):
        policy, batch = drawn(cold)
        policy = ablate_long_run.load(cold, TINY)
        size = Size(optimizer_steps=steps)
        recipe = make_recipe({"type": "grpo"}, "sequence-mean", None, has_rollout=True)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
        ratios.append(ablate_long_run.train_on(recipe, policy, optimizer, batch, size)["log_ratio_rms"])
    assert ratios[0] < 1e-5
    assert ratios[1] > 1e-3


# ---- the probe


def test_variances_of_the_probe_against_autograd(cold: Path) -> None:
    """Traces of covariances of gradients that autograd makes one by one: of whole trajectories, and of tokens by position."""
    policy, batch = drawn(cold)
    found = probe(policy, batch, TINY.samples)
    logp = policy.logp(batch.prompts, batch.written)
    count, length = logp.shape
    advantages = batch.advantages.repeat_interleave(length)
    lengths = torch.full((count,), length)
    scales = gv.gradient_scales(logp.detach().flatten(), batch.logp.flatten(), advantages, lengths, {"type": "ctpo"})
    tokens = torch.stack([torch.autograd.grad(one, policy.head.weight, retain_graph=True)[0].flatten() for one in logp.flatten()])
    gradients = scales.view(-1, count, length, 1) * tokens.view(count, length, -1)  # [E, N, T, parameters]

    def traces(of: torch.Tensor) -> torch.Tensor:
        return (of - of.mean(1, keepdim=True)).square().sum((1, *range(2, of.dim()))) / (count - 1)

    whole = gradients.sum(2)
    spread = traces(whole)
    assert list(found["relative"].values()) == pytest.approx((spread / spread[0]).tolist(), rel=1e-4)
    signal = whole.mean(1).square().sum(-1) / spread - 1 / count
    assert list(found["signal"].values()) == pytest.approx(signal.tolist(), rel=1e-3, abs=1e-5)
    assert [(each["first"], each["last"]) for each in found["bins"]] == [(1, 1), (2, 3), (4, 5)]
    for each in found["bins"]:
        inside = traces(gradients[:, :, each["first"] - 1 : each["last"]])
        assert list(each["relative"].values()) == pytest.approx((inside / inside[0]).tolist(), rel=1e-4)
        last = (logp.detach() - batch.logp)[:, : each["last"]].sum(1)
        assert each["log_ratio_std"] == pytest.approx(float(last.std()), rel=1e-3)


def test_a_probe_without_advantages_says_so(cold: Path) -> None:
    policy, batch = drawn(cold)
    assert list(probe(policy, batch._replace(advantages=torch.zeros_like(batch.advantages)), TINY.samples)) == ["error"]


# ---- the sweep


class Pool:
    """Stands where processes would be started: everything is done at once, until `most` runs are."""

    most = math.inf

    def __init__(self, workers: int, **_: Any) -> None:
        self.done = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shutdown(self, **_: object) -> None:
        pass

    def submit(self, what: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.done += 1
        if self.done > self.most:
            future.set_exception(KeyboardInterrupt())
        else:
            future.set_result(what(*arguments))
        return future


@pytest.fixture
def small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rate, one tuning seed, everything in this process and in order."""
    for name, value in {"GRID": (-4,), "FARTHEST": 0, "TUNING_SEEDS": (1001,), "ProcessPoolExecutor": Pool}.items():
        monkeypatch.setattr(ablate_long, name, value)
    monkeypatch.setattr(ablate_long, "as_completed", list)


@pytest.mark.usefixtures("small_sweep")
def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {name: METHODS[name] for name in ("ctpo", "reinforce")}
    begun: list[str] = []

    def counted(job: Job, *rest: Any) -> dict[str, Any]:
        begun.append(job.key)
        return run(job, *rest)

    monkeypatch.setattr(ablate_long, "run", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "most", 3)  # two cold starts and one run
        with pytest.raises(KeyboardInterrupt):
            ablate_long.sweep(methods, [1], UNTAUGHT, tmp_path, 1)
    lines = tmp_path / "runs.jsonl"
    assert begun == ["tune ctpo 1.0e-02 1001"]
    with lines.open("a") as file:
        file.write('{"method": "reinfo')  # as an interruption leaves it
    ablate_long.sweep(methods, [1], UNTAUGHT, tmp_path, 1)
    ablate_long.sweep(methods, [1], UNTAUGHT, tmp_path, 1)
    kept = ablate_long.read_lines(lines)
    assert begun == [ablate_long.job_of(line).key for line in kept]
    assert sorted(begun[1:]) == ["test ctpo 1.0e-02 1", "test reinforce 1.0e-02 1", "tune reinforce 1.0e-02 1001"]
    assert "| reinforce" in tables.report(kept, list(methods))
    with pytest.raises(typer.Exit):
        ablate_long.sweep(methods, [1], Size(blocks=4), tmp_path, 1)


def rate(exponent: int) -> float:
    return ablate_long.rate_at(ablate_long.GRID[0] + exponent)


def tuned(method: str, finals: dict[int, float]) -> list[dict[str, Any]]:
    """Lines of tuning, by exponent of the rate less the grid's lowest."""
    return [
        {
            "method": method,
            "rate": rate(e),
            "seed": seed,
            "purpose": "tune",
            "final": reward,
            "rewards": [reward],
            "batches": 1,
        }
        for e, reward in finals.items()
        for seed in ablate_long.TUNING_SEEDS
    ]


@pytest.mark.parametrize(
    ("finals", "exponents"),  # counted from the lowest of the grid's three
    [
        ({}, [0, 1, 2]),
        ({0: 0.1, 1: 0.4}, [0, 1, 2]),  # the grid first
        ({0: 0.1, 1: 0.4, 2: 0.2}, [0, 1, 2]),  # the best is inside
        ({0: 0.1, 1: 0.2, 2: 0.4}, [0, 1, 2, 3]),
        ({0: 0.1, 1: 0.2, 2: 0.4, 3: 0.3}, [0, 1, 2, 3]),
        ({0: 0.3, 1: 0.2, 2: 0.1}, [-1, 0, 1, 2]),
        ({-2: 0.5, -1: 0.4, 0: 0.3, 1: 0.2, 2: 0.1}, [-2, -1, 0, 1, 2]),  # no farther
    ],
)
def test_rates_go_on_beyond_an_edge(finals: dict[int, float], exponents: list[int]) -> None:
    assert ablate_long.rates_of("grpo", tuned("grpo", finals)) == [rate(each) for each in exponents]


def test_test_runs_wait_for_the_rate() -> None:
    lines = tuned("grpo", {0: 0.1, 1: 0.4, 2: 0.2}) + tuned("gspo", {0: 0.1, 1: 0.2, 2: 0.4})
    jobs = ablate_long.wanted(["grpo", "gspo"], [1, 2], lines)
    assert [job for job in jobs if job.purpose == "test"] == [Job("grpo", rate(1), seed, "test") for seed in (1, 2)]
    assert {(job.method, job.rate) for job in jobs if job.purpose == "tune"} == {("gspo", rate(3))}
    assert not set(ablate_long.TUNING_SEEDS) & set(range(1, ablate_long.TEST_SEEDS + 1))


@pytest.mark.parametrize("power", [0, 1])
def test_windows_are_as_wide_as_the_papers_on_average(power: int) -> None:
    found = ablate_long.window(power, 1001)
    for name, base in (("clip_low", 0.025), ("clip_high", 0.05), ("dual_clip", 0.05)):
        own = statistics.fmean(found[name] * place**power for place in range(1, 1002))
        assert own == pytest.approx(statistics.fmean(base * math.sqrt(place) for place in range(1, 1002)))
