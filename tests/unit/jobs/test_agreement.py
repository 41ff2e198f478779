"""Two sources that say different things: exit code 2 before anything starts, from train, eval, sft and plan, with both named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron import cli
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.refusals import refusal

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
Command = Callable[..., str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    task = make_toy_task(root, seed=1, train_rows=8, eval_rows=4, sft_rows=4)
    return {
        "model.path": make_toy_model(root / "model", seed=1),
        "data.train": task.train,
        "data.eval": task.eval,
        "sft": task.sft,
    }


@pytest.fixture
def model(inputs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(inputs["model.path"], tmp_path / "spoiled"))


@pytest.fixture
def refused(
    inputs: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The message of a command that ended with exit code 2 and left nothing behind."""

    def run(command: str, *words: str) -> str:
        given = {
            "model.path": model,
            "data.train": inputs["sft" if command == "sft" else "data.train"],
            "data.eval": inputs["data.eval"],
        }
        overrides = [f"{key}={value}" for key, value in given.items()]
        return refusal(monkeypatch, capsys, tmp_path / "run", command, CONFIG, *overrides, *words)

    return run


def change(model: Path, remove: tuple[str, ...] = (), **keys: Any) -> None:
    file = model / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in remove}
    file.write_text(json.dumps(config | keys))


