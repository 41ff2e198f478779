"""Whether two mathematical answers are equal, by math-verify; run as a process of its own, which its caller may kill.

Reads JSON lines like `{"answer": "...", "given": "...", "timeout_s": 5}` from stdin and writes `true` or `false` for each.
Parsing may hang or take all memory (think of 9^9^9^9), hence the process, its memory limit, and the caller's clock.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30
GRACE_S = 5


def equal(answer: str, given: str) -> bool:
    """math-verify's notion of equality of two LaTeX answers, without their \\boxed{}.

    Only its LaTeX grammar is used: its parser of plain expressions evaluates Python.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    grammar = [LatexExtractionConfig()]
    # None: no timers of signals in here, the caller keeps the time
    gold, target = (
        parse(f"\\boxed{{{text}}}", extraction_config=grammar, parsing_timeout=None, raise_on_error=False)
        for text in (answer, given)
    )
    return bool(verify(gold, target, timeout_seconds=None, raise_on_error=False))


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; our caller ends us
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)  # math-verify warns at each call without a timer
    equal("1", "2")  # imports sympy, which takes a second
    print("ready", flush=True)
    for line in sys.stdin:
        pair = json.loads(line)
        signal.alarm(math.ceil(pair["timeout_s"]) + GRACE_S)  # ends this process, should its caller be gone
        try:
            verdict = equal(pair["answer"], pair["given"])
        except (RecursionError, MemoryError):  # of a nested or huge answer: not equal to anything we can tell
            verdict = False
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
