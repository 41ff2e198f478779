"""What servers on CPUs are forked from (`engine.nursery`): `python -m ctpo_megatron.engine.sglang.forks SOCKET FD`.

It inherits the socket as FD, which listens already: who asks before SGLang is imported waits. It ends with its standard input.
Nothing heavy is imported at the top: children that multiprocessing spawns import this module again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import traceback
from typing import NoReturn

from setproctitle import getproctitle, setproctitle

from ctpo_megatron.engine.nursery import NUMBER, READ_AT_START, read_exactly, write_number
from ctpo_megatron.engine.processes import adopt_orphans, end_with_parent

SERVER = "ctpo_megatron.engine.sglang.entry"  # what a server's command line says, however it was started


def main(place: str, descriptor: int) -> None:
    """Fork servers until standard input ends, then remove the socket's directory, which is of this process alone."""
    try:
        _serve(descriptor)
    finally:
        shutil.rmtree(os.path.dirname(place), ignore_errors=True)


def _serve(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as listener:
        setproctitle(getproctitle())  # finds its room in the variables as they were; servers get others
        end_with_parent(signal.SIGTERM)  # nobody looks at standard input meanwhile
        _load()
        end_with_parent(None)
        adopt_orphans()  # schedulers whose server was killed
        signal.signal(signal.SIGCHLD, _reap)
        while True:
            ready, _, _ = select.select([listener.fileno(), 0], [], [])
            if 0 in ready:
                return
            line, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _keep(line)
            line.close()


def _load() -> None:
    from ctpo_megatron.engine.sglang import entry

    entry.load()
    importlib.import_module("ctpo_megatron.engine.sglang.operators")  # compiles or loads them, as each server would


def _reap(*_: object) -> None:
    """Collect whatever has ended."""
    with contextlib.suppress(ChildProcessError):  # the sign that none is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def _keep(line: socket.socket) -> NoReturn:
    """Fork the server that is asked for, and tell its process id and its exit code."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, pipes, _, _ = socket.recv_fds(line, NUMBER, 2)
        arguments, env = json.loads(read_exactly(line, int.from_bytes(size, "big", signed=True)))
        if _at_start(env) == _at_start(dict(os.environ)):  # else it is refused, and starts from nothing
            if (server := os.fork()) == 0:
                line.close()
                _become_server(arguments, env, *pipes)
            for pipe in pipes:
                os.close(pipe)
            line.sendall(write_number(server))
            ended = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
            line.sendall(write_number(ended))
        code = 0
    except (OSError, ValueError):  # whoever asked has ended
        pass
    finally:
        os._exit(code)


def _at_start(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(READ_AT_START)}


def _become_server(arguments: list[str], env: dict[str, str], stdin: int, output: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for old, new in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(old, new)
        os.close(stdin)
        os.close(output)
        os.environ.clear()
        os.environ.update(env)
        setproctitle(" ".join([sys.executable, "-m", SERVER, *arguments]))
        importlib.import_module(SERVER).main(arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - this process ends here, and its log says why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    os._exit(0)  # nothing is left to tidy up, and taking apart all that was imported lasts for seconds on a busy host
