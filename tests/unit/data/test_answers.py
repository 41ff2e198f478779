"""Known answers in columns: numbers become the text a person would write, and what is no answer is refused with its row."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.data.answers import MISSING, answer_text
from ctpo_megatron.data.precision import as_written
from ctpo_megatron.data.prompts import read_prompts
from ctpo_megatron.errors import DataError
from ctpo_megatron.rollout.protocols import Outcome
from ctpo_megatron.rollout.rewards.math import MathReward

PROMPT = [{"role": "user", "content": "What is 3+4?"}]


def parquet(path, values, kind):
    truths = pa.array(values, kind)
    structs = pa.StructArray.from_arrays([truths], ["ground_truth"])
    pq.write_table(pa.table({"prompt": pa.array([PROMPT] * len(values)), "reward_model": structs}), path)
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00001, "0.00001"),
        (1e16, "10000000000000000"),
        (Decimal("7.50"), "7.5"),
        # further ones
        (7.0, "7"),
        (-0.0, "0"),
        (1e23, "100000000000000000000000"),
        (1e300, r"1 \times 10^{300}"),
        (2.5e-80, r"2.5 \times 10^{-80}"),
        (Decimal("1E+3"), "1000"),
        (Decimal("12.00"), "12"),
        (np.float32(0.1), "0.1"),
        (float(np.float32(0.1)), "0.1"),
        (0.0009765625, "0.0009765625"),
        (2.5**10, "9536.7431640625"),  # 32 bits hold these exactly
        (1.5**10, "57.6650390625"),
        (2.0**-13, "0.0001220703125"),
        (np.float16(0.1), "0.1"),
        (np.float64(1e16), "10000000000000000"),
        (np.int64(-3), "-3"),
        (np.array(2.5), "2.5"),
        (pa.scalar(7.5), "7.5"),
        (pa.scalar(Decimal("7.50")), "7.5"),
        (10**20, "100000000000000000000"),
        (0.1, "0.1"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("none", "none"),
    ],
)
def test_a_number_becomes_the_text_a_person_would_write(value, text):
    assert answer_text("row 0", "ground_truth", value) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30))
def test_no_digit_of_a_number_is_lost(value):
    text = answer_text("row 0", "ground_truth", value)
    assert "e" not in text.replace("times", "")
    if "times" in text:
        assert abs(value) < 1e-35
    elif float(np.float32(value)) != value:
        assert float(text) == value
    else:
        assert abs(Fraction(text) - Fraction(value)) <= abs(Fraction(value)) * Fraction(1, 10**7)


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf"), Decimal("NaN"), Decimal("Infinity")),
        *("\u200b", " \ufeff"),
        *(None, "", "  ", "$ $", r"\boxed{}", *MISSING, r"\boxed{nan}", pa.scalar(float("nan")), pa.scalar(None)),
        *(True, np.bool_(False), [1], {"a": 1}, b"7", 1j),
    ],
)
def test_what_is_no_answer_is_refused_with_its_place(value):
    with pytest.raises(DataError, match=r"^train\.parquet row 3: 'reward_model.ground_truth' is "):
        answer_text("train.parquet row 3", "reward_model.ground_truth", value)


def test_a_missing_number_in_a_file_names_its_row(tmp_path):
    lines = [{"prompt": PROMPT, "reward_model": {"ground_truth": value}} for value in (7.0, float("nan"))]
    (tmp_path / "nan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"nan\.jsonl line 2: .*not a number"):
        read_prompts(tmp_path / "nan.jsonl")
    with pytest.raises(DataError, match=r"nan\.parquet row 1: .*not a number"):
        read_prompts(parquet(tmp_path / "nan.parquet", [7.0, float("nan")], pa.float64()))
    with pytest.raises(DataError, match=r"inf\.parquet row 0: .*infinity"):
        read_prompts(parquet(tmp_path / "inf.parquet", [float("inf")], pa.float32()))
    with pytest.raises(DataError, match=r"none\.parquet row 1: .*missing value"):
        read_prompts(parquet(tmp_path / "none.parquet", [1, None], pa.int64()))


@pytest.mark.parametrize(
    ("values", "kind", "written"),
    [
        ([1e-5, 1e16], pa.float64(), ["0.00001", "10000000000000000"]),
        ([Decimal("7.50")], pa.decimal128(10, 2), ["7.5"]),
        ([0.1, 2.0], pa.float32(), ["0.1", "2"]),
        ([9536.7, 1e-7, 16777216.0], pa.float32(), ["9536.7", "0.0000001", "16777216"]),
        ([2.5**10, 1.5**10], pa.float64(), ["9536.7431640625", r"\frac{59049}{1024}"]),
        ([3, -4], pa.int8(), ["3", "-4"]),
        ([2**63], pa.uint64(), ["9223372036854775808"]),
        (["1/2"], pa.large_string(), [r"\frac{1}{2}"]),
    ],
)
def test_a_column_of_numbers_rewards_what_a_person_would_write(tmp_path, values, kind, written):
    prompts = read_prompts(parquet(tmp_path / "numbers.parquet", values, kind))

    async def rewards() -> list[float]:
        reward = MathReward(MathRewardConfig(timeout_s=60), judges=1)
        try:
            return [
                (await reward.score(prompt, Outcome(rf"so \boxed{{{text}}}"))).reward
                for prompt, text in zip(prompts, written, strict=True)
            ]
        finally:
            reward.close()

    assert asyncio.run(rewards()) == [1.0] * len(values)


def test_numbers_of_32_bits_are_read_as_they_were_written_at_any_depth_and_others_are_left_alone():
    inner = pa.struct([("single", pa.float32()), ("double", pa.float64()), ("text", pa.string())])
    rows = [{"single": 9536.7, "double": 2.5**10, "text": "0.10"}, {"single": None, "double": None, "text": None}]
    batch = pa.record_batch([pa.array([rows, []], pa.list_(inner)), pa.array([7, 8])], ["nested", "plain"])
    assert as_written(batch).to_pylist() == [{"nested": rows, "plain": 7}, {"nested": [], "plain": 8}]
