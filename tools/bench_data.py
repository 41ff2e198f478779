"""Time and memory that a file of prompts needs before a run, per row, against reading it row by row.

.venv/bin/python tools/bench_data.py [--rows 200000] [--times 100] [--model DIRECTORY]

The file is made here and has the shape of DAPO's published one: five columns, and every prompt many times over. Row by row means:
all columns as Python objects, each row checked, each prompt rendered and tokenized for itself. Each way has a process of its own;
memory is what its peak gained, and time is the processor's, of all threads together. Absolute numbers differ between machines;
compare the ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ctpo_megatron.data.prompts import check_prompt_lengths, read_prompts
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.types import Prompt

WORDS = (
    "let",
    "the",
    "sum",
    "of",
    "all",
    "positive",
    "integers",
    "such",
    "that",
    "x",
    "is",
    "a",
    "root",
    "triangle",
    "area",
    "ratio",
)
PLAIN_LENGTHS = 5000  # rows that the row-by-row way tokenizes; the others would take as long each


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--times", type=int, default=100, help="how often each prompt is there")
    parser.add_argument("--model", type=Path, help="whose tokenizer counts; default: the toy's")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = make_file(Path(folder) / "prompts.parquet", asked.rows, asked.times)
        model = asked.model or make_toy_model(Path(folder) / "model", seed=1, hidden=16, layers=1, ffn=16, heads=2, kv_heads=1)
        ways: dict[str, Callable[[Path, Path], Sequence[float]]] = {"row by row": row_by_row, "read_prompts": product}
        found = {name: in_a_process(way, file, model) for name, way in ways.items()}
    print(f"{asked.rows:,} rows, each prompt {asked.times} times; per row:")
    print(f"{'':14}{'reading, us':>14}{'lengths, us':>14}{'together, us':>14}{'memory, KB':>14}")
    table = {name: (read, lengths, read + lengths, memory) for name, (read, lengths, memory) in found.items()}
    for name, row in table.items():
        print(f"{name:14}" + "".join(f"{value:14.2f}" for value in row))
    one, other = table.values()
    print(f"{'ratio':14}" + "".join(f"{b / a:14.3f}" for a, b in zip(one, other, strict=True)))


def make_file(path: Path, rows: int, times: int) -> Path:
    """Write `rows` rows, in which every prompt is there `times` times, and return `path`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(1)

    def row(number: int) -> dict:
        text = "Solve the following problem step by step. " + " ".join(draw.choices(WORDS, k=draw.randint(40, 120)))
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": text, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(draw.randint(-999, 999)), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{draw.getrandbits(128):032x}-{number}"},
        }

    distinct = [row(number) for number in range(max(1, rows // times))]
    table = pa.Table.from_pylist(distinct)
    pq.write_table(pa.concat_tables([table] * times).slice(0, rows), path)
    return path


def in_a_process(way: Callable[[Path, Path], Sequence[float]], file: Path, model: Path) -> Sequence[float]:
    """What `way` returns in a process of its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(way, (file, model))


def row_by_row(file: Path, model: Path) -> Sequence[float]:
    """Microseconds of reading and of lengths, and kilobytes, of each row: everything for every row."""
    import pyarrow.parquet as pq

    chat = warm(model)
    memory, begun = Memory(), time.process_time()
    prompts = []
    for index, row in enumerate(pq.ParquetFile(file).read().to_pylist()):
        messages = tuple({"role": each["role"], "content": each["content"]} for each in row["prompt"])
        prompts.append(Prompt(index, messages, str(row["reward_model"]["ground_truth"])))
    read = time.process_time() - begun
    sample = prompts[:PLAIN_LENGTHS]
    begun = time.process_time()
    for prompt in sample:
        len(chat.prompt_ids(prompt.messages))
    return per_row(read, len(prompts)), per_row(time.process_time() - begun, len(sample)), memory.gained() / len(prompts)


def product(file: Path, model: Path) -> Sequence[float]:
    """The same of what a run does."""
    chat = warm(model)
    memory, begun = Memory(), time.process_time()
    prompts = read_prompts(file)
    read = time.process_time() - begun
    begun = time.process_time()
    check_prompt_lengths(prompts, chat, max_tokens=1 << 20, path=file)
    lengths = time.process_time() - begun
    return per_row(read, len(prompts)), per_row(lengths, len(prompts)), memory.gained() / len(prompts)


def warm(model: Path) -> ChatTokenizer:
    """The tokenizer, with all that is imported at first use imported."""
    chat = ChatTokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        file = make_file(Path(folder) / "few.parquet", 100, 2)
        check_prompt_lengths(read_prompts(file), chat, max_tokens=1 << 20, path=file)
    return chat


def per_row(seconds: float, rows: int) -> float:
    """Microseconds."""
    return seconds / rows * 1e6


class Memory:
    """Kilobytes that this process holds at most from here on, beyond what it holds now."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew (Linux)
        self._before = self._read("VmRSS")

    def gained(self) -> float:
        """The peak since it was made, less what was held then."""
        return self._read("VmHWM") - self._before

    @staticmethod
    def _read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
