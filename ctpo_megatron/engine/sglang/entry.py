"""The process of one SGLang server: `python -m ctpo_megatron.engine.sglang.entry --model-path ... `, arguments as SGLang's.

What it adds to `sglang.launch_server`: the API key comes from standard input, so that no argument list or log shows it; the
server ends when its parent does; and on a CPU it starts in a third of the time, since the scheduler is forked from a
process that has imported everything and no detokenizer is started where there is nothing to detokenize.

Nothing heavy is imported at the top: children that multiprocessing spawns import this module again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from ctpo_megatron.engine.processes import group_shared_memory, unlink_shared_memory


class Secret(str):
    """A string that does not show itself when SGLang logs its arguments."""

    def __repr__(self) -> str:
        return "'***'"


def read_line(fd: int) -> str:
    """One line from a file descriptor, without its end; unbuffered, so that nothing after it is consumed."""
    line = bytearray()
    while (char := os.read(fd, 1)) not in (b"", b"\n"):
        line += char
    return line.decode()


def die_with_parent(fd: int) -> None:
    """Wait for the end of `fd`, which the parent holds open as long as it lives, then kill this process group.

    A pipe, not PR_SET_PDEATHSIG: that signal comes when the parent's *thread* ends.
    """
    while os.read(fd, 4096):
        pass
    group = os.getpgid(0)
    segments = group_shared_memory(group)
    unlink_shared_memory(segments)
    os.killpg(group, signal.SIGKILL)


def load() -> Callable[[list[str], str], None]:
    """`serve`, with all of SGLang: six seconds of a processor."""
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "ctpo_megatron.engine.sglang.models"

    from ctpo_megatron.engine.sglang.imports import bring_forward, lean_server
    from ctpo_megatron.imports import modules_stay, packages_told_quickly

    with modules_stay(), packages_told_quickly(), lean_server():
        from ctpo_megatron.engine.sglang.serve import serve

        bring_forward()

    return serve


def main(argv: list[str]) -> None:
    """Serve until told to stop. Standard input: the API key, a newline, then silence as long as the parent lives."""
    key = Secret(read_line(0))
    threading.Thread(target=die_with_parent, args=(0,), daemon=True, name="parent-watch").start()
    load()(argv, key)


if __name__ == "__main__":
    main(sys.argv[1:])
