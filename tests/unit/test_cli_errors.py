"""What a command says when something is wrong: one message, an exit code, and a traceback only where it is asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
from pathlib import Path

import pytest

from ctpo_megatron import cli
from ctpo_megatron.toy.model import make_toy_model

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_toy_model(tmp_path_factory.mktemp("models") / "model", seed=1)


def run(capsys, monkeypatch, *words: object) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    monkeypatch.setattr(cli, "opened_nursery", lambda _: contextlib.nullcontext())  # nothing here has servers
    monkeypatch.setattr(sys, "argv", ["ctpo", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


def rows(path: Path, *contents: str) -> Path:
    found = [{"prompt": [{"role": "user", "content": each}], "reward_model": {"ground_truth": "1"}} for each in contents]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_demonstrations_that_are_too_long_are_refused_before_the_start(capsys, monkeypatch, tmp_path, model):
    talks = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * n}] for n in (10, 20_000, 5)]
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = [f"model.path={model}", f"data.train={path}", f"run_dir={tmp_path / 'run'}"]
    words.append("train.max_tokens_per_micro_batch=16384")
    code, message = run(capsys, monkeypatch, "sft", CONFIG, *words)
    assert code == 2, message
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    for told in (f"{path} line 2", "20,004 tokens", "train.max_tokens_per_micro_batch = 16384"):
        assert told in message
    assert not (tmp_path / "run").exists()


RAISES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}"
RAISES += "{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}{{ '<|assistant|>' }}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (RAISES, ("two.jsonl row 0", "no system messages here")),
        (RAISES.replace("endfor", "endfour"), ("endfour",)),
        (RAISES.replace("m.content", "m.content.text"), ("has no attribute 'text'",)),  # found with a conversation of our own
    ],
)
def test_a_template_that_raises_ends_a_command_with_its_own_words(capsys, monkeypatch, tmp_path, model, template, told):
    patched = tmp_path / "model"
    shutil.copytree(model, patched)
    (patched / "chat_template.jinja").write_text(template)
    data = rows(tmp_path / "two.jsonl", "3 + 0 =", "3 + 1 =")
    words = [f"model.path={patched}", f"data.eval={data}", f"run_dir={tmp_path / 'run'}", "data.system_prompt=Answer briefly."]
    code, message = run(capsys, monkeypatch, "eval", CONFIG, *words)
    assert code == 2, message
    assert "Traceback" not in message
    assert all(words in message for words in told), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", [0, 1, 2])
def test_the_traceback_is_shown_where_it_is_asked_for(capsys, monkeypatch, tmp_path, where):
    words = ["plan", str(tmp_path / "none.yaml")]
    code, plain = run(capsys, monkeypatch, *words)
    words.insert(where, "--debug")
    code_of_debug, shown = run(capsys, monkeypatch, *words)
    assert code == code_of_debug == 2
    assert "Traceback" not in plain
    assert "Traceback" in shown
    assert shown.endswith(plain)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/r/metrics.jsonl"), 1, "/r/metrics.jsonl: no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/r/x"), 1, "/r/x: no permission"),
        (MemoryError(), 1, "no memory left"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero. Run it again with --debug"),
        (ExceptionGroup("many", [ValueError("one\ntwo")]), 1, "unexpected ValueError: one two."),
    ],
)
def test_whatever_is_raised_is_one_message(capsys, monkeypatch, tmp_path, error, code, told):
    def raising(*_args: object) -> None:
        raise error

    monkeypatch.setattr("ctpo_megatron.config.load.load_config", raising)
    found, message = run(capsys, monkeypatch, "plan", CONFIG)
    assert (found, message.count("\n")) == (code, 1)
    assert message.startswith("error: ")
    assert told in message


def test_what_ended_a_run_is_kept_with_its_traceback(capsys, monkeypatch, tmp_path):
    async def raising(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("ctpo_megatron.jobs.train.train_job", raising)
    (tmp_path / "logs").mkdir()
    code, message = run(capsys, monkeypatch, "train", CONFIG, f"run_dir={tmp_path}")
    assert (code, "Traceback" in message) == (1, False)
    kept = (tmp_path / "logs" / "error.log").read_text()
    assert kept.startswith("Traceback")
    assert "\nZeroDivisionError: by zero\n--- 20" in kept
    run(capsys, monkeypatch, "train", CONFIG, f"run_dir={tmp_path}")
    assert (tmp_path / "logs" / "error.log").read_text().startswith(kept + "Traceback")


def test_paths_begin_at_home(capsys, monkeypatch, tmp_path, model):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "model")
    rows(tmp_path / "long.jsonl", "a" * 500)
    (tmp_path / "base.yaml").write_text(CONFIG.read_text())
    (tmp_path / "run.yaml").write_text("extends: ~/base.yaml\nmodel: {path: ~/model}\ndata: {train: ~/long.jsonl}\n")
    code, message = run(capsys, monkeypatch, "train", "~/run.yaml", "run_dir=~/zz", "data.max_prompt_tokens=96")
    assert code == 2, message
    assert f"{tmp_path / 'long.jsonl'} row 0" in message
    assert not (tmp_path / "~").exists()
    for command in (["convert", "to-megatron", "~/none", "~/out"], ["checkpoint", "verify", "~/none"]):
        code, message = run(capsys, monkeypatch, *command)
        assert (code, f"{tmp_path / 'none'}" in message) == (2, True), message
    code, message = run(capsys, monkeypatch, "plan", "~/run.yaml", "--model-config", "~/none.json")
    assert f"{tmp_path / 'none.json'}" in message
    code, message = run(capsys, monkeypatch, "plan", "~nobodyatall/run.yaml")
    assert (code, "no home directory is known for '~nobodyatall'" in message) == (2, True)


def test_a_broken_tokenizer_is_the_inputs_fault(capsys, monkeypatch, tmp_path, model):
    """tokenizers raises plain Exceptions."""
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": {"type": "Unheard"}}))
    data = rows(tmp_path / "two.jsonl", "q")
    words = [f"model.path={broken}", f"data.eval={data}", f"run_dir={tmp_path / 'run'}"]
    code, message = run(capsys, monkeypatch, "eval", CONFIG, *words)
    assert (code, message.count("error: ")) == (2, 1), message
    assert f"{broken} holds no tokenizer that transformers can load" in message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["run_dir=/proc/none/run"], "run_dir=/proc/none/run cannot be written: "),
        (["run_dir={file}/run"], "cannot be written: "),
        (["sft.output={file}/model", "run_dir={folder}/run"], "is a file; give a directory"),
        (["sft.output={file}", "run_dir={folder}/run"], "is a file; give a directory"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_start(capsys, monkeypatch, tmp_path, model, overrides, told):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n")
    words = [each.format(file=path, folder=tmp_path) for each in overrides]
    code, message = run(capsys, monkeypatch, "sft", CONFIG, f"model.path={model}", f"data.train={path}", *words)
    assert (code, message.count("\n"), told in message) == (2, 1, True), message
