"""Two optimizer steps of an objective at a layout, on the same sequences in the same packs, and how far two layouts are apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ctpo_megatron.algorithms import sequence_weights
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.types import Supports, TrainSample
from tests.support.engine_faults import Fault
from tests.support.numbers import flat
from tests.support.ranks import at_own_port
from tests.support.tiny import VOCAB

TEMPERATURE = 0.7
TOLERANCE = 1e-5
STATISTICS_TOLERANCE = 2e-4  # they are sums over 190 tokens, whose log-probs agree to 1e-6
# Of gradients behind an optimizer step. CTPO's ratios are products over a sequence, so rounding grows a hundredfold there: where
# another library multiplies, one rank's own first norms change by 2e-7 at most, its second ones by up to 8e-6.
LATER_NORM_TOLERANCE = 3e-5
COUNTS = "health/density"  # tokens by buckets of their log-ratios, which agree to 1e-6: those at a border may be on either side
AT_BORDERS = 2.0  # tokens of a step, of 380
LAYERS = 4
# A large eps keeps AdamW smooth: with the usual one an entry whose gradient is rounding noise moves by a full lr. Clipping stays
# idle, since its factor, a norm summed in another order, would touch every bit of the weights; test_engine.py has it at work.
OPTIMIZER = OptimizerConfig(lr=2e-3, eps=0.1, weight_decay=0.1, clip_grad=1e3)
# bounds so wide that the second step, after a first one that shows in every weight, still has tokens within them
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ctpo": {"type": "ctpo", "clip_low": 0.3, "clip_high": 0.6, "dual_clip": 0.6},
    "grpo": {"type": "grpo", "clip_low": 0.5, "clip_high": 1.0},
    "gspo": {"type": "gspo", "clip_low": 0.2, "clip_high": 0.2},
}
SEQUENCES = 12
BOTH = (0, 1)  # halves of the cases
FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")


class Layout(NamedTuple):
    """How the ranks are used, and for which of the models."""

    name: str
    sizes: dict[str, int]
    families: tuple[str, ...] = ("qwen3", "qwen3_moe", "deepseek_v3")

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(**self.sizes)


class Case(NamedTuple):
    """What is trained on: `packs` micro-batches over all data-parallel ranks."""

    objective: str
    packed: bool  # SEQUENCES over the packs; else one sequence in each
    packs: int
    replay: bool = False  # experts follow a routing that was drawn at random
    truncated: bool = False  # log-probs are those among a few words at each place


class Found(NamedTuple):
    """What training gave. `weights` is empty on all ranks but the first."""

    steps: list[dict[str, float]]
    weights: dict[str, NDArray[np.float32]]


class Alone(NamedTuple):
    """What one rank gave."""

    samples: list[TrainSample]
    before: dict[str, NDArray[np.float32]]  # the model directory's weights
    found: dict[Case, Found]


MOE = ("qwen3_moe", "deepseek_v3")
TWO_RANKS = [
    Layout("DP2", {"dp": 2}),
    Layout("TP2", {"tp": 2}),
    Layout("PP2", {"pp": 2}),
    Layout("VPP", {"pp": 2, "vpp": 2}),
    Layout("PP2 of 3+1 layers", {"pp": 2, "first_stage_layers": 3}),
    Layout("CP2", {"cp": 2}),
    Layout("EP2", {"dp": 2, "ep": 2}, MOE),
    Layout("EP2 CP2", {"cp": 2, "ep": 2}, MOE),
    Layout("ETP2", {"tp": 2, "etp": 2}, MOE),
]
FOUR_RANKS = [
    Layout("CP4", {"cp": 4}),
    Layout("TP2 PP2", {"tp": 2, "pp": 2}),
    Layout("TP2 CP2", {"tp": 2, "cp": 2}),
    Layout("CP2 PP2", {"cp": 2, "pp": 2}),
    Layout("EP4", {"tp": 2, "dp": 2, "ep": 4}, MOE),
    Layout("EP2 PP2", {"pp": 2, "dp": 2, "ep": 2}, MOE),
    Layout("EP2 ETP2", {"tp": 2, "dp": 2, "ep": 2, "etp": 2}, MOE),
]


def cases_of(layout: Layout, family: str, halves: Sequence[int] = BOTH) -> list[Case]:
    """Every objective in every combination of packing and micro-batches, of qwen3_moe also a replayed routing, of qwen3 also
    truncated sampling; of them the `halves` of `half_of`.

    deepseek_v3, which is there for its parts, has one case packed and one not, with ratios that do not run away with its weights.
    Interleaving takes multiples of pp.
    """
    few, many = (n * layout.parallel.dp for n in ((1, 3) if layout.parallel.vpp == 1 else (2, 4)))
    if family == "deepseek_v3":
        return [Case("grpo", True, many), Case("gspo", False, many)] if 0 in halves else []
    cases = [Case(objective, packed, packs) for objective in OBJECTIVES for packed in (True, False) for packs in (few, many)]
    replay = family == "qwen3_moe"
    cases.append(Case("ctpo", True, many, replay=replay, truncated=not replay))
    return [case for case in cases if half_of(case, many) in halves]


def half_of(case: Case, many: int) -> int:
    """0 or 1. In each half every two of objective, packing and number of micro-batches meet; what is special is in the first."""
    if case.replay or case.truncated:
        return 0
    return (list(OBJECTIVES).index(case.objective) + case.packed + (case.packs == many)) % 2


def all_cases(layouts: Sequence[Layout], halves: Sequence[int] = BOTH) -> dict[str, list[Case]]:
    """Of each family, what one rank trains on to be compared with `layouts`."""
    return {family: sorted({case for layout in layouts for case in cases_of(layout, family, halves)}) for family in FAMILIES}


def fault_case(layout: Layout, family: str) -> Case:
    """The case that faults are planted in: many packs of many sequences, and for experts the one that replays routes."""
    candidates = [case for case in cases_of(layout, family) if case.objective == "ctpo" and case.packed and not case.truncated]
    return max(candidates, key=lambda case: (case.replay, case.packs))


def engines_of(layouts: list[Layout], halves: Sequence[int] = BOTH) -> list[tuple[Layout, str]]:
    """The engines that are built, one after the other: of those families that have cases."""
    return [(layout, family) for layout in layouts for family in layout.families if cases_of(layout, family, halves)]


def draw_samples(logp: Sequence[Sequence[float]] | None = None) -> list[TrainSample]:
    """Sequences with a prompt and a gap that a tool wrote; the rollout policy is near `logp`, where that is given.

    Each token comes with a routing for 4 experts of which 2 are chosen, and a support of 1 to 6 words besides its label.
    """
    rng = random.Random(3)
    routing = np.random.default_rng(3)
    samples = []
    for number in range(SEQUENCES):
        length = rng.randint(5, 27)
        tokens = [rng.randrange(VOCAB) for _ in range(length + 1)]
        prompt, gap = rng.randint(1, 3), rng.randint(3, length - 1)
        wrote = [place >= prompt and place != gap for place in range(length)]
        near = logp[number] if logp is not None else [0.0] * length
        advantage = rng.gauss(0.0, 1.0)
        samples.append(
            TrainSample(
                input_ids=tokens[:-1],
                labels=tokens[1:],
                mask=wrote,
                rollout_logp=[min(near[i] + rng.gauss(0.0, 0.02), 0.0) if mine else 0.0 for i, mine in enumerate(wrote)],
                versions=[0 if mine else -1 for mine in wrote],
                advantages=[advantage if mine else 0.0 for mine in wrote],
                group=number // 4,
                routed_experts=routing.permuted(np.tile(np.arange(4, dtype=np.int8), (length, LAYERS, 1)), axis=-1)[..., :2],
                supports=draw_supports(np.random.default_rng(number), tokens[1:], wrote),
            )
        )
    return samples


def draw_supports(rng: np.random.Generator, labels: list[int], wrote: list[bool]) -> Supports:
    """Of each label that the policy wrote: it, and 1 to 6 other words."""
    rows = np.full((len(labels), 7), -1, np.int32)
    for t, label in enumerate(labels):
        if wrote[t]:
            others = rng.permutation(np.setdiff1d(np.arange(VOCAB), [label]))[: rng.integers(1, 7)]
            rows[t, : 1 + len(others)] = [label, *others]
    return Supports.of_rows(rows)


def packs_of(case: Case, samples: list[TrainSample], parallel: ParallelConfig) -> list[MicroBatch]:
    """The packs of a case, padded as the layout wants it."""
    if not case.replay:
        samples = [replace(sample, routed_experts=None) for sample in samples]
    if not case.truncated:
        samples = [replace(sample, supports=None) for sample in samples]
    groups = [samples[i :: case.packs] if case.packed else [samples[i]] for i in range(case.packs)]
    chosen = [sample for group in groups for sample in group]
    weights = sequence_weights("sequence-mean", torch.tensor([sum(sample.mask) for sample in chosen])).tolist()
    packs, first = [], 0
    for group in groups:
        mine = weights[first : first + len(group)]
        ((packed,),) = pack(group, dp=1, cp=parallel.cp, tp=parallel.tp, max_tokens=10_000, weights=mine, first_id=first)
        packs.append(packed)
        first += len(group)
    return packs


def start(rank: RankInfo, path: Path, parallel: ParallelConfig) -> TrainerRank:
    """An engine on the CPU with `OPTIMIZER`; experts with both auxiliary losses, and a balancing bias that moves."""
    moe = MoeConfig(aux_loss_coeff=0.01, z_loss_coeff=0.01, bias_update_rate=0.125)
    return TrainerRank(str(path), parallel, OPTIMIZER, at_own_port(rank), device="cpu", seed=1, moe=moe)


def begin_again(engine: TrainerRank) -> None:
    """Weights of the model directory and a new optimizer, without building the engine again."""
    from ctpo_megatron.mcore.hf.load import load_hf
    from ctpo_megatron.mcore.host import megatron_region

    with megatron_region(engine.device):
        load_hf(engine.models, engine.shape, engine.model_path)
        engine.optimizer.reload_model_params()
        for part in engine.optimizer.chained_optimizers:
            if getattr(part, "optimizer", None) is not None:
                part.optimizer.state.clear()
        engine.schedule.num_steps = 0
        engine.schedule.step(0)


def train(engine: TrainerRank, case: Case, samples: list[TrainSample]) -> Found:
    """Two optimizer steps of `case` from the model directory's weights."""
    from ctpo_megatron.mcore.policy import update_policy

    begin_again(engine)
    packs = packs_of(case, samples, engine.parallel)[engine.coords.dp_rank :: engine.parallel.dp]
    # rollout log-probs are near the whole distribution's, so among few words the policy is compared with itself
    algorithm = AlgorithmConfig(objective=OBJECTIVES[case.objective], anchor="old" if case.truncated else "rollout")
    options = {"algorithm": algorithm, "temperature": TEMPERATURE, "drift": DriftBounds(), "version": 0, "density": True}
    steps = [flat(update_policy(engine, [packs], **options)) for _ in range(2)]
    return Found(steps, exported(engine))


