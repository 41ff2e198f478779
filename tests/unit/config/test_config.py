"""Loading, overriding and refusing configurations; the messages are part of the interface."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.config.explain import dotted_keys
from ctpo_megatron.config.load import dump_config, load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.types import Truncation

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
GOOD = "name: t\nrun_dir: runs/${name}\nmodel: {path: m}\ndata: {train: d.parquet}\n"


def write(directory: Path, text: str, name: str = "run.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_there_are_shipped_configs() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads_and_survives_a_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_overrides_win_over_the_file_and_interpolations_follow(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    config = load_config(path, ["name=x", "train.steps=3", "optimizer.lr=1e-5", "rollout.engine.extra_args=[--x, b]"])
    assert (config.run_dir, config.train.steps, config.optimizer.lr) == ("runs/x", 3, 1e-5)
    assert config.rollout.engine.extra_args == ("--x", "b")
    assert load_config(path, ["rollout.tool=null"]).rollout.tool is None


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD), ["seed=1", "seed=2"]).seed == 2


def test_an_option_of_the_default_type_needs_no_type(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["algorithm.objective.clip_low=0.5"])
    assert (config.algorithm.objective.type, config.algorithm.objective.clip_low) == ("ctpo", 0.5)


def test_changing_a_type_drops_the_options_of_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "algorithm: {objective: {type: ctpo, clip_low: 0.9}}\n")
    objective = load_config(path, ["algorithm.objective.type=grpo"]).algorithm.objective
    assert (objective.type, objective.clip_low) == ("grpo", 0.2)


def test_naming_the_same_type_again_keeps_its_options(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "algorithm: {objective: {clip_low: 0.9}}\n")
    assert load_config(path, ["algorithm.objective.type=ctpo"]).algorithm.objective.clip_low == 0.9


def test_extends_merges_section_by_section(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "train: {steps: 5, recompute: full}\n", "base.yaml")
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", "extends: ../base.yaml\nname: u\ntrain: {steps: 7}\n")
    config = load_config(path, ["seed=9"])
    assert (config.run_dir, config.train.steps, config.train.recompute, config.seed) == ("runs/u", 7, "full", 9)


def test_extends_names_the_file_that_holds_the_mistake(tmp_path: Path) -> None:
    base = write(tmp_path, GOOD + "train: {steps: 0}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nseed: -1\n")
    message = refusal(path)
    assert f"{base}: train.steps: found 0; must be greater than 0." in message.split("\n")
    assert f"{path}: seed: found -1; must be at least 0." in message.split("\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml: the file is empty"),
        ("# only a comment\n", "run.yaml: the file is empty"),
        ("- a\n- b\n", "run.yaml: the top level must be `key: value` lines, found list."),
        ("word", "run.yaml: the top level must be `key: value` lines, found str."),
        ("name: t\nmodel: [1\nseed: 2\n", "run.yaml, line 3, column 5: not valid YAML"),
        ("seed: 1\nseed: 2\n", "run.yaml, line 2, column 1: not valid YAML: found duplicate key"),
        ("extends: run.yaml\n", "`extends` runs in a circle: run.yaml -> run.yaml."),
        ("extends: [a]\n", "extends: found ['a']; it must be the name of one other config file."),
        ("extends: gone.yaml\n", "gone.yaml' is not a file."),
        (GOOD + "seed: ${nope}\n", "run.yaml: seed: Interpolation key 'nope' not found."),
        ("name: t\n", "run.yaml: model: missing; it must be given."),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, text))


def test_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "other.yaml")
    message = refusal(tmp_path / "gone.yaml")
    assert "gone.yaml: there is no such config file." in message
    assert "other.yaml" in message


def test_directory_and_binary_are_refused(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a text file" in refusal(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.group_sise=4", "rollout.group_sise: unknown key. Did you mean 'group_size'? Allowed in rollout: group_size, "),
        ("trian.steps=4", "trian: unknown key. Did you mean 'train'? Allowed in the top level: name, run_dir, "),
        ("group_size=4", "group_size: unknown key. Did you mean 'rollout.group_size'?"),
        ("rollout.group_size=0", "rollout.group_size: found 0; must be greater than 0."),
        ("optimizer.beta1=1", "optimizer.beta1: found 1; must be less than 1."),
        ("train.steps=many", "train.steps: found 'many'; must be a whole number."),
        ("train.steps=1.5", "train.steps: found 1.5; must be a whole number."),
        ("optimizer.lr=.nan", "optimizer.lr: found nan; must be a finite number."),
        ("optimizer.lr=.inf", "optimizer.lr: found inf; must be a finite number."),
        ("optimizer.lr=fast", "optimizer.lr: found 'fast'; must be a number."),
        ("checkpoint.export=7", "checkpoint.export: found 7; must be true or false."),
        ("name=null", "name: found null; must be text."),
        ("train=null", "train: found null; must be a section of `key: value` lines."),
        ("seed.deep=1", "seed: found a section with deep; must be a whole number."),
        ("rollout.engine.extra_args=-x", "rollout.engine.extra_args: found '-x'; must be a list."),
        ("rollout.engine.extra_args=[--prefer, x]", "rollout.engine.extra_args: --preferred-sampling-params is not allowed: it"),
        ("rollout.engine.extra_args=[a, 3]", "rollout.engine.extra_args[1]: found 3; must be text."),
        ("algorithm.objective.type=gpro", "algorithm.objective: type: found 'gpro'; allowed: 'ctpo', 'grpo'"),
        ("algorithm.objective.clip_lw=1", "algorithm.objective.clip_lw: unknown key. Did you mean 'clip_low'?"),
        ("rollout.tool={type: python, timeout_s: -1}", "rollout.tool.timeout_s: found -1; must be greater than 0."),
        ("rollout.tool=python", "rollout.tool: found 'python'; must be a section"),
        ("steps", "'steps' is not an override; write dotted.key=value, like train.steps=10."),
        ("=3", "'=3' is not an override; write dotted.key=value"),
        ("seed=[1,", "'seed=[1,': the value is not valid YAML"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, expected: str) -> None:
    message = refusal(write(tmp_path, GOOD), override)
    assert message.startswith(f"command line: {expected}"), message


def test_a_wrong_choice_lists_all_and_guesses(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, GOOD), "algorithm.aggregation=token_mean")
    assert "algorithm.aggregation: type: found 'token_mean'; allowed: 'token-mean', 'sequence-mean'," in message
    assert "Did you mean 'token-mean'?" in message


def test_an_option_of_another_type_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    message = refusal(path, "algorithm.objective.type=grpo", "algorithm.objective.ratio=cumulative")
    assert "unknown key. It is an option of another type than 'grpo'." in message
    assert "Allowed in algorithm.objective of type 'grpo': type, clip_low, " in message


def test_several_mistakes_are_one_message_with_a_line_each(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "seed: -1\n")
    lines = refusal(path, "train.steps=0", "rollout.nope=1").split("\n")
    assert len(lines) == 3
    assert sum(line.startswith("command line: ") for line in lines) == 2
    assert sum(line.startswith(f"{path}: seed: ") for line in lines) == 1


def test_rules_across_sections_come_through_as_written(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, GOOD), "train.optimizer_steps=3")
    assert message.endswith("run.yaml: train.optimizer_steps=3 does not divide train.prompts_per_step=32.")


@pytest.mark.parametrize("other", ["train.staleness=1", "weights.delta=true"])
def test_servers_that_sleep_do_nothing_else(tmp_path: Path, other: str) -> None:
    path = write(tmp_path, GOOD)
    assert load_config(path, ["weights.type=colocated"]).weights.servers_sleep
    message = refusal(path, "weights.type=colocated", other)
    assert f"run.yaml: {other}" in message
    assert "or weights.release=false" in message
    assert not load_config(path, ["weights.type=colocated", "weights.release=false", other]).weights.servers_sleep


def test_nodes_of_a_server(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_config(path, ["rollout.engine.tp=16", "rollout.engine.nodes=2"]).rollout.engine.tp_per_node == 8
    assert "rollout.engine.nodes=3 does not divide rollout.engine.tp=16" in refusal(
        path, "rollout.engine.tp=16", "rollout.engine.nodes=3"
    )
    both = ("weights.type=colocated", "rollout.engine.tp=2", "rollout.engine.nodes=2")
    assert "weights.type=colocated hands weights over within a node" in refusal(path, *both)


def test_configuration_errors_end_with_exit_code_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "gone.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("objective", "k"),
    [
        *(("{type: dppo, divergence: topk_tv}", 20), ("{type: dppo}", 0), ("{type: ctpo}", 0)),
        *(("{type: ctpo, band: topk_variance}", 20), ("{type: ctpo, band: variance}", 0)),
    ],
)
def test_only_top_k_divergences_ask_for_the_likeliest_tokens(tmp_path: Path, objective: str, k: int) -> None:
    assert load_config(write(tmp_path, GOOD), [f"algorithm.objective={objective}"]).algorithm.top_k == k


def test_truncation_is_refused_where_supports_are_not_told(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert not load_config(path).rollout.truncation.cuts
    both = load_config(path, ["rollout.top_k=20", "rollout.top_p=0.95"]).rollout.truncation
    assert both == Truncation(top_p=0.95, top_k=20)
    assert "rollout.top_p=0.9 without rollout.top_k" in refusal(path, "rollout.top_p=0.9")
    assert "rollout.min_p=0.1 without rollout.top_k" in refusal(path, "rollout.min_p=0.1")
    for value in ("rollout.top_k=1", "rollout.top_k=2000", "rollout.top_p=0", "rollout.min_p=1"):
        assert value.partition("=")[0] in refusal(path, value)
    message = refusal(path, "rollout.top_k=20", "algorithm.objective={type: dppo, divergence: topk_kl}")
    assert "use binary_tv or binary_kl" in message
    message = refusal(path, "rollout.top_k=20", "algorithm.objective={type: ctpo, band: topk_entropy}")
    assert "algorithm.objective.band=topk_entropy looks at whole distributions" in message


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("{type: ctpo, band_unit: 0.1}", "band_unit=0.1 with band 'position'"),
        ("{type: ctpo, band: variance, power: 0}", "band 'variance' with power=0"),
        ("{type: cppo, adaptive_max: 5}", "adaptive_max without adaptive_budget"),
    ],
)
def test_options_of_objectives_that_would_do_nothing_are_refused(tmp_path: Path, objective: str, words: str) -> None:
    assert words in refusal(write(tmp_path, GOOD), f"algorithm.objective={objective}")


@pytest.mark.parametrize("objective", ["drpo", "kpop"])
def test_a_correction_beside_a_ratio_against_the_engine_is_refused(tmp_path: Path, objective: str) -> None:
    changes = (f"algorithm.objective={{type: {objective}}}", "algorithm.correction={type: icepop}")
    assert "would count the distance twice" in refusal(write(tmp_path, GOOD), *changes)


def test_a_mistake_in_a_list_of_sections_is_named_as_it_was_written(tmp_path: Path) -> None:
    judge = "{type: judge, url: http://h/v1, model: m, budget_call: 3, key_file: ~/key}"
    message = refusal(write(tmp_path, GOOD), f"rollout.reward={{type: combination, terms: [{{name: a, reward: {judge}}}]}}")
    assert "rollout.reward.terms[0].reward.budget_call: unknown key. Did you mean 'budget_calls'?" in message
    assert "Allowed in rollout.reward.terms[0].reward of type 'judge': type, url, model" in message
    assert "rollout.reward.terms[0].reward.budget_calls: missing" in message


PATHS = {
    "run_dir",
    "model.path",
    "model.adapter.path",
    "data.train",
    "data.eval",
    "sft.output",
    "algorithm.reference.path",
    "weights.directory",
}
IN_LISTS = {"data.mixture.path", "algorithm.distillation.teachers.path"}
NAMED = {"eval.benchmarks.file"}  # that stand below a name of the user's
IMPORTED = {"rollout.environment.path", "rollout.agent.path"}  # of modules, not of files


def test_every_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    values = [f"{key}=~/{key}" for key in sorted(PATHS)]
    config = load_config(write(tmp_path, GOOD), ["weights.type=disk", *values])
    for key in PATHS:
        found: object = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == f"/home/ann/{key}"
    mixture = load_config(write(tmp_path, GOOD), ["data.mixture=[{name: more, path: ~/m.parquet}]"]).data.mixture
    assert [source.path for source in mixture] == ["/home/ann/m.parquet"]
    assert load_config(write(tmp_path, GOOD), ["run_dir=~/r", "model.path=${run_dir}/m"]).model.path == "/home/ann/r/m"
    assert load_config(write(tmp_path, GOOD), ["run_dir=a/~b"]).run_dir == "a/~b"
    named = load_config(write(tmp_path, GOOD), ["eval.benchmarks.aime.file=~/aime.parquet"])
    assert named.eval.benchmarks["aime"].file == "/home/ann/aime.parquet"
    assert "~nobodyatall" in refusal(write(tmp_path, GOOD), "data.train=~nobodyatall/x.parquet")


def test_no_path_of_the_configuration_is_missing_above() -> None:
    """Whatever is called a path, a file or a directory, or says that it is one, may begin at home."""
    meant = {key for key in dotted_keys() if key.rsplit(".", 1)[-1] in ("path", "file", "directory", "dir", "output", "run_dir")}
    assert meant <= PATHS | IN_LISTS | NAMED | IMPORTED


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.oversample=2"], "train.oversample=2 lets groups go on into the next step, where they are one version old"),
        (["train.oversample=33", "train.staleness=1"], "allowed: at most train.prompts_per_step=32"),
        (["rollout.dynamic.max_refills=1", "rollout.group_size=1", "train.optimizer_steps=1"], "which every group of"),
    ],
)
def test_groups_that_go_on_and_groups_that_are_replaced(tmp_path: Path, overrides: list[str], words: str) -> None:
    path = write(tmp_path, GOOD)
    assert words in refusal(path, *overrides)
    assert load_config(path, ["train.oversample=32", "train.staleness=1", "rollout.dynamic.max_refills=4"]).train.oversample == 32


@pytest.mark.parametrize(
    ("overrides", "alone"),
    [
        ([], True),
        (["train.staleness=1"], False),
        (["eval.servers=1", "rollout.engine.servers=2"], False),
    ],
)
def test_servers_are_alone_where_nothing_else_computes(tmp_path: Path, overrides: list[str], alone: bool) -> None:
    config = load_config(write(tmp_path, GOOD), overrides)
    assert config.servers_alone == alone
    assert config.without_trainer.servers_alone
