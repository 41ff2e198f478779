"""A node that looks whether its job has lost the first one, while SLURM ends the job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SCONTROL = """#!/bin/bash
echo "$@" >> {log}
case $1 in
show) sleep 0.5; [ "$2" = job ] && echo "JobId=7 NodeList=n2 BatchHost=n1" || echo n2 ;;
*) sleep 0.5; echo done >> {log} ;;
esac
"""


def test_sigterm_to_all_of_a_job_ends_no_question_about_it(tmp_path: Path) -> None:
    """SLURM sends it to the commands too that a node asks with; the one that asks for the requeue is among them."""
    log, command = tmp_path / "asked", tmp_path / "scontrol"
    command.write_text(SCONTROL.format(log=log))
    command.chmod(0o755)
    code = "from ctpo_megatron.slurm.first_node import requeue_without_first as look; "
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        code += f"look('7', 'n1', '127.0.0.1:{nobody.getsockname()[1]}')"
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        with subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True) as asking:
            deadline = time.monotonic() + 30
            while asking.poll() is None and time.monotonic() < deadline:
                if log.exists():
                    os.killpg(asking.pid, signal.SIGTERM)
                time.sleep(0.2)
    assert asking.returncode == 0
    assert log.read_text().splitlines() == ["show job --oneliner 7", "show hostnames n2", "requeue 7", "done"]