def train_layouts(
    rank: RankInfo,
    layouts: list[Layout],
    ports: list[int],
    models: dict[str, Path],
    samples: dict[str, list[TrainSample]],
    faults: dict[str, Fault],
    halves: Sequence[int] = BOTH,
) -> dict[tuple[str, str], dict[Case | str, Found]]:
    """By layout and family: what every case gave, and what `fault_case` gave with each fault that is planted there.

    One engine for all of them; each meets at a port of its own.
    """
    found: dict[tuple[str, str], dict[Case | str, Found]] = {}
    for (layout, family), port in zip(engines_of(layouts, halves), ports, strict=True):
        engine = start(replace(rank, master_port=port), models[family], layout.parallel)
        mine: dict[Case | str, Found] = {case: train(engine, case, samples[family]) for case in cases_of(layout, family, halves)}
        for name, fault in faults.items():
            if (fault.layout, fault.family) == (layout.name, family):
                with fault.plant(engine):
                    mine[name] = train(engine, fault_case(layout, family), samples[family])
        engine.close()
        found[layout.name, family] = mine
    return found


def train_alone(rank: RankInfo, models: dict[str, Path], cases: dict[str, list[Case]]) -> dict[str, Alone]:
    """By family, on one rank: sequences whose rollout policy is near the model, and what every case gives with them."""
    found: dict[str, Alone] = {}
    for family, path in models.items():
        if not cases[family]:
            continue
        engine = start(rank, path, ParallelConfig())
        (whole,) = packs_of(Case("ctpo", True, 1), draw_samples(), engine.parallel)
        (logp,) = engine.logp(engine.place([whole]), TEMPERATURE)
        samples = draw_samples([part.tolist() for part in logp.split(whole.sequences.cu_seqlens.diff().tolist())])
        before = exported(engine)
        found[family] = Alone(samples, before, {case: train(engine, case, samples) for case in cases[family]})
        engine.close()
    return found


