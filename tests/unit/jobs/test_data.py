"""`ctpo data`: what a user is told of files sound and unsound, and that it refuses what a run would refuse, in the same words."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron import cli
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.rewards import MathReward
from ctpo_megatron.jobs.data import data_job
from ctpo_megatron.jobs.data_text import visible
from ctpo_megatron.jobs.gold_answers import judge_answers
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from ctpo_megatron.types import Prompt

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"


def asked(question: str, answer: object = "2", **columns: object) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": question}], "reward_model": {"ground_truth": answer}, **columns}


def shown(*messages: tuple[str, str], **columns: object) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **columns}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("look")
    task = make_toy_task(root, seed=1, train_rows=40, eval_rows=6, sft_rows=5)
    return {
        "model.path": make_toy_model(root / "model", seed=1),
        "data.train": task.train,
        "data.eval": task.eval,
        "sft": task.sft,
    }


@pytest.fixture
def command(capsys, monkeypatch, tmp_path, good):
    """Runs a command on good inputs with `overrides` on top; returns its exit code, what it printed, and its error message."""

    def run(*overrides: str, name: str = "data", options: tuple[str, ...] = ()) -> tuple[object, str, str]:
        words = [f"{key}={value}" for key, value in good.items() if key != "sft"]
        words += [f"run_dir={tmp_path / 'run'}", "rollout.tool.type=calculator", *overrides]
        monkeypatch.setattr(cli, "opened_nursery", lambda _: contextlib.nullcontext())  # nothing here has servers
        monkeypatch.setattr(sys, "argv", ["ctpo", name, str(CONFIG), *words, *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not (tmp_path / "run").exists()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err[captured.err.find("error: ") :] if end.value.code else ""

    return run


@pytest.fixture
def rows(tmp_path):
    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def test_a_sound_file_fits_on_a_screen(command):
    code, out, _ = command()
    assert code == 0
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 120
    assert not any(line.endswith(" ") for line in out.splitlines())
    assert "\x1b" not in out
    for words in (
        "quickstart: 40 prompts to train on, 6 to evaluate on",
        "prompt, reward_model; not used: data_source, ability, extra_info",
        "different ones, put in a box, are accepted by their own grader; all numbers",
        "16 steps of 32 rows: 13 times through the file",
        "stop tokens   <|im_end|> (257), which ends a turn",
        "`ctpo train` would take this data and this model.",
    ):
        assert words in out
    sample = out[out.index("train.parquet, row 0:") : out.index("train.parquet, row 1:")].splitlines()[1:]
    written = [line.split() for line in sample if line]
    assert [words[1] if words[0] == "*" else words[0] for words in written] == [
        "template", "user", "template", "assistant", "assistant", "template", "tool", "template", "assistant", "assistant",
    ]  # fmt: skip
    assert [words[0] == "*" for words in written] == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2


def test_a_single_turn_is_not_shown_with_a_tool(command):
    _, out, _ = command("rollout.tool=null")
    assert "(what the model writes)" in out
    assert "(what its program prints)" not in out


def test_json_holds_all_of_it_and_nothing_else_is_printed(command, rows):
    long = "many words, " * 300
    path = rows(asked(long), asked("1+1?"), asked("1+1?", "\\frac{1}{2"))
    code, out, _ = command(f"data.train={path}", "data.max_prompt_tokens=3990", "train.max_tokens_per_micro_batch=5000",
                             "data.eval=null", options=("--json", "--samples", "3"))  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert out.isascii()
    (file,) = found["files"]
    assert (file["rows"], file["different"], found["problem"]) == (3, 2, None)
    assert [part["text"] for part in file["samples"][0]["parts"] if part["author"] == "user"] == [long]
    assert file["measures"][0]["lengths"]["most"] == len(long) + 3
    assert file["repeats"]["contradictions"] == [[1, 2]]
    assert [(each["answer"], each["rows"]) for each in file["answers"]["rejected"]] == [("\\frac{1}{2", [2])]
    assert found["model"]["stop_tokens"] == [{"id": 257, "text": "<|im_end|>"}]


def test_demonstrations_are_shown_with_what_is_trained_on(command, good):
    code, out, _ = command(f"data.train={good['sft']}", "data.eval=null", options=("--samples", "1"))
    assert code == 0
    assert "quickstart: 5 demonstrations" in out
    taught = [line for line in out.splitlines() if line.startswith("*  ")]
    assert "```python" in taught[0]
    assert "\\boxed{" in taught[-2]
    assert [line.split()[-3:] for line in taught if "<|im_end|>" in line] == [["ends", "the", "turn"]] * 2
    assert [line.split()[0] for line in out.splitlines() if "<|user|>" in line or "<|tool|>" in line] == ["template"] * 2
    code, out, _ = command(f"data.train={good['sft']}", "data.eval=null", options=("--json",))
    (file,) = json.loads(out)["files"]
    for sample in file["samples"]:
        tokens = sum(len(part["text"].encode()) if not part["ends_turn"] else 1 for part in sample["parts"] if part["trained"])
        assert tokens == sample["trained"]  # bytes are tokens here


def test_sources_of_demonstrations_and_held_out_ones_are_looked_at(command, rows):
    one = rows(shown(("user", "1+1?"), ("assistant", "2")), shown(("user", "2+2?"), ("assistant", "4")), name="one.jsonl")
    two = rows(shown(("user", "3+3?"), ("assistant", "6"), ("user", "4+4?"), ("assistant", "8")), name="two.jsonl")
    held = rows(shown(("user", "5+5?"), ("assistant", "10")), shown(("user", "3+3?"), ("assistant", "six")), name="held.jsonl")
    mixture = f"data.mixture=[{{name: two, path: {two}, weight: 3}}]"
    words = (
        f"data.train={one}",
        "data.eval=null",
        mixture,
        f"sft.eval={held}",
        "sft.epochs=4",
        "sft.batch_size=2",
        "sft.turns=all",
    )
    code, out, _ = command(*words, options=("--json", "--samples", "1"))
    assert code == 0
    files = json.loads(out)["files"]
    assert [(file["use"], file["rows"], file["share"]) for file in files] == [
        ("sft", 2, 0.25),
        ("sft", 1, 0.75),
        ("eval", 2, 1.0),
    ]
    assert files[2]["shared"] == [[1, "two:0"]]
    trained = ["".join(part["text"] for part in file["samples"][0]["parts"] if part["trained"]) for file in files[:2]]
    assert trained == ["2<|im_end|>", "6<|im_end|>8<|im_end|>"]
    out = command(*words)[1]
    assert "6 steps of 2 rows" in out
    assert "ask what a row asks (in brackets) that is trained on: 1 (two:0)" in " ".join(out.split())


def test_the_command_can_be_chosen(command, rows):
    both = rows(shown(("user", "1+1?"), ("assistant", "2")) | asked("1+1?"))
    overrides = (f"data.train={both}", "data.eval=null")
    assert "prompts to train on" in command(*overrides)[1]
    assert "demonstrations" in command(*overrides, options=("--as", "sft"))[1]


def test_what_is_odd_in_a_file_is_said(command, rows, tmp_path):
    path = rows(asked("1+1?", source="x"), asked("1+1?"), asked("1+1?", "3"), asked("Name it", "#### 7"))
    held_out = rows(asked("other"), asked("1+1?"), name="eval.jsonl")
    code, out, _ = command(f"data.train={path}", f"data.eval={held_out}")
    assert code == 0
    for words in (
        "2 of 4 rows ask what an earlier one asks; row 0 most often, 3 times",
        "1 questions with different answers: rows 0 and 2",
        "1 of 2 rows ask what a row asks (in brackets) that is trained on: 1 (0)",
        "3 of 3 different ones, put in a box, are accepted by their own grader; 2 numbers, 1 others: '#### 7'",
        "rows.jsonl: prompt, reward_model; not used: source",
    ):
        assert words in " ".join(out.split())


def test_each_benchmark_is_looked_at(command, rows):
    path, held_out = rows(asked("1+1?"), name="train.jsonl"), rows(asked("1+2?"), asked("1+3?"), name="eval.jsonl")
    sums, more = rows(asked("1+1?"), name="sums.jsonl"), rows(asked("1+4?"), name="more.jsonl")
    names = (f"eval.benchmarks.sums.file={sums}", f"eval.benchmarks.more.file={more}")
    code, out, _ = command(f"data.train={path}", f"data.eval={held_out}", *names)
    words = " ".join(out.split())
    assert code == 0
    assert "1 prompts to train on, 2 to evaluate on, 1 to evaluate on, 1 to evaluate on" in words
    assert "eval.jsonl, more.jsonl: no row asks what is trained on" in words
    assert "sums.jsonl: 1 of 1 rows ask what a row asks (in brackets) that is trained on: 0 (0)" in words
    assert "no/such.parquet" in command("eval.benchmarks.sums.file=no/such.parquet")[2]


def test_all_files_of_a_mixture_are_looked_at(command, rows):
    """With their shares, what they have in common with held-out rows, and what a run would refuse of them."""
    path, hard = (
        rows(asked("1+1?", level=1), name="train.jsonl"),
        rows(asked("1+2?", level=2), asked("2+2?", level=3), name="h.jsonl"),
    )
    mixture = f"data.mixture=[{{name: hard, path: {hard}, weight: 3}}]"
    held_out = rows(asked("2+2?"), name="eval.jsonl")
    base = (f"data.train={path}", f"data.eval={held_out}", mixture, "train.steps=2", "train.prompts_per_step=8")
    code, out, _ = command(*base, "data.pools={column: level, borders: [2.5], weights: [1, 1]}")
    words = " ".join(out.split())
    assert code == 0
    assert "1 prompts to train on, 2 prompts to train on, 1 to evaluate on" in words
    assert "train.jsonl: 2 steps of 8 rows, 25% of them from here: 4 times through the file" in words
    assert "h.jsonl: 2 steps of 8 rows, 75% of them from here: 6 times through the file" in words
    assert "eval.jsonl: 1 of 1 rows ask what a row asks (in brackets) that is trained on: 0 (hard:1)" in words
    assert "train.jsonl, h.jsonl: prompt, reward_model, level; there are no others" in words
    rows(asked("1+2?", level=2), asked("2+2?", level=None), name="h.jsonl")
    _, _, error = command(*base, "data.pools={column: level, borders: [2.5], weights: [1, 1]}")
    assert "h.jsonl line 2: 'level' is " in error
    assert "data.pools.column needs a number there" in error
    assert "the curriculum decides" in " ".join(command(*base, "data.curriculum=tests.unit.data.curricula:counting")[1].split())
    assert "needed: for ['hard', 'train']" in command(*base, "data.curriculum=tests.unit.data.curricula:wrong_names")[2]
    rows(name="h.jsonl")
    assert "h.jsonl" in command(*base)[2]
    rows(asked("long " * 3000), name="h.jsonl")
    assert "h.jsonl row 0: the prompt has" in command(*base)[2]


def test_files_of_one_name_are_told_apart(command, rows, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [rows(asked("1+1?"), name="a/x.jsonl"), rows(asked("2+2?"), name="b/x.jsonl")]
    _, out, _ = command(f"data.train={files[0]}", f"data.eval={files[1]}")
    for file in files:
        assert str(file) in "".join(out.split())


def test_text_in_a_file_cannot_command_a_terminal(command, rows):
    path = rows(asked("a\x1b[2J\u202eb [bold]c[/bold]\nd"))
    _, out, _ = command(f"data.train={path}", "data.eval=null")
    assert "a\\x1b[2J\\u202eb [bold]c[/bold]" in out
    assert visible("ä 你好\n\t") == "ä 你好\n\t"


def test_colours_are_for_terminals(good):
    config = load_config(CONFIG, [f"{key}={value}" for key, value in good.items() if key != "sft"])
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, color_system="standard")
    data_job(config, CONFIG, use=None, samples=1, as_json=False, console=terminal)
    assert "\x1b[36m" in screen.getvalue()  # the user's words


def test_numbers_are_whole_on_a_narrow_screen(good):
    config = load_config(CONFIG, [f"{key}={value}" for key, value in good.items() if key != "sft"])
    screen = io.StringIO()
    data_job(config, CONFIG, use=None, samples=1, as_json=False, console=Console(file=screen, width=80))
    assert "…" not in screen.getvalue()
    assert max(map(len, screen.getvalue().splitlines())) <= 80


PROMPTS = {
    "too long": [asked("1+1?"), asked("long " * 30), asked("long " * 40)],
    "no such column": [{"question": "1+1?", "answer": "2"}],
    "not a number": [asked("1+1?"), asked("2+2?", float("nan"))],
    "images": [asked("1+1?", images=["a.png"])],
    "an unknown role": [{**asked("1+1?"), "prompt": [{"role": "usr", "content": "1+1?"}]}],
    "an unknown key": [{**asked("1+1?"), "prompt": [{"role": "user", "content": "1+1?", "weight": 3}]}],
    "a broken line": [asked("1+1?"), '{"prompt": ['],
    "empty": [],
}
DEMONSTRATIONS = {
    "too long": [shown(("user", "a"), ("assistant", "b")), shown(("user", "a"), ("assistant", "b" * 300))],
    "no answer": [shown(("user", "a"), ("assistant", "b")), shown(("user", "a"))],
    "a blank answer": [shown(("user", "a"), ("assistant", " "))],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_that_a_run_refuses_are_refused_in_its_words(command, rows, kind):
    path = rows(*PROMPTS[kind])
    told = [command(f"data.train={path}", name=name) for name in ("train", "data")]
    assert told[0][0] == told[1][0] == 2
    assert told[0][2] == told[1][2]
    assert told[0][2].startswith("error: ")
    assert "`ctpo train` would refuse this, and say:" in told[1][1]


@pytest.mark.parametrize("kind", DEMONSTRATIONS)
def test_demonstrations_that_a_run_refuses_are_refused_in_its_words(command, rows, kind):
    limits = ("data.max_prompt_tokens=96", "rollout.max_response_tokens=96", "train.max_tokens_per_micro_batch=200")
    path = rows(*DEMONSTRATIONS[kind])
    told = [command(f"data.train={path}", "data.eval=null", *limits, name=name) for name in ("sft", "data")]
    assert told[0][0] == told[1][0] == 2
    assert told[0][2] == told[1][2]
    assert told[0][2].startswith("error: ")


@pytest.mark.parametrize(
    "override",
    ["model.path=no/such/model", "parallel.tp=3", "rollout.engine.tp=3", "data.eval=no/such.parquet", "model.stop_tokens=[<x>]"],
)  # fmt: skip
def test_settings_that_a_run_refuses_are_refused_in_its_words(command, override):
    told = [command(override, name=name) for name in ("train", "data")]
    assert told[0][0] == told[1][0] == 2
    assert told[0][2] == told[1][2]
    assert told[0][2].startswith("error: ")


def test_what_is_too_long_is_measured_before_it_is_refused(command, rows):
    code, out, _ = command(f"data.train={rows(*PROMPTS['too long'])}", options=("--json", "--samples", "0"))
    found = json.loads(out)
    assert code == 2
    assert found["files"][0]["measures"][0]["too_long"] == [[1, 153], [2, 203]]
    assert "2 of 3 rows are too long" in found["problem"]
    demonstrations = rows(*DEMONSTRATIONS["too long"], name="sft.jsonl")
    limits = ("data.max_prompt_tokens=96", "rollout.max_response_tokens=96", "train.max_tokens_per_micro_batch=200")
    code, out, _ = command(f"data.train={demonstrations}", "data.eval=null", *limits, options=("--json",))
    found = json.loads(out)
    assert code == 2
    assert [row for row, _ in found["files"][0]["measures"][0]["too_long"]] == [1]
    assert [sample["row"] for sample in found["files"][0]["samples"]] == [0, 1]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("\\frac{1}{2", "braces do not balance"),
        ("x}", "braces do not balance|not find it equal"),
        ("7" * 1001, "1,001 characters"),
        ("\\boxed{5", "not find it equal|braces"),
    ],
)
def test_answers_that_could_never_be_rewarded(answer, why):
    import re

    found = judge_answers([Prompt(0, (), "4"), Prompt(1, (), answer), Prompt(2, (), answer)], MathReward())
    (rejected,) = found.rejected
    assert (rejected.answer, rejected.rows) == (answer, (1, 2))
    assert re.search(why, rejected.why), rejected.why


def test_judging_has_the_time_limit_of_a_run():
    found = judge_answers([Prompt(0, (), "\\boxed{5"), Prompt(1, (), "5")], MathReward(timeout_s=1e-6))
    (rejected,) = found.rejected
    assert rejected.rows == (0,)
    assert "no end within rollout.reward.timeout_s = 1e-06" in rejected.why


def test_answers_of_all_kinds_are_accepted():
    answers = [
        "12",
        "-0.5",
        "1,234",
        "5 km",
        "\\frac{1}{2}",
        "\\boxed{3}",
        "x^2+1",
        "(1, 2)",
        "\\{1, 2\\}",
        "yes",
        "10\\%",
        "50%",
    ]
    found = judge_answers([Prompt(row, (), answer) for row, answer in enumerate(answers)], MathReward())
    assert found.rejected == ()
    assert found.different == len(answers)
    assert set(found.others) == {"x^2+1", "(1, 2)", "\\{1, 2\\}", "yes"}
