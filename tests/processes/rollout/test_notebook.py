"""Notebooks: what they keep, how they are lost and made again, and that they are as confined as single programs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil
import pytest
from leftovers import living

from ctpo_megatron.config.tools import NotebookTool
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.record.heartbeat import Depths
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.counted import CountedTool
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.rollout.protocols import PastCall, Sampling, ToolResult
from ctpo_megatron.rollout.sandbox import MIB, Notebooks, sandbox_available
from ctpo_megatron.rollout.sandbox.notebook import ANEW, NotebookSession
from ctpo_megatron.rollout.tools import make_tool, opened
from ctpo_megatron.types import Trajectory
from tests.support.trajectories import ATTEMPT
from tests.unit.rollout.test_environment import PROMPT, Boxes, Letters, Script

pytestmark = pytest.mark.skipif(sandbox_available() is not None, reason=str(sandbox_available()))
MEMORY_MB = 600 + os.getpid() % 400  # tells the notebooks of this test process from those of others


def said(*programs: str, past: Sequence[PastCall] = (), **options: object) -> list[ToolResult]:
    """What one notebook says to these programs."""

    async def run() -> list[ToolResult]:
        async with Notebooks(NotebookTool(**options)).session(past) as notebook:
            return [await notebook.run(each) for each in programs]

    return asyncio.run(run())


def interpreters() -> dict[int, str]:
    """The confined interpreters of this test process, and the state that each is in: T for stopped."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                if "python" in name and rest.split()[0] != "Z" and str(MEMORY_MB * MIB) in (entry / "limits").read_text():
                    found[int(entry.name)] = rest.split()[0]
            except OSError:
                continue
    return found


def in_notebook(play: Callable[[NotebookSession], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        async with Notebooks(NotebookTool(memory_mb=MEMORY_MB, **options)).session() as notebook:
            await play(notebook)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert_none_left()


def assert_none_left() -> None:
    deadline = time.monotonic() + 5  # the kernel takes a moment to clear a killed namespace
    while (left := interpreters()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == {}


def test_programs_see_what_earlier_ones_made_and_show_their_last_expression() -> None:
    results = said(
        "x = 3", "x * 14", "def twice(n):\n    return 2 * n", "print('so far')\ntwice(x)", "None", "for i in range(3): i",
        "open('kept', 'w').write('1')", "open('kept').read()", "__name__, _ if False else 0",
        "import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))).__name__",
    )  # fmt: skip
    assert [each.output for each in results] == ["", "42", "", "so far\n6", "", "", "1", "'1'", "('__main__', 0)", "'A'"]
    assert all(each.ok for each in results)


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("print('so far')\n1/0", "so far\nZeroDivisionError: division by zero"),
        ("x =", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
        ("import sys; sys.exit('no')", "no"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError: EOF when reading a line"),
        ("x = bytearray(300 << 20)", "MemoryError"),
        ("import os; os.fork()", "PermissionError: [Errno 1] Operation not permitted"),
        ("open('/usr/x', 'w')", "OSError: [Errno 30] Read-only file system: '/usr/x'"),
    ],
)
def test_a_program_that_fails_leaves_the_notebook_as_it_is(program: str, output: str) -> None:
    _, failed, after = said("kept = 5", program, "kept", memory_mb=200)
    assert (failed.ok, failed.output) == (False, output)
    assert (after.ok, after.output) == (True, "5")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print('so far')\nwhile True: pass", "TimeoutError: no end within 0.5 s"),
        ("import os; os._exit(3)", "SystemExit: 3"),
        ("import ctypes; ctypes.string_at(0)", "Killed: SIGSEGV"),
        (
            "import os, time\nfor each in range(3, 64):\n    try: os.close(each)\n    except OSError: pass\ntime.sleep(9)",
            "closed",
        ),
    ],
)
def test_a_notebook_that_is_lost_begins_anew_and_the_model_is_told(program: str, why: str) -> None:
    _, lost, after, new, kept = said("kept = 5", program, "kept", "kept = 6", "kept", timeout_s=0.5)
    assert not lost.ok
    assert why in lost.output
    assert lost.output.endswith(ANEW)
    assert after.output == "NameError: name 'kept' is not defined"
    assert (new.ok, kept.output) == (True, "6")


@pytest.mark.parametrize("length", [99, 9999])
def test_too_much_output_is_cut_and_does_not_come_out_later(length: int) -> None:
    """Of short lines some are in a buffer when there is no room left, of long ones none."""
    flood, error, after = said(
        f"while True: print('x' * {length})", "import sys\nwhile True: sys.stderr.write('y' * 9999)", "print(7)", timeout_s=60
    )
    assert not flood.ok
    assert "characters cut" in flood.output
    assert flood.output.endswith("File too large")
    assert not error.ok
    assert len(error.output) <= 256
    assert (after.ok, after.output) == (True, "7")


def test_what_a_program_pretends_to_the_notebook_reaches_no_other_program() -> None:
    """It can write to the pipe of replies, and go on for a while: the program after it is waited for nevertheless."""
    pretend = "import os, time\nfor fd in range(3, 64):\n    try: os.write(fd, bytes([3]) * 9)\n    except OSError: pass\n"
    pretend += "time.sleep(0.2)"
    *_, after, last = said(pretend, "import time\ntime.sleep(0.3)\nprint('whole')", "1 + 1")
    assert (after.output, last.output) == ("whole", "2")


def test_descriptors_beyond_the_limit_on_open_files_are_passed() -> None:
    """A driver with many connections has only high numbers left."""
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(150)]
    try:
        assert [each.output for each in said("x = 1", "x")] == ["", "1"]
    finally:
        for each in taken:
            os.close(each)


