"""Where a run begins behind a checkpoint, and what is told about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config, load_config
from ctpo_megatron.data.mixture import new_sampler
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.errors import ConfigError, DataError, InputError
from ctpo_megatron.jobs.resume import Start, checkpoint_to_resume, differences, start_of
from ctpo_megatron.loop.checkpoints import Resumable
from ctpo_megatron.loop.state import RunState
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.record.events import Event, SettingDiffers, SettingsUnknown, discard
from ctpo_megatron.types import Prompt
from tests.support.checkpoints import write_checkpoint
from tests.support.qwen import QWEN3
from tests.support.runs import ROOT

PROMPTS = [Prompt(i, ({"role": "user", "content": str(i)},), "1") for i in range(20)]
DONE = 6  # prompts
SHAPE = parse_config(QWEN3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The description of a model, as far as it is compared."""
    directory = tmp_path / "model"
    directory.mkdir()
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<end>"}]}
    files = {"config.json": QWEN3, "tokenizer.json": tokenizer, "tokenizer_config.json": {"eos_token": "<end>"}}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def config(model: Path, *overrides: str) -> RunConfig:
    fixed = ["train.steps=5", "train.prompts_per_step=4", "train.optimizer_steps=2", f"run_dir={model.parent / 'run'}"]
    return load_config(ROOT / "configs" / "quickstart.yaml", [*fixed, f"model.path={model}", *overrides])


def saved(model: Path, *, with_config: bool = True, optimizer_steps: int = 4, **state: Any) -> Resumable:
    """A run that was saved after two steps of three prompts."""
    was = config(model)
    sampler = PromptSampler(PROMPTS, was.seed)
    sampler.next(DONE)
    done = RunState(**{"step": 2, "groups": DONE, "cursor": sampler.state(), "accuracies": {0: 0.5}, "samples": 24, **state})
    root, resolved = Path(was.run_dir) / "checkpoints", dump_config(was) if with_config else None
    write_checkpoint(root, 2, done, resolved=resolved, model=model, optimizer_steps=optimizer_steps)
    found = checkpoint_to_resume(was, True, discard)
    assert found is not None
    return found


def begin(
    found: Resumable, wanted: RunConfig, prompts: list[Prompt] = PROMPTS, shape: Any = SHAPE
) -> tuple[Start, dict[str, SettingDiffers]]:
    events: list[Event] = []
    start = start_of(wanted, prompts, found, differences(found, wanted, shape, events.append), events.append)
    return start, {each.key: each for each in events if isinstance(each, SettingDiffers)}


def following(start: Start, count: int) -> list[int]:
    return [start.admission.next(start.step).prompt.index for _ in range(count)]


def test_a_run_goes_on_where_it_was_and_tells_nothing_when_nothing_differs(model: Path) -> None:
    start, told = begin(saved(model), config(model))
    assert told == {}
    assert following(start, 14) == [p.index for p in PromptSampler(PROMPTS, 1).next(20)[DONE:]]
    assert (start.step, start.samples, start.accuracies, start.total_steps) == (2, 24, {0: 0.5}, 10)


def test_every_setting_that_differs_is_told(model: Path) -> None:
    wanted = config(model, "optimizer.lr=5e-5", "rollout.group_size=2", "seed=9", "sft.steps=1", "train.steps=7")
    start, told = begin(saved(model), wanted)
    effects = {key: each.effect for key, each in told.items()}
    assert effects.pop("sft.steps") == "none"
    assert effects == dict.fromkeys(("optimizer.lr", "rollout.group_size", "seed", "train.steps"), "applies")
    rest = following(start, 14)
    assert sorted(rest) == sorted(p.index for p in PromptSampler(PROMPTS, 1).next(20)[DONE:])
    assert start.total_steps == 14


@pytest.mark.parametrize(
    ("made", "overrides", "total"),
    [
        (4, [], 10),  # 4 are made, 3 training steps of 2 to come
        (16, [], 22),  # made by 8 in each training step
        (4, ["train.optimizer_steps=4"], 16),
        (4, ["train.steps=3", "train.optimizer_steps=1"], 5),
    ],
)
def test_the_schedule_spans_what_was_made_and_what_is_to_come(model: Path, made: int, overrides: list[str], total: int) -> None:
    start, _ = begin(saved(model, optimizer_steps=made), config(model, *overrides))
    assert start.total_steps == total
    with pytest.raises(ConfigError, match=f"has {total} optimizer steps; it needs at least {total + 1}"):
        begin(saved(model, optimizer_steps=made), config(model, *overrides, f"optimizer.warmup_steps={total + 1}"))


def test_the_same_prompts_in_another_file_go_on(model: Path) -> None:
    start, told = begin(saved(model), config(model, "data.train=copied.jsonl", "data.allow_change=true"))
    assert told["data.train"].effect == "none"
    assert "the prompts are the same" in told["data.train"].sentence
    assert following(start, 3) == [p.index for p in PromptSampler(PROMPTS, 1).next(9)[DONE:]]


