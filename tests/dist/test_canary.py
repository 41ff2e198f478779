"""The canary and the drift alarm in bfloat16: 100 healthy publications pass, and what is stale does not.

The trainer is megatron's portable model on one rank, the engine is transformers: two computations of the same weights that round
differently, as trainer and server do on GPUs. docs/gpu.md has the numbers, beside those that others have published.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import MismatchError, WeightSyncError
from ctpo_megatron.mcore.old_policy import check_drift
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.record.values import Max, Mean
from ctpo_megatron.weights.proof.attest import compare
from ctpo_megatron.weights.proof.canary import Gap, canary_batch, canary_gap, canary_tokens, canary_tolerance, check_canary
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from tests.support.ranks import run_ranks
from tests.support.stand_in import EXPERTS, VOCAB, StandIn, Weights, write_stand_in

pytestmark = [pytest.mark.dist, pytest.mark.long]

VERSIONS = 100
LR = 2e-5  # moves log-probs by about as much in one version as a step of reinforcement learning does
# mean differences published of healthy runs, of mixtures with replayed experts (docs/gpu.md); no less than of dense models
PUBLISHED = {"dense": (0.011, 0.036), "mixture": (0.011, 0.139)}
LAYER, EXPERT = "model.layers.1.", "model.layers.1.mlp.experts.3."
BEHIND = (1, 2, 4, 8, 16, 32)


@pytest.fixture(scope="module", params=["dense", "mixture"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    mixture = request.param == "mixture"
    directory = write_stand_in(tmp_path_factory.mktemp(request.param), mixture=mixture)
    (found,) = run_ranks(1, publications, directory, VERSIONS)
    return found | {"mixture": mixture}


def alarms(run: dict[str, Any], gaps: list[Gap]) -> bool:
    """Whether drift.mean's default ends a run whose tokens differ by these on average."""
    bounds = DriftConfig().bounds("bfloat16", mixture=run["mixture"])
    mean, largest = fmean(gap.mean for gap in gaps), max(gap.largest for gap in gaps)
    try:
        check_drift({"drift/mean": Mean(mean * bounds.tokens, float(bounds.tokens)), "drift/max": Max(largest)}, bounds, 1)
    except MismatchError:
        return True
    return False


def refused(run: dict[str, Any], way: str, gaps: list[Gap]) -> bool:
    """Whether the canary's default bound refuses one of these publications."""
    tolerance = canary_tolerance("bfloat16", mixture=run["mixture"], replayed=way == "replayed")
    try:
        for gap in gaps:
            check_canary("http://server", 1, gap, tolerance)
    except WeightSyncError:
        return True
    return False


def ways(rows: list[dict[str, Gap]]) -> dict[str, list[Gap]]:
    return {way: [row[way] for row in rows] for way in rows[0]}


def sharpest(run: dict[str, Any]) -> str:
    return "replayed" if run["mixture"] else "natural"


def test_healthy_publications_pass(run: dict[str, Any]) -> None:
    for way, gaps in ways(run["healthy"]).items():
        assert len(gaps) == VERSIONS
        assert not refused(run, way, gaps), way
        for at in range(0, VERSIONS, 20):
            assert not alarms(run, gaps[at : at + 20]), way


def test_the_stand_in_disagrees_as_large_models_do(run: dict[str, Any]) -> None:
    low, high = PUBLISHED["mixture" if run["mixture"] else "dense"]
    assert low < fmean(gap.mean for gap in ways(run["healthy"])[sharpest(run)]) < high
    assert 0.005 < fmean(run["moved"]) < 0.1, "a version is no step of reinforcement learning"


def test_the_largest_difference_is_a_routers_near_tie(run: dict[str, Any]) -> None:
    """It is why the mean is judged: with the experts replayed it is gone, and the mean is almost the same."""
    natural, sharp = (ways(run["healthy"])[way] for way in ("natural", sharpest(run)))
    assert max(gap.largest for gap in sharp) < 0.5
    assert fmean(gap.mean for gap in natural) < 2 * fmean(gap.mean for gap in sharp)
    if run["mixture"]:
        assert max(gap.largest for gap in natural) > 2 * max(gap.largest for gap in sharp)


def test_digests_name_what_is_one_version_behind(run: dict[str, Any]) -> None:
    """All of it, a layer, an expert: exactly the engine's tensors that differ, however little a step moves them."""
    for part, (named, stale) in run["digests"].items():
        assert named == stale, part
        assert bool(stale) == (run["mixture"] or part != EXPERT), part


def test_what_was_gathered_wrongly_is_caught(run: dict[str, Any]) -> None:
    """Both ends agree about its digests. Within four publications, as each has another prompt."""
    for fault, rows in run["faults"].items():
        assert refused(run, sharpest(run), ways(rows)[sharpest(run)]), fault
        for way, gaps in ways(rows).items():
            assert alarms(run, gaps), f"{fault}, {way}"


def test_servers_that_fall_behind_are_caught(run: dict[str, Any]) -> None:
    """One version less is within rounding here, and is the digests' business; log-probs see it when the distance has grown."""
    behind = {count: ways(rows) for count, rows in run["behind"].items()}
    for gaps in behind[32 if run["mixture"] else 8].values():
        assert alarms(run, gaps)
    assert refused(run, sharpest(run), behind[32][sharpest(run)])


