"""What a confined interpreter may see and use.

bubblewrap gives new namespaces (no network, no other processes, no user's files: only /usr and the interpreter, read-only), a
small private /tmp, no capabilities and an empty environment; resource limits bound memory, CPU time and files; a system-call
filter refuses new processes.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.sandbox.seccomp import filter_program

MIB = 1 << 20
MAX_FILE_BYTES = 4 * MIB  # each file that a program writes, its output included; also the size of /tmp
MAX_OPEN_FILES = 64
NOBODY = "65534"
PROBE_TIMEOUT_S = 30.0
_SETUID = 0o4000


@dataclass(frozen=True, slots=True)
class Limits:
    """What one confined process may use."""

    memory_mb: int  # of address space
    cpu_s: int  # of CPU time

    def impose(self, pid: int) -> None:
        """Set the limits of the process `pid`, which its children inherit.

        Raises RolloutError where the system does not allow it, as for a bubblewrap that runs with other rights than this process.
        """
        memory, files = self.memory_mb * MIB, MAX_FILE_BYTES
        each = ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, self.cpu_s), (resource.RLIMIT_CORE, 0),
                (resource.RLIMIT_FSIZE, files), (resource.RLIMIT_NOFILE, MAX_OPEN_FILES))  # fmt: skip
        try:
            for kind, limit in each:
                resource.prlimit(pid, kind, (limit, limit))
        except OSError as error:
            raise RolloutError(f"the limits of a confined program could not be set: {error}") from error


def interpreter_words(*script: str) -> list[str]:
    """The command line of the interpreter, inside: isolated from site packages and variables; `script`: what it runs."""
    return [interpreter(), "-I", "-S", "-E", "-X", "utf8", *script]


def sandbox_options(status_fd: int, filter_fd: int) -> list[str]:
    """bubblewrap's options: it writes its status to one descriptor and reads the system-call filter from the other."""
    return [*_fixed_options(), "--json-status-fd", str(status_fd), "--seccomp", str(filter_fd)]


@functools.cache
def _fixed_options() -> tuple[str, ...]:
    return (
        *("--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL", "--clearenv"),
        *("--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"),
        *_read_only_system(),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(MAX_FILE_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        # root outside is owner of /proc/sys inside, so without this a program could change the kernel's settings
        *("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/"),
    )


@functools.cache
def system_call_filter() -> bytes:
    """The filter for this host. Raises RolloutError where there is none."""
    program = filter_program()
    if program is None:
        raise RolloutError(f"the sandbox has no system-call filter for {os.uname().machine}")
    return program


@functools.cache
def sandbox_available() -> str | None:
    """None where programs can be confined on this host, otherwise a sentence that says why not and what to do.

    Runs bubblewrap, since it may be installed and still be forbidden to make namespaces.
    """
    path = shutil.which("bwrap")
    if path is None:
        return "bubblewrap is not installed (no `bwrap` on PATH); install the package `bubblewrap`."
    if os.stat(path).st_mode & _SETUID and os.geteuid() != 0:
        return f"{path} is setuid, and the limits of such a program cannot be set; install one that is not."
    if filter_program() is None:
        return f"the sandbox has no system-call filter for {os.uname().machine}; x86_64 and aarch64 have one."
    if not os.path.exists(interpreter()):
        return f"there is no Python at {interpreter()} to run programs with."
    command = ["bwrap", *_fixed_options(), *interpreter_words("-c", "print(6 * 7)")]
    try:
        probe = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"a trivial program in bubblewrap did not end within {PROBE_TIMEOUT_S:g} s."
    if probe.returncode == 0 and probe.stdout == b"42\n":
        return None
    said = probe.stderr.decode("utf-8", "replace").strip() or f"exit code {probe.returncode}"
    return (
        f"bubblewrap (0.7 or newer) cannot confine programs on this host: {said}. In a container, allow user namespaces "
        "(docker: --security-opt seccomp=unconfined, or --privileged)."
    )


def interpreter() -> str:
    """The Python below this process's virtual environment."""
    return f"{os.path.realpath(sys.base_prefix)}/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def _read_only_system() -> list[str]:
    """bwrap options that show /usr, its links in /, and the interpreter's prefix."""
    options = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("/bin", "/lib", "/lib64"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    prefix = os.path.realpath(sys.base_prefix)
    if not f"{prefix}/".startswith("/usr/"):
        options += ["--ro-bind", prefix, prefix]
    return options
