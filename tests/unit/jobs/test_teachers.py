"""Teachers are compared with the model by their files before anything starts."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError, InputError, ModelError
from ctpo_megatron.jobs.teachers import ask_teachers, check_teachers, open_teachers
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.toy.model import make_toy_model

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart_distill.yaml"
SERVED = "algorithm.distillation.teachers=[{name: big, type: served, path: %s, urls: ['http://127.0.0.1:9']%s}]"
COPIED = "algorithm.distillation.teachers=[{name: big, type: copied, path: %s}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_model(tmp_path_factory.mktemp("made"), seed=1)


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def teacher(model: Path) -> Path:
    return Path(shutil.copytree(model, model.with_name("teacher")))


def change(directory: Path, file: str, **values: object) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def check(model: Path, teacher: str, *overrides: str) -> None:
    check_teachers(load_config(CONFIG, [f"model.path={model}", teacher, *overrides]), read_hf_config(model))


def other_token(teacher: Path) -> None:
    described = json.loads((teacher / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    first, second = list(vocab)[5:7]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (teacher / "tokenizer.json").write_text(json.dumps(described))


def no_tokenizer(teacher: Path) -> None:
    (teacher / "tokenizer.json").unlink()
    (teacher / "tokenizer_config.json").write_text("{}")


def test_teachers_of_the_same_tokens_are_taken(model: Path, teacher: Path) -> None:
    check(model, COPIED % teacher)
    change(teacher, "config.json", num_hidden_layers=7, hidden_size=999)
    check(model, SERVED % (teacher, ""))


@pytest.mark.parametrize("kind", [COPIED, SERVED.replace("]%s", "]")])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [(other_token, "2 of 2"), (no_tokenizer, "tokenizers that cannot be compared")],
)
def test_another_vocabulary(model: Path, teacher: Path, kind: str, break_it: Callable[[Path], None], message: str) -> None:
    break_it(teacher)
    with pytest.raises(ModelError) as refused:
        check(model, kind % teacher)
    assert "teacher 'big'" in str(refused.value)
    assert message in str(refused.value)


def test_tokenizers_in_one_file_are_compared_byte_by_byte(model: Path, teacher: Path) -> None:
    for directory in (model, teacher):
        no_tokenizer(directory)
        (directory / "tokenizer.model").write_bytes(b"pieces")
    check(model, COPIED % teacher)
    (teacher / "tokenizer.model").write_bytes(b"piecez")
    with pytest.raises(ModelError, match="cannot be compared"):
        check(model, COPIED % teacher)


def test_a_copied_teacher_of_another_shape(model: Path, teacher: Path) -> None:
    change(teacher, "config.json", intermediate_size=64)
    with pytest.raises(ConfigError, match=r"'big': .* has another shape than .*; serve it with SGLang and use type: served"):
        check(model, COPIED % teacher)


@pytest.mark.parametrize(("kind", "limit"), [(COPIED, 191), (SERVED.replace("]%s", "]"), 184)])
def test_a_context_that_is_too_short(model: Path, teacher: Path, kind: str, limit: int) -> None:
    change(teacher, "config.json", max_position_embeddings=191)
    with pytest.raises(ConfigError, match=f"'big' reads at most {limit} tokens, but .* = 192"):
        check(model, kind % teacher)


def test_fewer_rows_than_tokens(model: Path, teacher: Path) -> None:
    change(teacher, "config.json", vocab_size=40)
    with pytest.raises(ConfigError, match=r"vocab_size=40, but its tokenizer needs \d+"):
        check(model, SERVED % (teacher, ""))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read: FileNotFoundError"), (b"two words\n", "one key in it"), (b"\xff", "Unicode")]
)
def test_a_key_that_cannot_be_used(model: Path, teacher: Path, content: bytes | None, message: str) -> None:
    key = teacher / "key"
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(ConfigError, match=f"'big': key_file={key}.*{message}"):
        check(model, SERVED % (teacher, f", key_file: {key}"))


def test_a_server_that_is_not_there_is_an_input_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.teachers.FIRST_PAUSE_S", 0.01)
    config = load_config(CONFIG, [f"model.path={model}", SERVED % (model, "")])
    with pytest.raises(InputError, match=r"'big' was tried with 192 tokens.* at http://127.0.0.1:9 did not answer, tried 3"):
        asyncio.run(ask_teachers(config))


def test_a_run_without_teachers_on_servers_opens_and_asks_none(model: Path) -> None:
    async def scenario() -> object:
        config = load_config(CONFIG, [f"model.path={model}"])
        await ask_teachers(config)
        async with open_teachers(SimpleNamespace(config=config)) as teachers:
            return teachers

    assert asyncio.run(scenario()) is None
