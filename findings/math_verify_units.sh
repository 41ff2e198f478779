#!/bin/sh
# math-verify 0.9.0 with latex2sympy2_extended 1.11.0: answers that differ in a variable, a unit or a base count as equal.
#
# The default configuration of LaTeX removes units at the end of an answer, from a list that has the letters c, d, g, h, l, m, o, s
# and t. A variable of that name behind a digit, a brace or a space goes with them: 3t is read as 3, \sin 2t as \sin 2 and 3 g h as
# 3, while 3x stays 3x. A unit in \text{} goes too, so 5 cm equals 5 m and 5 kg is not 5000 g. Beside that the parser drops the
# subscript of a number, with any configuration: 1011 to the base 2 equals 1011, and is not the 11 that it stands for. parse
# returns the shortened expression without a word. In reinforcement learning each of these is a reward for a wrong answer.
# NormalizationConfig(units=False) keeps variables and units; nothing keeps the base.
#
# Seen (Python 3.11): verify says `equal` for the first eight pairs below; with units=False for the last two of these eight alone.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
cat > "$work/verify.py" <<'PROGRAM'
import sys

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

UNITS_KEPT = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True)  # the default but for units
)
# the right answer, another one, and whether verify takes them for equal: by default, with units kept
PAIRS = [
    ("3t", "3", True, False),
    ("4c", "4d", True, False),
    (r"\sin 2t", r"\sin 2", True, False),
    ("3 g h", "3", True, False),
    (r"5 \text{ cm}", r"5 \text{ m}", True, False),
    (r"6 \text{ hours}", r"6 \text{ minutes}", True, False),
    ("1011_2", "1011", True, True),
    ("10_{8}", "10_{16}", True, True),
    ("3x", "3", False, False),
    ("4x", "4y", False, False),
    ("1011_2", "11", False, False),
    (r"5 \text{ kg}", r"5000 \text{ g}", False, False),
]


def equal(gold: str, answer: str, latex: LatexExtractionConfig) -> bool:
    return verify(*(parse(rf"\boxed{{{text}}}", extraction_config=[latex]) for text in (gold, answer)))


as_expected = True
for gold, answer, *expected in PAIRS:
    found = [equal(gold, answer, latex) for latex in (LatexExtractionConfig(), UNITS_KEPT)]
    by_default, kept = ("equal" if verdict else "different" for verdict in found)
    print(f"{gold:16} {answer:17} {by_default:9}  with units=False: {kept}")
    as_expected &= found == expected
sys.exit(not as_expected)
PROGRAM
if "$work/venv/bin/python" "$work/verify.py"; then
    echo "as described: parts of an answer are not compared"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
