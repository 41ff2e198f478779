"""Writes requirements.lock: every package of this environment at its exact version, without the project itself.

.venv/bin/python tools/lock.py            after upgrading packages in a working environment
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
LEFT_OUT = {"ctpo-megatron", "pip", "uv"}  # the project, and what installs it
HEAD = "# Every package of a working environment, at the versions the tests pass with. Written by tools/lock.py.\n"


def normalize(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Write the file."""
    found = {normalize(dist.metadata["Name"]): dist.version for dist in metadata.distributions()}
    lines = [f"{name}=={version}" for name, version in sorted(found.items()) if name not in LEFT_OUT]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
