"""A node raises its limits as far as it may."""

from __future__ import annotations

import subprocess
import sys


def test_soft_limits_rise_to_what_is_needed_and_allowed() -> None:
    code = "import resource as r; from ctpo_megatron.slurm.limits import raise_limits; raise_limits(); "
    code += "print(r.getrlimit(r.RLIMIT_NOFILE)[0], *r.getrlimit(r.RLIMIT_MEMLOCK))"
    for lower, wanted in (("ulimit -S -n 256; ulimit -H -n 4096", 4096), ("ulimit -S -n 256", None)):
        script = f"{lower}; ulimit -S -l 64; ulimit -H -n; exec {sys.executable} -c '{code}'"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
        most, files, locked, most_locked = done.stdout.split()
        expected = wanted or (65_536 if most == "unlimited" else min(int(most), 65_536))
        assert (int(files), locked) == (expected, most_locked)