def test_between_programs_a_notebook_stands_still() -> None:
    async def play(notebook: NotebookSession) -> None:
        await notebook.run("import signal\nhits = []\nsignal.signal(signal.SIGALRM, lambda *_: hits.append(1))")
        await notebook.run("signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)")
        (pid,) = interpreters()
        deadline = time.monotonic() + 20
        while interpreters()[pid] != "T" and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert interpreters()[pid] == "T"
        assert (await notebook.run("signal.setitimer(signal.ITIMER_REAL, 0)\nlen(hits) < 5")).output == "True"

    in_notebook(play)


def test_a_notebook_ends_with_its_attempt_however_that_ends() -> None:
    async def cancelled(delay: float) -> None:
        tool = Notebooks(NotebookTool(memory_mb=MEMORY_MB))

        async def attempt() -> None:
            async with tool.session() as notebook:
                await notebook.run("x = 1")
                await notebook.run("while True: pass")

        task = asyncio.ensure_future(attempt())
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    for delay in (0.0, 0.003, 0.01, 0.03, 0.1):
        asyncio.run(cancelled(delay))
    assert_none_left()

    async def fails(notebook: NotebookSession) -> None:
        await notebook.run("x = 1")
        raise RuntimeError("the attempt")

    with pytest.raises(RuntimeError, match="the attempt"):
        in_notebook(fails)
    assert_none_left()


