"""Whether a model answers in plain transformers as it did in a run's last evaluation, token for token, where that was greedy.

    .venv/bin/python tools/same_answers.py runs/smollm2/model runs/smollm2/rollouts/eval_00000024.jsonl

Exit code 1 where an answer differs: the exported weights are not those that were evaluated, or the engine computes otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

BATCH = 16


class Answer(NamedTuple):
    """A prompt and what followed it, as token ids."""

    prompt: list[int]
    written: list[int]


def main(
    model: Annotated[Path, typer.Argument(help="directory in Hugging Face format")],
    rollouts: Annotated[Path, typer.Argument(help="an evaluation's trajectories, RUN_DIR/rollouts/eval_*.jsonl")],
    rows: Annotated[int, typer.Option(min=1, help="how many of them, from the first")] = 64,
    out: Annotated[Path | None, typer.Option(help="file for the two counts, as JSON")] = None,
) -> None:
    """Compare the answers."""
    expected = read_answers(rollouts)[:rows]
    found = greedy(model, expected)
    differ = [number for number, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other.written]
    print(f"{len(expected) - len(differ)} of {len(expected)} answers are the same in transformers, token for token")
    for number in differ[:3]:
        print(f"row {number}: transformers writes {found[number]}, the engine wrote {expected[number].written}", file=sys.stderr)
    if out is not None:
        out.write_text(json.dumps({"answers": len(expected), "same": len(expected) - len(differ)}) + "\n")
    raise typer.Exit(int(bool(differ)))


def read_answers(rollouts: Path) -> list[Answer]:
    """The trajectories of one turn that a file holds."""
    rows: Iterator[dict[str, Any]] = (json.loads(line) for line in rollouts.read_text(encoding="utf-8").splitlines())
    return [Answer(row["prompt_ids"], row["turns"][0]["token_ids"]) for row in rows if len(row["turns"]) == 1]


def greedy(model_path: Path, answers: Sequence[Answer]) -> list[list[int]]:
    """What the model writes after each prompt, its end token included, and at most as much as the longest answer has.

    In float32. Prompts of one batch are filled up on the left.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, local_files_only=True).eval()
    ends = model.generation_config.eos_token_id
    stop = {ends} if isinstance(ends, int) else set(ends)
    found: list[list[int]] = []
    for first in range(0, len(answers), BATCH):
        batch = answers[first : first + BATCH]
        width = max(len(answer.prompt) for answer in batch)
        ids = torch.tensor([[min(stop)] * (width - len(answer.prompt)) + answer.prompt for answer in batch])
        given = torch.tensor([[0] * (width - len(answer.prompt)) + [1] * len(answer.prompt) for answer in batch])
        longest = max(len(answer.written) for answer in batch)
        with torch.inference_mode():
            rows = model.generate(input_ids=ids, attention_mask=given, max_new_tokens=longest, do_sample=False)
        for row in rows[:, width:].tolist():
            found.append(row[: next((place + 1 for place, id_ in enumerate(row) if id_ in stop), len(row))])
    return found


if __name__ == "__main__":
    typer.run(main)
