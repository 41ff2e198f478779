"""Verdicts on 500 pairs of answers, in both orders, and the kinds of shortcut that decided what mathematics decides otherwise."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.grading.verdict import equal as equal_parts
from ctpo_megatron.rollout.judge import equal
from ctpo_megatron.rollout.rewards.math import quick_verdict

DATA = Path(__file__).resolve().parents[2] / "data"
KINDS = {"number", "fraction", "radical", "interval", "set", "tuple", "unit", "percent", "base", "text", "matrix", "equation"}
KNOWN_WRONG: set[tuple[str, str]] = set()  # (gold, given) of verdicts.jsonl that are judged wrongly; at most 2 %
HELD_OUT_WRONG: set[tuple[str, str]] = set()  # the same of verdicts_held_out.jsonl, written after the grader


def pairs(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def verdict(answer: str, given_: str) -> bool:
    """The verdict of `MathReward`, in this process."""
    quick = quick_verdict(answer, given_)
    return equal(answer, given_) if quick is None else quick


def wrong(name: str) -> set[tuple[str, str]]:
    found = set()
    for pair in pairs(name):
        verdicts = {verdict(pair["gold"], pair["given"]), verdict(pair["given"], pair["gold"])}
        if verdicts != {pair["equal"]}:
            found.add((pair["gold"], pair["given"]))
    return found


def test_the_pairs_are_many_of_every_kind_and_half_of_them_equal():
    rows = pairs("verdicts.jsonl")
    assert len(rows) == 500
    assert len({(row["gold"], row["given"]) for row in rows}) == 500
    assert sum(row["equal"] for row in rows) == 250
    assert {row["kind"] for row in rows} >= KINDS
    for kind in KINDS:
        of_kind = [row["equal"] for row in rows if row["kind"] == kind]
        assert len(of_kind) >= 30
        assert 0.4 < sum(of_kind) / len(of_kind) < 0.6


@pytest.mark.thorough
def test_500_pairs_in_both_orders():
    found = wrong("verdicts.jsonl")
    assert found == KNOWN_WRONG
    assert len(found) <= 0.02 * 500


def test_pairs_written_after_the_grader_in_both_orders():
    assert len(pairs("verdicts_held_out.jsonl")) == 100
    assert wrong("verdicts_held_out.jsonl") == HELD_OUT_WRONG


FUSED = [
    ("1, 200", "1200", False),
    ("10, 100", "10100", False),
    ("(3, 100)", "(3100)", False),
    ("2, 100, 300", "2100300", False),
    ("3 1/2", "31/2", False),
    ("31/2", "3 1/2", False),
    ("3 1/2", "3.5", True),
    ("2 1/3", r"\frac{7}{3}", True),
    ("1,234,567", "1234567", True),
    ("1, 200", "200, 1", True),
    (r"3\frac{1}{2}", "3.5", True),
    # further ones
    (r"\{5, 125\}", r"\{5125\}", False),
    ("[1, 100]", "[1100]", False),
    ("(1,234)", "1234", False),
    ("(1,000)", "1000", True),  # no number is written 000
    ("1 2 3", "123", False),
    ("12 3/4", "123/4", False),
    ("12 3/4", "12.75", True),
    ("5, 1 1/2", "5, 11/2", False),
    (r"\begin{pmatrix} 1 & 200 \end{pmatrix}", "1200", False),
    ("1, 2", "12", False),
    (r"1{,}234", "1,234", True),
    ("12,34,567", "1234567", False),
]


@pytest.mark.parametrize(("answer", "given_", "right"), FUSED)
def test_lists_tuples_and_mixed_numbers_are_no_other_numbers(answer, given_, right):
    assert verdict(answer, given_) is right
    assert verdict(given_, answer) is right


PERCENTAGES = [
    ("12.5", r"12.5\%", True),
    (r"37.5\%", "37.5", True),
    (r"6.25\%", "6.25", True),
    ("50", r"50\%", True),
    (r"25\%", "25", True),
    (r"12.5\%", "0.125", True),
    # further ones
    ("0.75", r"75\%", True),
    ("12.5", "0.125", False),
    (r"25\%", r"0.25\%", False),
    (r"33\frac{1}{3}\%", r"\frac{1}{3}", True),
    (r"33\%", r"\frac{1}{3}", False),
    (r"(50\%, 20\%)", "(0.5, 0.2)", True),
    (r"0.5\%", "0.05", False),
]


@pytest.mark.parametrize(("answer", "given_", "right"), PERCENTAGES)
def test_a_percentage_is_its_number_or_a_hundredth_of_it_whole_or_not(answer, given_, right):
    assert verdict(answer, given_) is right
    assert verdict(given_, answer) is right


SMALL = [
    ("1e-19", "9e-31", False),
    ("2^{-100}", "3^{-100}", False),
    (r"2\cdot10^{-30}+x", "x", False),
    ("x=10^{-9}", "x=10^{-10}", False),
    (r"\begin{pmatrix}10^{-19}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-31}\\1\end{pmatrix}", False),
    (r"\sqrt{2}\times10^{-8}", r"\sqrt{3}\times10^{-8}", False),
    ("1234567.1", "1234567.2", False),
    (r"\frac{1}{10^{19}}", "1e-19", True),
    ("0.333333", r"\frac{1}{3}", True),
    (r"3.5 \text{ million}", "3500000", True),
    (r"3.5 \text{ million}", "3.5", False),
    ("x^2+1=0", "x^2+2=0", False),
]


@pytest.mark.parametrize(("answer", "given_", "right"), SMALL)
def test_small_differences_count_by_their_share(answer, given_, right):
    assert verdict(answer, given_) is right
    assert verdict(given_, answer) is right


@given(st.integers(2, 36), st.integers(0, 10**6))
def test_a_number_in_another_base_has_its_value(base, number):
    digits, rest = "", number
    while rest or not digits:
        digits, rest = "0123456789abcdefghijklmnopqrstuvwxyz"[rest % base] + digits, rest // base
    if not set(digits) <= set("0123456789abcdef"):
        return  # such digits are nobody's answer
    assert not digits.isdigit() or equal_parts(f"{digits}_{{{base}}}", str(number), never)
    assert not digits.isdigit() or not equal_parts(f"{digits}_{{{base}}}", str(number + 1), never)


@given(st.fractions(min_value=-100, max_value=100, max_denominator=99), st.integers(-30, 30), st.integers(1, 10**6))
def test_numbers_are_compared_by_relative_error(value, exponent, parts):
    """A rounded number is another number once it differs by more than a millionth, however small both are."""
    if value == 0:
        return
    text = f"{float(abs(value)):.12g}"
    if "e" in text:
        return
    written = f"{text} \\times 10^{{{exponent}}}"
    assert equal_parts(written, f"{text}e{exponent}", never)
    other = f"{float(abs(value)) * (1 + parts * 3e-6):.15g}e{exponent}"
    assert not equal_parts(written, other, never)


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from([", ", "; ", ",\\ "]))
def test_two_numbers_in_a_list_are_never_one(left, right, between):
    assert not equal_parts(f"{left}{between}{right:03d}", f"{left}{right:03d}", never)


TEXTS = st.lists(
    st.sampled_from(
        [*"0123456789xyABn+-*/=<>^_{}()[],.;: $%|&", "\\frac", "\\sqrt", "\\text{", "\\boxed{", "\\pm", "\\in", "\\cup"]
    ),
    max_size=12,
).map("".join)


@given(TEXTS, TEXTS)
def test_any_two_texts_have_one_verdict_whatever_their_order(left, right):
    assert equal_parts(left, right, same_letters) is equal_parts(right, left, same_letters)


def test_nothing_in_reading_grows_without_bound():
    for text in (
        "a-" * 490,
        "(" * 990,
        "1," * 490,
        "\\text{" * 160,
        " " * 990 + "x",
        "{" * 490 + "}" * 490,
        "_" * 990,
        "1 " * 490,
    ):
        begun = time.process_time()
        assert not equal_parts(text, "1", never)
        assert time.process_time() - begun < 2.0


def never(left: str, right: str) -> bool:
    """Stands for mathematics that finds nothing equal."""
    return False


def same_letters(left: str, right: str) -> bool:
    """Stands for mathematics, in a way that depends on both texts and not on their order."""
    return sorted(left) == sorted(right)


def judged(answer: str, text: str) -> bool:
    """The verdict on a whole text of a model."""
    box = last_box(text)
    return box is not None and verdict(answer, box) and verdict(box, answer)


# what models write around or instead of an answer that is right
WRITTEN = [
    ("809", r"\boxed{809\,}"),
    ("5", r"\boxed{5\ }"),
    ("5", r"\boxed{5 \\}"),
    ("5", r"\boxed {5}"),
    ("5", r"\fbox{5}"),
    ("42", r"\boxed{\color{red}{42}}"),
    ("42", r"\boxed{\color{blue}42}"),
    ("42", r"\boxed{\textcolor{blue}{42}}"),
    ("42", r"\boxed{\underline{42}}"),
    ("42", r"\boxed{\fbox{42}}"),
    ("3", r"\boxed{\boldsymbol{3}}"),
    ("3", r"\boxed{\mathbf{x=3}}"),
    ("3", r"\boxed{\text{3 apples}}"),
    (r"1 \text{ m}", r"\boxed{\text{100 cm}}"),
    (r"\frac{\pi}{4}", r"\boxed{\frac\pi4}"),
    (r"\frac{n}{2}", r"\boxed{\dfrac n2}"),
    (r"\frac{\sqrt{3}}{2x}", r"\boxed{\frac{\sqrt3}{2x}}"),
    (r"\frac{n(n-1)}{2}", r"\boxed{\binom n2}"),
    (r"\frac{n(n-1)}{2}", r"\boxed{{n \choose 2}}"),
    (r"\frac{n}{2}", r"\boxed{{n \over 2}}"),
    ("10", r"\boxed{\binom52}"),
    (r"\sqrt[3]{2}", r"\boxed{\sqrt[3]2}"),
    ("-2", r"\boxed{\sqrt[3]{-8}}"),
    (r"-\sqrt[3]{2}", r"\boxed{(-2)^{1/3}}"),
    ("1/3", r"\boxed{0.(3)}"),
    ("1/6", r"\boxed{0.1(6)}"),
    ("6", r"\boxed{3!=6}"),
    (r"\frac{n(n+1)(2n+1)}{6}", r"\boxed{\sum_{k=1}^{n} k^2}"),
    ("n!", r"\boxed{\prod_{k=1}^{n} k}"),
    ("(1,2)", r"\boxed{A(1,2)}"),
    (r"(\frac12,1),(3,4)", r"\boxed{A(0.5,1), B(3,4)}"),
    (r"\mathbb{R}\setminus\{0\}", r"\boxed{\mathbb R\setminus\{0\}}"),
]

# what looks like it
OTHERS = [
    ("5", r"\boxed{5!}"),
    ("42", r"\boxed{\overline{42}}"),
    ("5", r"\boxed{\fbox{5} \fbox{6}}"),
    ("3", r"\boxed{\text{3 out of 4}}"),
    ("3", r"\boxed{\text{3 and a half}}"),
    ("3", r"\boxed{\text{3 or 4}}"),
    ("3", r"\boxed{3 \text{ squared}}"),
    ("3", r"\boxed{3 factorial}"),
    ("3", r"\boxed{3 \text{ halves}}"),
    ("2", r"\boxed{\text{2 times three}}"),
    ("1", r"\boxed{\text{1 minus x}}"),
    ("100", r"\boxed{\text{1 m}}"),
    (r"\frac{4}{\pi}", r"\boxed{\frac\pi4}"),
    (r"\sqrt{2}", r"\boxed{\sqrt[3]2}"),
    ("2", r"\boxed{\sqrt[3]{-8}}"),
    ("-1", r"\boxed{\sqrt{-1}}"),
    ("0.5", r"\boxed{0.(5)}"),
    ("6", r"\boxed{2.(3)}"),
    ("3", r"\boxed{3!=6}"),
    (r"\frac{n(n+1)(2n+1)}{6}", r"\boxed{\sum_{k=1}^{n} k^3}"),
    ("6", r"\boxed{n!=6}"),
    ("(1,2)", r"\boxed{A(2,1)}"),
    ("A(1,2)", r"\boxed{B(1,2)}"),
    ("2", r"\boxed{A(1,2)}"),
]


@pytest.mark.parametrize(("answer", "text"), WRITTEN)
def test_an_answer_that_is_right_however_it_is_set(answer, text):
    assert judged(answer, text)


@pytest.mark.parametrize(("answer", "text"), OTHERS)
def test_an_answer_that_only_looks_like_it(answer, text):
    assert not judged(answer, text)


def test_thousands_of_boxes_that_nobody_closes_are_read_at_once():
    """It happens where the reward is awaited, so no limit of time ends it."""
    start = time.process_time()
    assert last_box(r"\boxed{7} " + r"\boxed{" * 20_000 + "{" * 20_000) == "7"
    assert time.process_time() - start < 1.0