def add_tokens(model: Path, special: bool = True) -> None:
    """Tokens with ids 264 to 269, where the model has 264 rows."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    content["added_tokens"] += [{"id": id_, "content": f"<|extra_{id_}|>", **flags} for id_ in range(264, 270)]
    file.write_text(json.dumps(content))


def rows(path: Path, *questions: str, answers: bool = False) -> Path:
    def row(question: str) -> dict[str, Any]:
        asked = [{"role": "user", "content": question}]
        if answers:
            return {"messages": [*asked, {"role": "assistant", "content": "It is 7. " + question}]}
        return {"prompt": asked, "reward_model": {"ground_truth": "7"}}

    path.write_text("".join(json.dumps(row(question)) + "\n" for question in questions))
    return path


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_context_length(refused: Command, model: Path, command: str) -> None:
    change(model, max_position_embeddings=80)
    message = refused(command)
    assert "data.max_prompt_tokens + rollout.max_response_tokens = 96 + 96 = 192" in message
    assert "max_position_embeddings of the model's config.json = 80" in message


@pytest.mark.parametrize("command", ["train", "eval"])
def test_context_length_of_a_benchmark(refused: Command, model: Path, inputs: dict[str, Path], command: str) -> None:
    change(model, max_position_embeddings=400)
    own = (f"eval.benchmarks.aime.file={inputs['data.eval']}", "eval.benchmarks.aime.max_response_tokens=300")
    message = refused(command, *own)
    assert "data.max_prompt_tokens + max_response_tokens of benchmark aime = 96 + 300 = 396 tokens" in message


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("keys", "remove", "words"),
    [
        ({"rope_scaling": YARN | {"attn_factor": 0.8782488562869419}, "rope_theta": 1e4}, ("rope_parameters",), "attn_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("rope_parameters",), "original_max_position_embeddings"),
        ({"rope_scaling": YARN}, (), "rope_scaling = "),
        ({"num_key_value_heads": 3}, (), "num_key_value_heads = 3"),
        ({"seq_length": 150}, (), "seq_length of the model's config.json = 150"),
    ],
)
def test_config_json(
    refused: Command, model: Path, command: str, keys: dict[str, Any], remove: tuple[str, ...], words: str
) -> None:
    change(model, remove, **keys)
    assert words in refused(command)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_tokenizer_for_foreign_code(refused: Command, model: Path, command: str) -> None:
    (model / "tokenizer.json").rename(model / "tiktoken.model")
    assert "tiktoken.model only" in refused(command)


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.engine.tp=3", "rollout.engine.tp=3"),
        ("rollout.engine.max_total_tokens=190", "rollout.engine.max_total_tokens = 190"),
        ("rollout.engine.extra_args=[--context-length, 100]", "--context-length in rollout.engine.extra_args = 100"),
        ("parallel.tp=3", "parallel.tp = 3"),
    ],
)
def test_configuration_against_the_model(refused: Command, command: str, override: str, words: str) -> None:
    quoted = override.replace("100]", "'100']")
    assert words in refused(command, quoted, "cluster.device=cpu")


def test_a_token_outside_the_vocabulary(refused: Command, model: Path, tmp_path: Path) -> None:
    """By row, in the training data, the held-out data and in demonstrations."""
    add_tokens(model)
    data = rows(tmp_path / "d.jsonl", "3 + 4 =", "3 + 4 = <|extra_268|>")
    for command, key in (("train", "data.train"), ("train", "data.eval"), ("eval", "data.eval")):
        message = refused(command, f"{key}={data}")
        assert "d.jsonl row 1: the tokenizer reads '<|extra_268|>' as token 268, but the model has 264 embeddings" in message
    shown = rows(tmp_path / "s.jsonl", "3 + 4 = <|extra_265|>", answers=True)
    assert "row 0: the tokenizer reads '<|extra_265|>' as token 265" in refused("sft", f"data.train={shown}")
    assert "token 266" in refused("train", "data.system_prompt=Be <|extra_266|> brief.")


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_tokens_that_any_text_may_hold(refused: Command, model: Path, command: str) -> None:
    add_tokens(model, special=False)
    assert "'<|extra_264|>' with id 264" in refused(command)


def test_a_template_that_writes_what_the_model_does_not_have(refused: Command, model: Path) -> None:
    add_tokens(model)
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", "<|im_end|><|extra_269|>"))
    assert "the chat template writes '<|extra_269|>', token 269, but the model has 264 embeddings" in refused("train")


def test_a_demonstration_longer_than_the_context(refused: Command, model: Path, tmp_path: Path) -> None:
    change(model, max_position_embeddings=64)
    shown = rows(tmp_path / "s.jsonl", "3 + 4 =", "3 + 4 = " * 12, answers=True)
    message = refused("sft", f"data.train={shown}")
    assert "s.jsonl row 1: the demonstration has " in message
    assert "max_position_embeddings = 64" in message


def test_another_tokenizer_than_is_described(refused: Command, model: Path) -> None:
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    change(model, ("model_type",))
    assert "key 'model_type' is missing" in refused("train")
    change(model, model_type="qwen3")
    assert "another tokenizer than tokenizer.json describes" in refused("train")


def test_special_tokens_without_a_row_that_nothing_uses(model: Path, inputs: dict[str, Path]) -> None:
    """As in models to which only a padding token was added: allowed."""
    from ctpo_megatron.config.load import load_config
    from ctpo_megatron.data.prompts import read_prompts
    from ctpo_megatron.jobs.agreement import check_own_tokens, check_prompt_tokens, check_training
    from ctpo_megatron.models.config import read_hf_config
    from ctpo_megatron.rollout.chat import ChatTokenizer

    add_tokens(model)
    shape, chat = read_hf_config(model), ChatTokenizer(model)
    check_training(load_config(CONFIG, [f"model.path={model}"]), shape, model)
    check_own_tokens(chat, shape)
    check_prompt_tokens(read_prompts(inputs["data.train"]), str(inputs["data.train"]), chat, shape, model)


def test_a_plan_says_what_it_has_not_looked_at(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(file: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["ctpo", "plan", str(CONFIG), "--model-config", str(file)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return " ".join(capsys.readouterr().out.split())

    assert "Not looked at: the data." in plan(model)
    alone = model.parent / "alone" / "config.json"
    alone.parent.mkdir()
    shutil.copyfile(model / "config.json", alone)
    assert "Not looked at: the data; tokenizer and weights, as there are none beside" in plan(alone)


def test_what_servers_do_not_start_without(tmp_path: Path) -> None:
    from ctpo_megatron.config.load import load_config
    from ctpo_megatron.errors import ModelError
    from ctpo_megatron.jobs.agreement import check_rollouts
    from ctpo_megatron.models.config import parse_config
    from tests.unit.models.test_published import MOONLIGHT

    lacking = parse_config({key: value for key, value in MOONLIGHT.items() if key not in ("topk_method", "moe_layer_freq")})
    with pytest.raises(ModelError, match="lacks moe_layer_freq, topk_method, without which SGLang"):
        check_rollouts(load_config(CONFIG), lacking, tmp_path)
    check_rollouts(load_config(CONFIG), parse_config(MOONLIGHT), tmp_path)


def test_dense_layers_that_sglang_would_not_build(tmp_path: Path) -> None:
    from ctpo_megatron.config.load import load_config
    from ctpo_megatron.errors import ModelError
    from ctpo_megatron.jobs.agreement import check_rollouts
    from ctpo_megatron.models.config import parse_config
    from tests.support.qwen import QWEN3

    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    with pytest.raises(ModelError, match=r"mlp_only_layers.*experts in every layer of qwen3_moe"):
        check_rollouts(load_config(CONFIG), parse_config(QWEN3 | experts | {"mlp_only_layers": [0]}), tmp_path)
