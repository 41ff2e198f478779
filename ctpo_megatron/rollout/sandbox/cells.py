"""What runs inside as the interpreter of a notebook: one program after the other, all in one `__main__`.

    python -c CELLS GO SOURCE REPLIES

A byte from GO, below 128: run the program that SOURCE holds. A byte to REPLIES: it ended; twice the byte from GO, and 1 more
where it ended by itself. Of one that did not, the traceback is on stderr. The last expression of a program is shown, as in a
notebook, if it is not None.
"""

import builtins
import os
import sys

TREE = 0x400  # compile to a syntax tree: `ast.PyCF_ONLY_AST`, without the time that importing ast takes
NAME = "<notebook>"


def serve(go, source, replies):
    """Run programs until nobody asks for more."""
    import _ast

    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.argv = [""]
    while asked := os.read(go, 1):
        ended_well = run(os.pread(source, os.fstat(source).st_size, 0), main.__dict__, _ast.Interactive)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            flush(name, descriptor)
        os.write(replies, bytes([2 * asked[0] + ended_well]))


def run(source, names, interactive):
    """Whether a program ended by itself."""
    try:
        tree = compile(source, NAME, "exec", TREE, dont_inherit=True)
        last = [tree.body.pop()] if tree.body and type(tree.body[-1]).__name__ == "Expr" else []
        exec(compile(tree, NAME, "exec", dont_inherit=True), names)
        exec(compile(interactive(last), NAME, "single", dont_inherit=True), names)
    except SystemExit as end:
        if end.code is None or end.code == 0:
            return True
        print(f"SystemExit: {end.code}" if isinstance(end.code, int) else end.code, file=sys.stderr)
        return False
    except BaseException:  # noqa: BLE001 - all that a program can end with is told, and the notebook goes on
        sys.excepthook(*sys.exc_info())
        return False
    return True


def flush(name, descriptor):
    """Bring out what was printed. What has no room any more is dropped, or it would come out with the next program's."""
    try:
        getattr(sys, name).flush()
    except (OSError, ValueError, AttributeError):  # too much, closed, or replaced by the program
        fresh = open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115 - it stays
        setattr(sys, name, fresh)
        setattr(sys, f"__{name}__", fresh)


serve(*map(int, sys.argv[1:]))
