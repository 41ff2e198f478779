"""A run directory with a few trajectories, whose text would do harm if it became markup."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ctpo_megatron.record.token_files import TokenFiles, TokenRecord
from ctpo_megatron.record.trajectories import TrajectoryFiles
from ctpo_megatron.types import AttemptId, Branch, GroupId, Prompt, Status, Trajectory, TrajectoryGroup, Turn

HOSTILE = "</script><script>window.harmed=1</script><img src=x onerror='window.harmed=1'>\u202egnp.exe\x1b[31m"
SPECIAL, HARM = 256, 257  # <|end|>, and a token that is markup by itself


def text_ids(text: str) -> list[int]:
    """Ids of the tokenizer below: one for each byte."""
    return list(text.encode())


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer.json as published ones are written, one token a byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {byte: chr(byte) for byte in plain}
    names |= {byte: chr(0x100 + place) for place, byte in enumerate(each for each in range(256) if each not in plain)}
    added = [{"id": SPECIAL, "content": "<|end|>", "special": True}, {"id": HARM, "content": HOSTILE, "special": False}]
    model = {"type": "BPE", "vocab": {name: byte for byte, name in names.items()}, "merges": []}
    directory.mkdir(parents=True, exist_ok=True)
    whole = {"added_tokens": added, "decoder": {"type": "ByteLevel"}, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")


def trajectory(group: int, place: int, text: str, reward: float, *, version: int = 0) -> Trajectory:
    """The policy says `text`, a tool answers, and the policy says "done"."""
    said, told, end = text_ids(text), [*text_ids("tool <b>bold</b>"), HARM, SPECIAL], [*text_ids("done"), SPECIAL]
    turns = [
        Turn("assistant", said, [-0.5] * len(said), [version] * len(said)),
        Turn("tool", told, [0.0] * len(told), [-1] * len(told)),
        Turn("assistant", end, [-3.0] * 5, [version + 1] * 5),
    ]
    made = Trajectory(group, text_ids("What?"), turns, Status.FINISHED, text, reward, 1, id=AttemptId(GroupId(group), place))
    if place == 1:
        made.branches = [Branch(text_ids("Else?"), [Turn("assistant", text_ids("aside"), [-1.0] * 5, [version] * 5)])]
    return made


def write_step(run_dir: Path, step: int, *texts: str, tokens: bool = True) -> None:
    """One training step of one group with a trajectory for each text, whose rewards are 0, 1, 2 and so on."""
    made = [trajectory(step, place, text, float(place), version=step - 1) for place, text in enumerate(texts)]
    run_dir.mkdir(parents=True, exist_ok=True)
    prompt = Prompt(step, ({"role": "user", "content": "What?"},), "42", source="contest")
    TrajectoryFiles(run_dir, step).write("step", step, [TrajectoryGroup(prompt, made, id=GroupId(step))])
    with (run_dir / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps({"step": step, "group": str(GroupId(step)), "prompt": prompt.key}) + "\n")
    if tokens:
        TokenFiles(run_dir, step).write(step, record_of(made))


def record_of(made: list[Trajectory]) -> TokenRecord:
    """What training made of them: the first tokens of each sample are clipped, and drift grows with the trajectory's place."""
    lengths = [length for each in made for length in each.sampled_lengths]
    places = np.concatenate([np.arange(length) for length in lengths])
    trajectory_of = np.concatenate([np.full(each.sampled_length, place) for place, each in enumerate(made)])
    fate = np.where(places < 2, 1, 0).astype(np.uint8)
    return TokenRecord(np.array(lengths), 0.01 * (1 + trajectory_of), 0.001 * places, fate)
