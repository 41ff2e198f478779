"""TRL's side of tools/bench_loop.py, run in an environment that has it: GRPOTrainer with transformers' generate, on CPUs.

    python tools/bench_loop_trl.py MODEL PROMPTS.parquet OUT.json MAX_TOKENS ITERATIONS

Writes seconds and sampled tokens of each iteration of 128 samples in groups of 8 and 4 optimizer steps.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet
from bench_loop_reward import score

SAMPLES, GROUP, OPTIMIZER_STEPS = 128, 8, 4


def main() -> None:
    """See the module's docstring."""
    from transformers import TrainerCallback

    trl: Any = importlib.import_module("trl")  # which only this program's environment has
    datasets: Any = importlib.import_module("datasets")
    model, prompts, out, max_tokens, iterations = sys.argv[1:]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_options: Any) -> None:
            ends.append(time.monotonic())

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_options: Any) -> None:
            if state.global_step % OPTIMIZER_STEPS == 0:
                ends.append(time.monotonic())

    def reward(completions: list[Any], **_options: Any) -> list[float]:
        return [score(each[0]["content"]) for each in completions]

    rows = [{"prompt": prompt} for prompt in pyarrow.parquet.read_table(prompts)["prompt"].to_pylist()]
    with tempfile.TemporaryDirectory() as scratch:
        options = trl.GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=SAMPLES // OPTIMIZER_STEPS,
            gradient_accumulation_steps=1,
            steps_per_generation=OPTIMIZER_STEPS,
            num_generations=GROUP,
            max_completion_length=int(max_tokens),
            max_steps=OPTIMIZER_STEPS * int(iterations),
            temperature=1.0,
            beta=0.0,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=reward, args=options, train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()]
        )
        trainer.train()
    means = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    tokens = [mean * SAMPLES for mean in means]  # logged once for all that was sampled together
    seconds = [after - before for before, after in pairwise(ends)]
    Path(out).write_text(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