def exported(engine: TrainerRank) -> dict[str, NDArray[np.float32]]:
    """Whole weights under their Hugging Face names on rank 0, nothing elsewhere."""
    return {name: tensor.numpy().copy() for bucket in engine.stream(1 << 20, to=0) for name, tensor in bucket}


def largest_deviations(found: Found, expected: Found) -> dict[str, float]:
    """Largest deviation of losses, gradient norms and other statistics, relative where they exceed 1, and of the weights.

    "at borders": how many tokens are in another bucket of COUNTS.
    """
    assert found.weights.keys() == expected.weights.keys()
    worst = {"loss": 0.0, "grad_norm": 0.0, "later grad_norm": 0.0, "statistics": 0.0, "at borders": 0.0}
    for step, (ours, theirs) in enumerate(zip(found.steps, expected.steps, strict=True)):
        assert ours.keys() == theirs.keys()
        counts = {key for key in theirs if key.startswith(COUNTS)}
        worst["at borders"] = max(worst["at borders"], sum(abs(ours[key] - theirs[key]) for key in counts) / 2)
        for key, value in theirs.items():
            if key in counts:
                continue
            kind = "later grad_norm" if step and key == "grad_norm" else key if key in worst else "statistics"
            worst[kind] = max(worst[kind], distance(ours[key], value))
    worst["weights"] = max(float(np.abs(found.weights[name] - value).max()) for name, value in expected.weights.items())
    return worst


