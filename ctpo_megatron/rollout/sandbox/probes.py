"""What the escape test runs inside: harmless attempts at what must not succeed. One line of JSON says which did.

The program is this file with one more line, `attempt(**given)`. Nothing here goes beyond seeing that it would be possible: a file
that could be made is deleted, memory is not touched, a process ends at once.
"""

import json
import os
import socket

CHUNK = b"." * (1 << 20)


def network(port, abstract, path):
    """Reach listeners of the host, over TCP and as Unix sockets, or see its interfaces."""
    for family, address in ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_UNIX, "\0" + abstract), (socket.AF_UNIX, path)):
        with socket.socket(family) as one:
            one.settimeout(2)
            if refused(one.connect, address) is None:
                yield f"a connection to {address!r} of the host"
    if more := [name for _, name in socket.if_nameindex() if name != "lo"]:
        yield f"interfaces {', '.join(more)}"


def processes():
    """See processes of the host, or have rights that could touch them."""
    if others := [each for each in os.listdir("/proc") if each.isdigit() and int(each) != os.getpid()]:
        yield f"{len(others)} other processes"
    if os.getppid() != 0:
        yield "a parent"
    with open("/proc/self/status") as status:
        rights = next(line.split()[1] for line in status if line.startswith("CapEff"))
    if int(rights, 16):
        yield f"capabilities {rights}"


def environment():
    """Find variables of the host."""
    if names := sorted(set(os.environ) - {"LC_CTYPE", "PWD"}):
        yield f"variables, such as {names[0]}"


def files(secret, prefix):
    """Read or make files of the host, change settings of its kernel, or use descriptors of the process that runs this."""
    if refused(open, secret) is None:
        yield f"{secret} read"
    for folder in ("/", "/usr", "/etc", "/dev", "/dev/shm", "/var/tmp", prefix, os.path.dirname(secret)):
        path = os.path.join(folder, f"ctpo-probe-{os.path.basename(secret)}")
        if refused(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) is None:
            os.unlink(path)
            yield f"a file made in {folder}"
    if refused(os.open, "/proc/sys/kernel/hostname", os.O_WRONLY) is None:
        yield "a setting of the kernel opened for writing"
    if more := [each for each in before if each > 2 and os.path.exists(f"/proc/self/fd/{each}")]:
        yield f"{len(more)} inherited descriptors"


def forks():
    """Begin a process or a thread."""
    import _thread

    try:
        child = os.fork()
    except OSError:
        pass
    else:
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        yield "a process forked"
    if refused(_thread.start_new_thread, int, ()) is None:
        yield "a thread begun"


def memory(memory_bytes):
    """Be given all memory that a program may have, besides the interpreter; it is not touched."""
    if refused(bytearray, memory_bytes) is None:
        yield f"{memory_bytes >> 20} MiB allocated"


def disk(file_bytes):
    """Write more than a program may, in one file and in several."""
    for name, sizes in (("one", [2 * file_bytes]), ("several", [file_bytes // 2] * 4)):
        written = 0
        for number, size in enumerate(sizes):
            with open(f"probe-{number}", "wb", buffering=0) as out:
                while (room := size - out.tell()) > 0 and refused(out.write, CHUNK[:room]) is None:
                    pass
                written += out.tell()
        for number in range(len(sizes)):
            os.unlink(f"probe-{number}")
        if written > file_bytes:
            yield f"{written} bytes written in {name}"


def time():
    """Have no bound on CPU time."""
    import resource

    if resource.getrlimit(resource.RLIMIT_CPU)[1] == resource.RLIM_INFINITY:
        yield "CPU time without a limit"


def refused(function, *arguments):
    """The error that `function` ends with; None: it succeeded."""
    try:
        function(*arguments)
    except (OSError, RuntimeError, MemoryError) as error:
        return error
    return None


def tried(what):
    """All that an attempt found; that it could not be made counts as a find."""
    try:
        return list(what)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other attempts are to be made
        return [f"not tried: {type(error).__name__}: {error}"]


def attempt(port, abstract, path, secret, prefix, memory_bytes, file_bytes):
    """Say what succeeded, then write more than may be written."""
    made = {"network": network(port, abstract, path), "processes": processes(), "environment": environment(),
            "files": files(secret, prefix), "forks": forks(), "memory": memory(memory_bytes), "disk": disk(file_bytes),
            "time": time()}  # fmt: skip
    os.write(1, json.dumps({case: tried(what) for case, what in made.items()}).encode() + b"\n")
    for stream in (1, 2):
        for _ in range(2 * file_bytes // len(CHUNK)):
            if refused(os.write, stream, CHUNK) is not None:
                break


before = [int(each) for each in os.listdir("/proc/self/fd")]
