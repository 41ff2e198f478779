"""`ctpo plan`: its arithmetic, what it refuses, and that every configuration that is shipped can be planned."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron import cli
from ctpo_megatron.cluster.keepers.shelf import MOST
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.errors import ConfigError, ModelError
from ctpo_megatron.jobs.plan import find_model_config, plan_job, plan_of, ranges
from ctpo_megatron.jobs.topology import planned_run
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.rules import stage_layers
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.activations import layer_kept
from ctpo_megatron.planning.batches import plan_batches
from ctpo_megatron.planning.groups import expert_data_parallel, rank_groups
from ctpo_megatron.planning.memory import CONTEXT, GIB, in_flight
from ctpo_megatron.planning.parameters import active_parameters, model_parameters, stage_parameters
from ctpo_megatron.planning.plan import Hardware
from ctpo_megatron.planning.run import STREAM_BYTES
from ctpo_megatron.planning.saving import GATHERED
from ctpo_megatron.planning.servers import COMMUNICATOR, server_parameters, server_weights, token_bytes
from ctpo_megatron.planning.work import Work
from ctpo_megatron.types import TrainSample

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PUBLISHED = {  # billions, as the model cards say; DeepSeek's active ones do not count the embedding, 0.93
    "qwen3-4b": (4.0, 4.0),
    "qwen3-14b": (14.8, 14.8),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.0, 22.0),
    "deepseek-v3": (671.0, 36.6 + 0.93),
}
LARGE_SERVERS = {"deepseek-v3": 192.0}


def shape_of(name: str) -> ModelShape:
    return parse_config(json.loads((CONFIGS / "models" / name / "config.json").read_text()))


def config_of(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    shape = shape_of(name)
    total, active = PUBLISHED[name]
    assert model_parameters(shape).total / 1e9 == pytest.approx(total, rel=0.006)
    assert active_parameters(shape) / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_layouts_fit_into_80_gb_with_room(name: str) -> None:
    hardware = Hardware(80.0, LARGE_SERVERS.get(name))
    plan = plan_of(config_of(name), shape_of(name), hardware)
    assert plan.problems == []
    assert plan.fullest / GIB < 0.95 * 80
    assert plan.servers.samples >= 8
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert "not run on GPUs here" in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_planned(path: Path, tmp_path: Path) -> None:
    toy = {"model_type": "qwen3_moe" if path.stem == "moe" else "qwen3", "num_hidden_layers": 2, "hidden_size": 64}
    toy |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 299}
    toy |= {"max_position_embeddings": 40960, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(toy))
    given = None if path.stem in PUBLISHED else tmp_path
    console = Console(file=io.StringIO(), width=120)
    plan_job(load_config(path, []), path, given, Hardware(80.0, LARGE_SERVERS.get(path.stem)), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert any(line.startswith(("Fits", "A run on CPUs")) for line in lines)


def test_whole_model_is_in_its_stages() -> None:
    for name, layout in {
        "qwen3-235b-a22b": {"pp": 8, "first_stage_layers": 11, "last_stage_layers": 11, "tp": 4, "ep": 2, "etp": 2, "dp": 1},
        "deepseek-v3": {"pp": 4, "first_stage_layers": 15, "last_stage_layers": 14, "vpp": 1, "ep": 8, "dp": 8},
        "qwen3-14b": {"pp": 4, "vpp": 5},
    }.items():
        shape, parallel = shape_of(name), ParallelConfig(**layout)
        layers = [layer for stage in stage_layers(shape, parallel) for chunk in stage for layer in chunk]
        assert sorted(layers) == list(range(shape.num_layers))
        stages, whole = stage_parameters(shape, parallel), model_parameters(shape)
        assert sum(stage.experts for stage in stages) * parallel.ep * parallel.etp == whole.experts
        if parallel.tp == 1:
            assert sum(stage.dense for stage in stages) == whole.dense


def test_tied_embeddings_are_held_by_both_ends_of_a_pipeline() -> None:
    shape = shape_of("qwen3-4b")
    whole = model_parameters(shape).total
    both = sum(stage.total for stage in stage_parameters(shape, ParallelConfig(pp=2)))
    assert both - whole == shape.vocab_size * shape.hidden_size


def test_one_forward_one_backward() -> None:
    assert [in_flight(stage, 4, 1, 100) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(stage, 4, 1, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [in_flight(stage, 4, 2, 100) for stage in range(4)] == [11, 9, 7, 5]


def test_a_gpt_layer_of_korthikanti_without_what_is_not_there() -> None:
    """Counted by hand as in arXiv 2205.05198, section 4.1, for f = 4 h, a key for every head, no dropout, flash attention:
    4 h for the norms' inputs and outputs, 6 h for queries, keys, values, rotated queries and keys, and output, 12 h for the MLP.
    """
    hidden, tokens = 256, 1000
    shape = parse_config(
        {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": hidden, "num_attention_heads": 4, "vocab_size": 300}
        | {"intermediate_size": 4 * hidden, "max_position_embeddings": 40960}
    )
    kept = layer_kept(shape, 0, ParallelConfig(), Work(tokens, 2))
    assert kept.total == 2 * tokens * hidden * (4 + 6 + 12) + 4 * tokens * shape.num_heads
    split = layer_kept(shape, 0, ParallelConfig(tp=4), Work(tokens, 2))
    assert split.total * 4 == kept.total


def test_batches_of_the_paper() -> None:
    batches = plan_batches(planned_run(config_of("qwen3-14b")))
    assert (batches.samples, batches.mini_prompts, batches.mini_samples) == (4096, 32, 256)
    assert (batches.longest, batches.micro_batch_tokens, batches.total_optimizer_steps) == (24000, 24576, 4880)
    longest, quarter, _ = batches.packings
    assert (longest.per_micro_batch, longest.micro_batches, quarter.per_micro_batch, quarter.micro_batches) == (1, 256, 4, 64)
    piped = plan_batches(planned_run(config_of("qwen3-235b-a22b"))).packings[0]
    assert piped.bubble == pytest.approx(7 / (128 + 7))


def test_groups_partition_the_ranks() -> None:
    parallel = ParallelConfig(tp=2, cp=2, dp=4, pp=2, ep=4, etp=2)
    assert expert_data_parallel(parallel) == 2
    found = {group.name: group for group in rank_groups(parallel)}
    for group in found.values():
        assert sorted(rank for ranks in group.ranks for rank in ranks) == list(range(32)), group.name
    assert found["TP"].ranks[:2] == [[0, 1], [2, 3]]
    assert found["EP"].ranks[0] == [0, 2, 4, 6]
    assert (found["PP"].nodes(8), found["PP"].nodes(32), found["TP"].nodes(8)) == (2, 1, 1)


def test_cache_bytes_of_a_token() -> None:
    assert token_bytes(shape_of("qwen3-4b"), 1, 2) == 36 * 2 * 8 * 128 * 2
    assert token_bytes(shape_of("qwen3-235b-a22b"), 8, 2) == 94 * 2 * 1 * 128 * 2  # 4 key-value heads, repeated
    assert token_bytes(shape_of("deepseek-v3"), 8, 2) == 61 * (512 + 64) * 2  # one latent, on every GPU
    assert server_parameters(shape_of("qwen3-4b"), 4) * 4 == model_parameters(shape_of("qwen3-4b")).total


def test_servers_in_fp8_hold_embeddings_in_full_and_half_of_the_rest() -> None:
    shape = shape_of("qwen3-14b")
    plain, fp8 = (server_weights(shape, 4, 2, quantised=quantised) for quantised in (False, True))
    assert plain == server_parameters(shape, 4) * 2
    ends = 2 * shape.vocab_size * shape.hidden_size // 4
    assert 1 < (fp8 - 2 * ends) / (plain / 2 - ends) < 1.0003, "a scale of four bytes for 16,384 numbers"


def test_what_cannot_fit_is_refused_with_the_shortage_and_what_helps(capsys, monkeypatch) -> None:
    words = ["ctpo", "plan", str(CONFIGS / "qwen3-14b.yaml"), "parallel.tp=1", "train.recompute=none", "--gpu-gb", "80"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    assert end.value.code == 2
    assert "Memory of a trainer rank" in told.out
    plan = plan_of(config_of("qwen3-14b", "parallel.tp=1", "train.recompute=none"), shape_of("qwen3-14b"), Hardware())
    assert f"{plan.fullest / GIB - 80:.1f} GiB more than --gpu-gb 80" in told.err
    assert "parallel.pp=2: " in told.err
    assert "optimizer.cpu_offload=1.0: " in told.err


def test_advice_is_true() -> None:
    """What a change is said to bring is what a plan with it says."""
    shape = shape_of("qwen3-30b-a3b")
    (problem,) = plan_of(config_of("qwen3-30b-a3b"), shape, Hardware(50.0, 80.0)).problems
    for change in problem.split("would do: ")[1].rstrip(".").split("; "):
        words, _, rest = change.partition(": ")
        again = plan_of(config_of("qwen3-30b-a3b", *words.split()), shape, Hardware(50.0, 80.0))
        assert float(rest.split()[0]) == pytest.approx(again.fullest / GIB, abs=0.051), change


def test_servers_that_do_not_fit_are_refused() -> None:
    def problems(*overrides: str) -> list[str]:
        return plan_of(config_of("deepseek-v3", *overrides), shape_of("deepseek-v3"), Hardware()).problems

    assert problems() == []
    (small,) = problems("rollout.engine.tp=8", "rollout.engine.nodes=1")
    assert "larger rollout.engine.tp, with rollout.engine.nodes" in small
    assert "--engine-gpu-gb" in small
    (wide,) = problems("rollout.engine.nodes=2")
    assert "needs 16 GPUs of a node, and a node has 8 (--gpus-per-node). Let each server spread over 4 nodes" in wide


@pytest.mark.parametrize("name", PUBLISHED)
def test_communicators_of_a_servers_gpu(name: str) -> None:
    """One for each pipeline stage, in what SGLang leaves free; none where weights travel otherwise, or on CPUs."""
    hardware, shape = Hardware(80.0, LARGE_SERVERS.get(name)), shape_of(name)
    servers = plan_of(config_of(name), shape, hardware).servers
    assert servers.communicators == config_of(name).parallel.pp
    assert servers.communicator_bytes == servers.communicators * COMMUNICATOR
    assert 0 < servers.communicator_bytes < servers.spare / 2
    tight = plan_of(config_of(name, 'rollout.engine.extra_args=["--mem-fraction-static", "0.999"]'), shape, hardware)
    (problem,) = tight.problems
    assert f"{servers.communicators} take up to {servers.communicator_bytes / GIB:.1f} GiB" in problem
    assert plan_of(config_of(name, "weights.type=disk", "weights.directory=/shared"), shape, hardware).servers.communicators == 0
    assert plan_of(config_of(name, "cluster.device=cpu"), shape, hardware).servers.communicators == 0


def test_servers_on_the_trainers_gpus() -> None:
    """They need no GPUs of their own, and have what the trainer leaves of its: all but what stays there, if they take turns."""
    shape, four = shape_of("qwen3-4b"), ["weights.type=colocated", "rollout.engine.servers=4"]
    apart = plan_of(config_of("qwen3-4b"), shape, Hardware())
    turns = plan_of(config_of("qwen3-4b", *four), shape, Hardware())
    beside = plan_of(config_of("qwen3-4b", *four, "weights.release=false"), shape, Hardware())
    assert [plan.problems for plan in (apart, turns, beside)] == [[], [], []]
    assert [(plan.server_gpus, plan.trainer_gpus) for plan in (apart, turns, beside)] == [(4, 4), (0, 4), (0, 4)]
    (stage,) = turns.stages
    left = 1 - stage.memory.resident / (80 * GIB)
    assert turns.servers.budget == pytest.approx(left * apart.servers.budget, rel=1e-6)
    assert beside.servers.budget < turns.servers.budget


def test_what_comes_on_a_shared_gpu_after_sglang_took_its_share() -> None:
    """Contexts of the servers that read from it, and saves, must find room in what SGLang leaves."""
    four = ["weights.type=colocated", "rollout.engine.servers=4"]
    plan = plan_of(config_of("qwen3-4b", *four), shape_of("qwen3-4b"), Hardware())
    (stage,) = plan.stages
    assert stage.memory.contexts == 3 * CONTEXT
    assert plan_of(config_of("qwen3-4b"), shape_of("qwen3-4b"), Hardware()).stages[0].memory.contexts == 0
    greedy = "rollout.engine.extra_args=[--mem-fraction-static=0.97]"
    (full,) = plan_of(config_of("qwen3-4b", *four, greedy), shape_of("qwen3-4b"), Hardware()).problems
    assert "a smaller --mem-fraction-static" in full


def test_micro_batches_are_those_of_one_optimizer_step() -> None:
    """All of its streams, and one log-prob or two for every token of all steps of the rollout batch."""
    shape, tokens, packs, steps = shape_of("qwen3-4b"), 12288, 256, 16
    (plain,) = plan_of(config_of("qwen3-4b"), shape, Hardware()).stages
    assert plain.memory.micro_batches == tokens * packs * (38 + 4 * steps)
    (guided,) = plan_of(config_of("qwen3-4b", "algorithm.reference={coeff: 0.01}"), shape, Hardware()).stages
    assert guided.memory.micro_batches == tokens * packs * (38 + 8 * steps)


def test_a_critic_is_planned() -> None:
    """A value head on the last stage, a reward for each token of a step and three numbers that are kept, its hidden states."""
    shape, staged = shape_of("qwen3-4b"), ["parallel.pp=2", "cluster.device=cpu"]
    plain = plan_of(config_of("qwen3-4b", *staged), shape, Hardware()).stages
    stages = plan_of(config_of("qwen3-4b", *staged, "algorithm.advantage={type: gae}"), shape, Hardware()).stages
    more = [other.parameters.dense - stage.parameters.dense for other, stage in zip(stages, plain, strict=True)]
    assert more == [0, shape.hidden_size + 1]
    tokens = 12288
    assert stages[1].memory.head - plain[1].memory.head == tokens * shape.hidden_size * (4 + 4 + 2)
    packs, steps = plain[1].memory.micro_batches // (tokens * (38 + 4 * 16)), 16
    assert stages[1].memory.micro_batches == tokens * packs * (38 + 4 + (4 + 12) * steps)


def test_streams_of_a_token_are_those_of_a_micro_batch() -> None:
    sample = TrainSample([1, 2], [2, 3], [False, True], [0.0, -0.5], [-1, 0], [0.0, 1.0], 0)
    ((mb,),) = pack([sample], dp=1, max_tokens=64)
    streams = [getattr(mb.tokens, field.name) for field in fields(mb.tokens)]
    assert sum(stream.element_size() for stream in streams if stream is not None) == STREAM_BYTES


def test_a_save_is_planned_for_host_and_gpu() -> None:
    """On the host the states of all parameters of a rank and what it writes; on the GPU a piece of bounded size."""
    shape = shape_of("qwen3-30b-a3b")
    (stage,) = plan_of(config_of("qwen3-30b-a3b"), shape, Hardware()).stages
    dense, experts = stage.parameters.dense, stage.parameters.experts
    share = dense // 8 + experts // 2
    assert stage.saving.writing == pytest.approx(14 * share, rel=1e-6)
    assert stage.saving.gathering == pytest.approx(12 * (dense + experts) + 14 * share, rel=1e-6)
    assert stage.saving.gpu == 2**29
    source = (CONFIGS.parent / "ctpo_megatron" / "mcore" / "checkpoint" / "gathering.py").read_text()
    assert f"\nGATHERED = 2**{GATHERED.bit_length() - 1}  #" in source
    assert stage.saving.kept == MOST * stage.saving.writing


def test_copies_in_memory_are_planned_where_there_are_any() -> None:
    where, told = CONFIGS / "qwen3-30b-a3b.yaml", {}
    for every in (0, 1):
        console = Console(file=io.StringIO(), width=120)
        plan_job(load_config(where, [f"checkpoint.memory.every={every}"]), where, None, Hardware(), console)
        told[every] = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    (stage,) = plan_of(config_of("qwen3-30b-a3b"), shape_of("qwen3-30b-a3b"), Hardware()).stages
    sizes = {"handing over": stage.saving.writing, "two copies, kept": stage.saving.kept}
    rows = {f"{name} {size / GIB:.1f} GiB {8 * size / GIB:.1f} GiB" for name, size in sizes.items()}
    assert rows <= set(told[1])
    assert not rows & set(told[0])


def test_bounds_on_time_are_told_with_what_they_ask() -> None:
    where, console = CONFIGS / "deepseek-v3.yaml", Console(file=io.StringIO(), width=120)
    plan_job(load_config(where, []), where, None, Hardware(), console)
    said = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "start 1249.9 GiB, read on every node 0.17 GiB/s rollout.engine.start_timeout_s 7,200" in said
    generation = "generation 256 of 8,000 tokens per server 284 tokens/s per server"
    assert f"{generation} rollout.engine.request_timeout_s 7,200" in said


@pytest.mark.parametrize("name", PUBLISHED)
def test_bounds_on_time_leave_large_models_time(name: str) -> None:
    """To read the weights at half a GiB per second, and to write all that is asked of a server at 600 tokens per second."""
    config = config_of(name)
    engine, gib = config.rollout.engine, 2 * model_parameters(shape_of(name)).total / GIB
    assert gib / 0.5 < engine.start_timeout_s <= config.cluster.start_timeout_s
    asked = -(-config.rollout.concurrency // engine.servers)
    assert asked * config.rollout.max_response_tokens / 600 < engine.request_timeout_s


def test_servers_that_cannot_share_the_trainers_gpus() -> None:
    def problems(*overrides: str, hardware: Hardware | None = None) -> list[str]:
        config = config_of("qwen3-4b", "weights.type=colocated", *overrides)
        return plan_of(config, shape_of("qwen3-4b"), hardware or Hardware()).problems

    (uneven,) = problems("rollout.engine.servers=3")
    assert "rollout.engine.servers * rollout.engine.tp = 3 must equal" in uneven
    (full,) = problems(hardware=Hardware(39.0))
    assert "GiB of the trainer. What helps: a larger rollout.engine.tp, weights.type=broadcast" in full
    (apart,) = problems(hardware=Hardware(gpus_per_node=2))
    assert "all GPUs on one node" in apart


def test_a_layout_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.pp.* = 3 .*40 layers"):
        plan_of(config_of("qwen3-14b", "parallel.pp=3"), shape_of("qwen3-14b"), Hardware())


def test_offloaded_and_smaller_optimizer_states() -> None:
    shape = shape_of("qwen3-4b")
    (whole,) = plan_of(config_of("qwen3-4b"), shape, Hardware()).stages
    (half,) = plan_of(config_of("qwen3-4b", "optimizer.cpu_offload=0.5"), shape, Hardware()).stages
    assert 2 * half.memory.optimizer == whole.memory.optimizer == half.host_optimizer * 12 / 10, "the host has gradients too"
    formats = ["optimizer.precision_aware=true", "optimizer.exp_avg_dtype=bfloat16", "optimizer.exp_avg_sq_dtype=bfloat16"]
    (small,) = plan_of(config_of("qwen3-4b", *formats), shape, Hardware()).stages
    assert small.memory.optimizer * 12 == whole.memory.optimizer * 8


def test_where_the_model_is_read(tmp_path: Path) -> None:
    config = config_of("qwen3-4b", f"model.path={tmp_path}")
    assert find_model_config(config, CONFIGS / "qwen3-4b.yaml", None) == CONFIGS / "models" / "qwen3-4b" / "config.json"
    (tmp_path / "config.json").write_text("{}")
    assert find_model_config(config, CONFIGS / "qwen3-4b.yaml", None) == tmp_path / "config.json"
    assert find_model_config(config, CONFIGS / "qwen3-4b.yaml", Path("x.json")) == Path("x.json")
    with pytest.raises(ModelError, match="--model-config"):
        find_model_config(config_of("qwen3-4b"), Path("elsewhere.yaml"), None)


def test_ranks_are_written_shortly() -> None:
    assert ranges([0, 1, 2, 3]) == "0-3"
    assert ranges([0, 4]) == "0 4"
    assert ranges([0, 4, 8, 12, 16]) == "0 4 ... 16"
