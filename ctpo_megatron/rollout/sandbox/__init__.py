"""Model-written Python, confined: a process of its own for each program, or one for all programs of a trajectory.

command    what a confined interpreter may see and use, as bubblewrap's options, limits and a system-call filter
process    one confined interpreter, from its start to its end
python     a program a process; `notebook`: a process a trajectory, in which `cells` runs
escape     harmless attempts (`probes`) at all that must not succeed, made before a run starts
service    programs over HTTP, and the `shelf` of its notebooks; `remote` is its client, `key` what both know
"""

from ctpo_megatron.rollout.sandbox.command import MIB, sandbox_available
from ctpo_megatron.rollout.sandbox.escape import CASES, escapes, require_confinement
from ctpo_megatron.rollout.sandbox.notebook import Notebooks
from ctpo_megatron.rollout.sandbox.python import ATTEMPTS, BubblewrapPython

__all__ = ["ATTEMPTS", "CASES", "MIB", "BubblewrapPython", "Notebooks", "escapes", "require_confinement", "sandbox_available"]
