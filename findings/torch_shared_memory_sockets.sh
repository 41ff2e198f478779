#!/bin/sh
# torch 2.14.1: the helper process of shared memory by name keeps the sockets of gloo open, so the death of a rank is not seen.
#
# With torch.multiprocessing's strategy "file_system", or through UntypedStorage._new_using_filename_cpu, the first shared tensor of
# a process starts the program torch_shm_manager, which removes the files when all who have mapped one are gone. It inherits every
# file descriptor that does not close on exec. Python's own sockets do; those that gloo opens in C++ do not. The helper lives as long
# as any process has a tensor of the first one mapped, and with it the connections of a process that was killed: to the other ranks
# of its process group the peer is still there. A receive that would have failed within 0.1 s ("Connection closed by peer") waits for
# the timeout of its group, by default half an hour. Marking all descriptors as close-on-exec before the first shared tensor helps.
#
# Here: one process that joins a gloo group alone, whose device has a listening socket, and shares a tensor; nothing is killed. How
# many of its sockets the helper has open is read from /proc.
#
# Seen (Python 3.11, Linux): sockets that the helper shares with its parent: 1 or more; 0 after marking.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.3.5 psutil==7.2.2
cat > "$work/inherit.py" <<'PROGRAM'
import contextlib
import os
import sys

import psutil
import torch
import torch.distributed as dist


def sockets(pid: int) -> set[str]:
    """Returns what /proc calls the sockets that a process has open."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {each for each in found if each.startswith("socket:")}


def mark() -> None:
    """Let every descriptor but the standard ones close on exec."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[1] == "marked":
    mark()
torch.multiprocessing.set_sharing_strategy("file_system")
tensor = torch.zeros(16).share_memory_()
(helper,) = psutil.Process().children()
print(helper.name(), len(sockets(os.getpid()) & sockets(helper.pid)))
PROGRAM
plain=$("$work/venv/bin/python" "$work/inherit.py" plain)
marked=$("$work/venv/bin/python" "$work/inherit.py" marked)
echo "torch 2.14.1: $plain sockets of its parent open, after marking: $marked"
case $plain in "torch_shm_manager "[1-9]*) ;; *) echo "changed: the helper inherits no socket" >&2; exit 1 ;; esac
[ "$marked" = "torch_shm_manager 0" ] || { echo "changed: marking does not help" >&2; exit 1; }