def test_other_prompts_that_are_wanted_are_counted_from_their_first_on(model: Path) -> None:
    others = PROMPTS[5:]
    with pytest.raises(DataError, match=r"20 prompts in the checkpoint, 15 with other contents now: refused"):
        begin(saved(model), config(model), others)
    start, told = begin(saved(model), config(model, "data.allow_change=true", "data.system_prompt=Now"), others)
    assert {key: each.effect for key, each in told.items()} == dict.fromkeys(
        ("data.allow_change", f"prompts of {config(model).data.train}", "data.system_prompt"), "applies"
    )
    admitted = start.admission.next(2)
    prompt = admitted.prompt
    assert admitted.id.number == DONE  # ids go on
    assert prompt == PromptSampler(others, 1).next(1)[0]
    assert sorted([prompt.index, *following(start, 14)]) == [each.index for each in others]


def test_other_sources_are_told_by_name_and_their_weights_may_change(model: Path) -> None:
    """Not as other rows: these are the same."""
    more = [*PROMPTS, *(Prompt(i, ({"role": "user", "content": f"hard {i}"},), "1", "hard") for i in range(3))]
    mixture = "data.mixture=[{name: hard, path: h.jsonl, weight: 2}]"
    changed = r'sources and pools of the prompts: \["data.train alone"\] in the checkpoint, \["hard", "train"\] now: refused'
    with pytest.raises(DataError, match=changed):
        begin(saved(model), config(model, mixture), more)
    pools = "data.pools={borders: [0.5], weights: [1, 1, 1]}"
    with pytest.raises(DataError, match=r'\["data.train alone"\] in the checkpoint, \["train"\] now: refused'):
        begin(saved(model), config(model, pools))
    before = new_sampler(more, config(model, mixture).data, 1)
    before.next(DONE)
    found = saved(model, cursor=before.state())
    with pytest.raises(DataError, match=r"prompts of .*, h.jsonl: 23 prompts in the checkpoint, 22 with other contents now"):
        begin(found, config(model, mixture), more[:-1])
    start, told = begin(found, config(model, mixture.replace("2}", "1}")), more)
    assert told["data.mixture"].effect == "applies"
    assert "weights count from now on" in told["data.mixture"].sentence
    assert [key for key in told if "prompts" in key] == []
    assert start.admission.next(2).id.number == DONE


def test_a_checkpoint_of_an_earlier_release_goes_on(model: Path) -> None:
    """It has no configuration, its position names one seed, and samples were not counted."""
    cursor = PromptSampler(PROMPTS, 1).state() | {"position": DONE, "seed": 1}
    del cursor["seeds"]
    found = saved(model, with_config=False, cursor=cursor, samples=None)
    events: list[Event] = []
    wanted = config(model, "seed=2", "optimizer.lr=5e-5")
    start = start_of(wanted, PROMPTS, found, differences(found, wanted, SHAPE, events.append), events.append)
    unknown, seed = events
    assert isinstance(unknown, SettingsUnknown)
    assert "seed: 1 in the checkpoint, 2 now: applies" in seed.sentence
    assert start.samples is None
    assert sorted(following(start, 14)) == sorted(p.index for p in PromptSampler(PROMPTS, 1).next(20)[DONE:])
    with pytest.raises(InputError, match="vocab_size: 300 in the checkpoint, 301 now: refused"):
        differences(found, wanted, parse_config(QWEN3 | {"vocab_size": 301}), discard)


def test_files_of_the_tokenizer_are_compared(model: Path) -> None:
    found, there = saved(model), model.parent / "elsewhere"
    shutil.copytree(model, there)
    (there / "chat_template.jinja").write_text("{{ messages }}")
    (there / "tokenizer_config.json").unlink()
    tokenizer = json.loads((there / "tokenizer.json").read_text())
    (there / "tokenizer.json").write_text(json.dumps(tokenizer, indent=4))  # the same ids
    _, told = begin(found, config(there, f"run_dir={model.parent / 'run'}"))
    found_words = {key: (each.before == "absent", each.now == "absent", each.effect) for key, each in told.items()}
    assert found_words == {
        "model.path": (False, False, "applies"),
        "chat_template.jinja in model.path": (True, False, "applies"),
        "tokenizer_config.json in model.path": (False, True, "applies"),
        "tokenizer.json in model.path": (False, False, "applies"),
    }
    tokenizer["added_tokens"][0]["content"] = "<stop>"
    (there / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="token ids mean other texts"):
        begin(found, config(there))


def test_a_description_that_is_damaged_is_not_gone_on_from(model: Path) -> None:
    found = saved(model)
    file = found.checkpoint / "config.yaml"
    file.write_bytes(file.read_bytes().replace(b"lr: 0.00015", b"lr: 0.00016"))
    with pytest.raises(InputError, match="no checkpoint in"):
        checkpoint_to_resume(config(model), True, discard)
    assert (found.checkpoint.parent / "step_00000002.damaged").is_dir()
