"""Write a made run directory with many trajectories, for measuring `ctpo report`: rollouts, tokens, ledger and a tokenizer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ctpo_megatron.record.token_files import TokenFiles, TokenRecord
from ctpo_megatron.record.trajectories import TrajectoryFiles
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Status, Trajectory, TrajectoryGroup, Turn

WORDS = 150_000  # of the tokenizer
TOOL = 40  # tokens that the tool says
GROUP = 8


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("directory", type=Path, help="the run directory; made if missing")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trajectories", type=int, default=64, help="of a step")
    parser.add_argument("--tokens", type=int, default=8000, help="that the policy writes in a trajectory, on average")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    write_run(args.directory, args.steps, args.trajectories, args.tokens)


def write_run(run_dir: Path, steps: int, trajectories: int, tokens: int) -> None:
    """Write `steps` steps of `trajectories` trajectories with about `tokens` tokens each."""
    drawn = np.random.default_rng(1)
    _write_tokenizer(run_dir / "model")
    rows, records = TrajectoryFiles(run_dir), TokenFiles(run_dir)
    with (run_dir / "ledger.jsonl").open("w") as ledger:
        for step in range(1, steps + 1):
            groups = [_group(drawn, step, number, tokens) for number in range(trajectories // GROUP)]
            rows.write("step", step, groups)
            lengths = np.array([each.sampled_length for group in groups for each in group.trajectories], np.int64)
            records.write(step, _record(drawn, lengths))
            for group in groups:
                ledger.write(json.dumps({"step": step, "group": str(group.id), "prompt": group.prompt.key}) + "\n")


def _group(drawn: np.random.Generator, step: int, number: int, tokens: int) -> TrajectoryGroup:
    name = GroupId((step - 1) * 10_000 + number)
    prompt = Prompt(number, ({"role": "user", "content": "?"},), "42", source=("", "contest")[number % 2])
    made = [_trajectory(drawn, AttemptId(name, place), step, tokens) for place in range(GROUP)]
    return TrajectoryGroup(prompt, made, id=name)


def _trajectory(drawn: np.random.Generator, name: AttemptId, step: int, tokens: int) -> Trajectory:
    length = max(2, int(drawn.normal(tokens, tokens / 8)))
    first = length // 2
    turns = [
        _sampled(drawn, first, step),
        Turn("tool", _ids(drawn, TOOL), [0.0] * TOOL, [-1] * TOOL),
        _sampled(drawn, length - first, step),
    ]
    right = bool(drawn.random() < 0.5)
    text = " ".join(f"w{each}" for turn in turns for each in turn.token_ids)
    status = Status.FINISHED if right else Status.LENGTH
    return Trajectory(0, _ids(drawn, 200), turns, status, text, float(right), 1, given="42" if right else None, id=name)


def _sampled(drawn: np.random.Generator, length: int, step: int) -> Turn:
    logp = (-drawn.exponential(0.4, length)).astype(np.float32).astype(float).tolist()
    versions = [max(0, step - 2)] * (length // 3) + [step - 1] * (length - length // 3)
    return Turn("assistant", _ids(drawn, length), logp, versions)


def _ids(drawn: np.random.Generator, length: int) -> list[int]:
    """Returns ids that are as uneven as words of a language."""
    ids: list[int] = (drawn.zipf(1.2, length) % WORDS).tolist()
    return ids


def _record(drawn: np.random.Generator, lengths: np.ndarray) -> TokenRecord:
    total = int(lengths.sum())
    fate = drawn.choice(np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 2], np.uint8), total)
    return TokenRecord(lengths, drawn.normal(0, 0.01, total), drawn.normal(0, 0.1, total), fate)


def _write_tokenizer(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    vocabulary = {f"\u0120w{number}": number for number in range(WORDS)}
    tokenizer = {
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "added_tokens": [],
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


if __name__ == "__main__":
    main()
