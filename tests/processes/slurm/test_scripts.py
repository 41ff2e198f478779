"""The scripts of launch/ and of CI, in the shell that runs them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "ctpo.sbatch", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)


def test_the_script_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for words, said in ((["--starst=3", "--", "c.yaml"], "--starst=3 is no option"), (["--"], "no configuration given")):
        done = subprocess.run([str(LAUNCH / "ctpo.sbatch"), *words], capture_output=True, text=True, timeout=10, check=False)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