def test_notebooks_die_with_the_process_that_has_them() -> None:
    """Those that stand still, and one that runs a program."""
    program = (
        "import asyncio\n"
        "from ctpo_megatron.config.tools import NotebookTool\nfrom ctpo_megatron.rollout.sandbox import Notebooks\n"
        "async def play():\n"
        f"    tool = Notebooks(NotebookTool(memory_mb={MEMORY_MB}, timeout_s=60))\n"
        "    async with tool.session() as one, tool.session() as other:\n"
        "        await one.run('x = 1')\n        print('ready', flush=True)\n        await other.run('while True: pass')\n"
        "asyncio.run(play())"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while sorted(interpreters().values()) != ["R", "T"] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sorted(interpreters().values()) == ["R", "T"]
    finally:
        parent.kill()
        parent.wait()
    assert_none_left()


def test_an_attempt_that_goes_on_finds_its_notebook_as_it_was() -> None:
    past = [PastCall("x = 3", ""), PastCall("1/0", "ZeroDivisionError: division by zero"), PastCall("x += 1\nx", "4")]
    (result,) = said("x", past=past)
    assert result.output == "4"
    lost = PastCall("import os; os._exit(1)", f"SystemExit: 1\n{ANEW}")
    (result,) = said("x", past=[*past, lost, PastCall("x = 9", "")])
    assert result.output == "9"


def test_a_notebook_that_cannot_be_made_again_begins_anew_and_the_model_is_told() -> None:
    past = [PastCall("x = 3", ""), PastCall("import os\nos.urandom(9)", "b'something else'")]
    first, second = said("x", "print('on')", past=past)
    assert first.output == f"{ANEW}\nNameError: name 'x' is not defined"
    assert (second.ok, second.output) == (True, "on")


def test_a_cancelled_program_is_not_part_of_the_notebook() -> None:
    """Whoever goes on with the session finds what was defined before it."""

    async def play(notebook: NotebookSession) -> None:
        await notebook.run("x = 1")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(notebook.run("x = 2\nwhile True: pass"), 0.3)
        assert (await notebook.run("x")).output == "1"

    in_notebook(play)


def test_bubblewrap_that_is_killed_is_no_fault_of_the_model() -> None:
    async def play(notebook: NotebookSession) -> None:
        await notebook.run("x = 1")
        interpreter = notebook._interpreter
        assert interpreter is not None
        bubblewrap = psutil.Process(interpreter._process.pid)
        family = [bubblewrap, *bubblewrap.children(recursive=True)]
        bubblewrap.kill()
        assert living(family) == []  # the interpreter can still answer until it has heard of it
        with pytest.raises(RolloutError, match="killed by signal 9"):
            await notebook.run("x")
        assert (await notebook.run("x")).output == "1"

    in_notebook(play)


def test_the_configured_tool_is_a_notebook_for_each_attempt() -> None:
    async def two() -> list[str]:
        tool = make_tool(NotebookTool())
        assert tool is not None
        async with opened(tool, ()) as one, opened(tool, ()) as other:
            await one.run("x = 1")
            return [(await each.run("x")).output for each in (one, other, tool)]

    assert asyncio.run(two()) == ["1", *["NameError: name 'x' is not defined"] * 2]


def test_an_attempt_from_the_journal_finds_its_notebook_in_another_process(tmp_path: Path) -> None:
    """One environment plays its first call and is interrupted; another, with what the journal kept, plays the rest."""

    class Interrupted(Script):
        async def generate(self, input_ids, done, **options):
            if len(self.seen) == 1:
                raise asyncio.CancelledError
            return await super().generate(input_ids, done, **options)

    def environment(engine: Script) -> ToolEnvironment:
        return ToolEnvironment(engine, Letters(), CountedTool(Notebooks(NotebookTool()), Depths()), Boxes())

    async def first() -> None:
        journal = Journal(tmp_path, "r")
        journal.published(1, "weights")
        begun = environment(Interrupted(["```python\nx = 7\n```"]))
        with pytest.raises(asyncio.CancelledError):
            await begun.run(begun.begin(PROMPT, ATTEMPT), PROMPT, 0, sampling, journal.note)
        journal.close()

    async def rest() -> Trajectory:
        journal = Journal(tmp_path, "r", step=2)
        going_on = environment(Script(["```python\nprint(8 * x)\n```", "\\boxed{56}"]))
        kept = await journal.find(ATTEMPT, PROMPT, going_on.begin(PROMPT, ATTEMPT).prompt_ids)
        assert isinstance(kept, Attempt)
        return await going_on.run(kept, PROMPT, 0, sampling, journal.note)

    sampling = Sampling(1.0, 5, 1000)
    asyncio.run(first())
    made = asyncio.run(rest())
    assert (made.reward, made.tool_calls, made.tool_errors) == (1.0, 2, 0)
    assert "{56}" in made.text
    assert_none_left()
