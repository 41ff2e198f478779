"""The process that forks servers, without SGLang: as a program it forks this module in a server's place."""

from __future__ import annotations

import os
import sys

from ctpo_megatron.engine.sglang import forks


def main(arguments: list[str]) -> None:
    """Say what was given, wait for the end of standard input or for nothing, and end with the code that is the first argument."""
    code, waits = arguments
    key = sys.stdin.readline().strip()
    print(key, os.environ.get("GIVEN"), os.getpgid(0) == os.getpid(), flush=True)
    if waits == "wait":
        sys.stdin.read()
    sys.exit(int(code))


if __name__ == "__main__":
    forks.SERVER, forks._load = "tests.support.forked_stand_in", lambda: None
    forks.main(sys.argv[1], int(sys.argv[2]))