def _next_expert(name: str) -> str:
    """The tensor of the next expert, in LAYER; other tensors stay what they are."""
    found = re.fullmatch(rf"({re.escape(LAYER)}mlp\.experts\.)(\d+)(\..*)", name)
    return f"{found[1]}{(int(found[2]) + 1) % EXPERTS['num_experts']}{found[3]}" if found else name


def publications(rank: RankInfo, directory: Path, versions: int) -> dict[str, Any]:
    """Gaps of the canary at every version and of planted faults at the last one, and what digests say about these."""
    trial = Trial(rank, directory)
    healthy = [trial.advance() for _ in range(versions)]
    found = {"healthy": healthy, "faults": trial.faults(), "behind": trial.behind(), "digests": trial.digests()}
    found["moved"] = trial.moved
    trial.trainer.close()
    return found


class Trial:
    """A trainer whose weights move, the engine that gets them, and the versions that were sent."""

    def __init__(self, rank: RankInfo, directory: Path) -> None:
        optimizer = OptimizerConfig(lr=LR, weight_decay=0.0, warmup_steps=0)
        self.trainer = TrainerRank(
            str(directory), ParallelConfig(), optimizer, rank, device="cpu", dtype="bfloat16", seed=1, total_steps=10**6
        )
        self._engine = StandIn(directory)
        self._layout = EngineLayout(read_hf_config(str(directory)), 1, cpu=True)
        self._texts = self._engine.write(16, 96, seed=1)
        self._sent = [self._gathered()]
        self.moved: list[float] = []  # mean change of the trainer's log-probs by one version, of every tenth

    def _gathered(self) -> Weights:
        return {name: tensor.clone() for bucket in self.trainer.stream(2**26) for name, tensor in bucket}

    def advance(self) -> dict[str, Gap]:
        """One step of training, one publication, one canary."""
        version = len(self._sent)
        tokens = canary_tokens(VOCAB, version, self._texts)
        before = self._trainer_logp(tokens, None) if version % 10 == 0 else None
        self._train(version)
        if before is not None:
            self.moved.append(canary_gap(before, self._trainer_logp(tokens, None)).mean)
        self._sent.append(self._gathered())
        return self._gaps(self._sent[-1], tokens)

    def _train(self, version: int) -> None:
        """A step of policy gradient: half of the texts are rewarded."""
        number = version % len(self._texts)
        batch = canary_batch(self._texts[number][:64], 2)
        advantage = 1.0 if number % 2 else -1.0

        def share(logp: torch.Tensor, mb: Any, _scan: Any) -> tuple[torch.Tensor, Stats]:
            picked = torch.where(mb.tokens.mask, logp, 0.0)
            return -advantage * picked.sum() / 63, Stats()

        self.trainer.train_step(self.trainer.place([batch]), share, 1.0)

    def _gaps(self, held: Weights, tokens: list[int]) -> dict[str, Gap]:
        """Of the trainer to an engine that holds these weights: with the engine's experts, where there are any, and without."""
        self._engine.load(held)
        logp, experts = self._engine.read(tokens)
        found = {"natural": canary_gap(self._trainer_logp(tokens, None), logp)}
        if experts is not None:
            found["replayed"] = canary_gap(self._trainer_logp(tokens, experts), logp)
        return found

    def _trainer_logp(self, tokens: list[int], experts: np.ndarray | None) -> list[float]:
        (logp,) = self.trainer.logp(self.trainer.place([canary_batch(tokens, 2, experts)]), 1.0)
        return logp[: len(tokens) - 1].tolist()

    def _judged(self, held: Weights) -> list[dict[str, Gap]]:
        """By some prompts, as one alone may pass by chance."""
        return [self._gaps(held, canary_tokens(VOCAB, 1000 + number, self._texts)) for number in range(4)]

    def _mixed(self, old: Weights, prefix: str) -> Weights:
        """The newest weights, those with this prefix from `old`."""
        return {name: (old if name.startswith(prefix) else self._sent[-1])[name] for name in self._sent[-1]}

    def faults(self) -> dict[str, list[dict[str, Gap]]]:
        """Of engines whose weights were gathered wrongly, which digests cannot see, as both ends agree."""
        now, first = self._sent[-1], self._sent[0]
        norm = f"{LAYER}input_layernorm.weight"
        planted: dict[str, Weights] = {
            "never updated": first,
            "a layer never updated": self._mixed(first, LAYER),
            "a norm left at 1": {**now, norm: torch.ones_like(now[norm])},
        }
        if any(name.startswith(EXPERT) for name in now):
            planted["a layer's experts each in the next one's place"] = {name: now[_next_expert(name)] for name in now}
        return {name: self._judged(held) for name, held in planted.items()}

    def behind(self) -> dict[int, list[dict[str, Gap]]]:
        """Of engines that hold a version from so many ago."""
        return {count: self._judged(self._sent[-1 - count]) for count in BEHIND}

    def digests(self) -> dict[str, tuple[set[str], set[str]]]:
        """Engine tensors that digests name, and those that are stale, for engines that are one version behind in a part."""
        found = {}
        for part in ("", LAYER, EXPERT):
            held = self._mixed(self._sent[-2], part)
            stale = [name for name in held if not torch.equal(held[name], self._sent[-1][name])]
            named = compare(self._layout, self._expected(self._sent[-1]), self._expected(held))
            places = {place.tensor for name in stale for place in self._layout.placements(name)}
            found[part] = ({each.tensor for each in named}, places)
        return found

    def _expected(self, weights: Weights) -> Any:
        account = ExpectedDigests(self._layout)
        account.add(list(weights.items()))
        return account.digests()
