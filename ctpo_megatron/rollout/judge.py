"""Whether two mathematical answers are equal, by `rollout.grading`; run as a process of its own, which its caller may kill.

Reads JSON lines like `{"answer": "...", "given": "...", "timeout_s": 5}` from stdin and writes for each the seconds that it took,
and `true` or `false`.
Parsing may hang or take all memory (think of 9^9^9^9), hence the process, its memory limit, and the caller's clock.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import signal
import sys
import time

MEMORY_BYTES = 4 << 30
GRACE_S = 5


def equal(answer: str, given: str) -> bool:
    """Whether two LaTeX answers, without their \\boxed{}, are equal by the rules of docs/rewards.md."""
    from ctpo_megatron.rollout.grading.mathematics import same_expression
    from ctpo_megatron.rollout.grading.verdict import equal as equal_parts

    return equal_parts(answer, given, same_expression)


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; our caller ends us
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)  # math-verify warns at each call without a timer
    equal("x+1", "1+x")  # imports sympy, which takes a second
    print("ready", flush=True)
    for line in sys.stdin:
        begin, pair = time.monotonic(), json.loads(line)
        signal.alarm(math.ceil(pair["timeout_s"]) + GRACE_S)  # ends this process, should its caller be gone
        try:
            verdict = equal(pair["answer"], pair["given"])
        except (RecursionError, MemoryError):  # of a nested or huge answer: not equal to anything we can tell
            verdict = False
        signal.alarm(0)
        print(f"{time.monotonic() - begin:.6f} {json.dumps(verdict)}", flush=True)


if __name__ == "__main__":
    main()
