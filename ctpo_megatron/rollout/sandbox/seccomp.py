"""The system-call filter of the Python sandbox, as a classic BPF program (see the kernel's seccomp_filter documentation).

Process limits cannot stop a fork bomb where this package runs as root, as it does in most containers: the kernel exempts
root from RLIMIT_NPROC, also inside a user namespace. So the filter refuses new processes and threads altogether, memory that
limits of the address space do not count, and the calls that reach deep into the kernel. Refused calls fail with EPERM.
"""

from __future__ import annotations

import errno
import platform
import struct

# numbers from the kernel's syscall tables; 425..461 and above 424 in general are equal on all architectures
_COMMON = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435, "open_tree": 428,
           "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438,
           "mount_setattr": 442, "memfd_secret": 447}  # fmt: skip
_REFUSED = {
    "x86_64": {"clone": 56, "fork": 57, "vfork": 58, "shmget": 29, "msgget": 68, "ptrace": 101, "pivot_root": 155, "mount": 165,
               "umount2": 166, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
               "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321,
               "userfaultfd": 323, **_COMMON},
    "aarch64": {"clone": 220, "shmget": 194, "msgget": 186, "ptrace": 117, "pivot_root": 41, "mount": 40, "umount2": 39,
                "add_key": 217, "request_key": 218, "keyctl": 219, "unshare": 97, "perf_event_open": 241, "setns": 268,
                "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280, "userfaultfd": 282,
                **_COMMON},
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000  # x86_64 has a second numbering of its calls above this one

_LOAD, _EQUAL, _NOT_BELOW, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER_OFFSET, _ARCH_OFFSET = 0, 4  # in struct seccomp_data


def filter_program(machine: str | None = None) -> bytes | None:
    """The filter for `machine` (default: this one), None where its system-call numbers are not known here."""
    machine = machine or platform.machine()
    if machine not in _REFUSED:
        return None
    numbers = sorted(set(_REFUSED[machine].values()))
    program = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_EQUAL, _AUDIT_ARCH[machine], if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_OFFSET),
        # jumps count the instructions in between: all further comparisons and the ALLOW
        _instruction(_NOT_BELOW, _X32_BIT, if_true=len(numbers) + 1),
        *(_instruction(_EQUAL, number, if_true=len(numbers) - i) for i, number in enumerate(numbers)),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _ERRNO | errno.EPERM),
    ]
    return b"".join(program)


def _instruction(code: int, operand: int, *, if_true: int = 0) -> bytes:
    """One struct sock_filter; comparisons that fail go on with the next instruction."""
    return struct.pack("<HBBI", code, if_true, 0, operand)
