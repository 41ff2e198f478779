#!/bin/sh
# Ray 2.60.0: the two agents of a Ray that `ray.init` has started stay for a minute when the driver is killed.
#
# A driver that is killed (SIGKILL, or by the system for want of memory) takes the GCS, the raylet and the workers with it within
# seconds. The dashboard's agent and the runtime environment's agent notice that the raylet is gone, want to tell the GCS so, and
# wait for its answer until their call times out after 60 s; the GCS has gone, too. Whoever starts the run again at once has the old
# agents beside the new ones, with their memory and ports, and a check for left processes fails. Run launchers that supervise a
# driver should end what was below it, or wait a minute.
#
# Seen (Python 3.11): the other 17 processes gone after 2 s, both agents after 61 s.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "ray[default]==2.60.0" psutil==7.2.2
cat > "$work/watch.py" <<'PROGRAM'
import subprocess
import sys
import time

import psutil

DRIVER = "import ray, time; ray.init(address='local', num_cpus=1, log_to_driver=False); print('up', flush=True); time.sleep(600)"
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # the titles that they give themselves


def line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def gone_after(processes: list[psutil.Process], since: float, limit_s: float) -> float:
    """Seconds until none of the processes lives; the limit where one does."""
    while time.monotonic() - since < limit_s:
        if not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes):
            break
        time.sleep(0.2)
    return time.monotonic() - since


driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE)
assert driver.stdout.readline() == b"up\n"
time.sleep(3)
below = psutil.Process(driver.pid).children(recursive=True)
agents = [each for each in below if line(each).startswith(AGENTS)]
others = [each for each in below if each not in agents]
driver.kill()
driver.wait()
killed = time.monotonic()
rest_s = gone_after(others, killed, 90.0)
agents_s = gone_after(agents, killed, 150.0)
for each in below:
    if each.is_running():
        each.kill()
print(f"{len(agents)} agents; the other {len(others)} processes gone after {rest_s:.0f} s, the agents after {agents_s:.0f} s")
sys.exit(not (len(agents) == 2 and rest_s < 30.0 and 45.0 < agents_s < 120.0))
PROGRAM
if "$work/venv/bin/python" "$work/watch.py"; then
    echo "as described: the agents stay for a minute"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