def distance(ours: float, theirs: float) -> float:
    """|ours - theirs|, relative where theirs exceeds 1; infinite where only one is a number."""
    if ours == theirs or (ours != ours and theirs != theirs):
        return 0.0
    gap = abs(ours - theirs) / max(abs(theirs), 1.0)
    return gap if gap == gap else float("inf")


def assert_same(found: Found, expected: Found, case: str) -> None:
    """Losses, gradient norms and weights within TOLERANCE of one rank's, norms behind an optimizer step within
    LATER_NORM_TOLERANCE, other statistics within STATISTICS_TOLERANCE, tokens in the same buckets but for AT_BORDERS."""
    worst = largest_deviations(found, expected)
    bound = {"later grad_norm": LATER_NORM_TOLERANCE, "statistics": STATISTICS_TOLERANCE, "at borders": AT_BORDERS}
    beyond = {kind: value for kind, value in worst.items() if not value <= bound.get(kind, TOLERANCE)}
    assert not beyond, f"{case}: {beyond}"


Results = dict[tuple[str, str], dict[Case | str, Found]]  # by names of layout and family


def assert_layout_is_one_rank(
    results: Sequence[Results], layout: Layout, alone: dict[str, Alone], halves: Sequence[int] = BOTH
) -> None:
    """All ranks found the same, and it is what one rank found."""
    for family in layout.families:
        for case in cases_of(layout, family, halves):
            where = f"{layout.name}, {family}, {case}"
            ranks = [result[layout.name, family][case] for result in results]
            assert all(rank.steps == ranks[0].steps for rank in ranks), f"{where}: ranks differ"
            assert_same(ranks[0], alone[family].found[case], where)
