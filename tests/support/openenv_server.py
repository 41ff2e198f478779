"""A real OpenEnv server around a game of two steps: `python openenv_server.py PACKAGES PORT`.

PACKAGES is a folder that holds `openenv` alone. What its tools (MCP) need besides is left out, and no tool is used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _Absent(types.ModuleType):
    """A package that is imported and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def main(packages: str, port: int) -> None:
    """Serve until told to stop."""
    sys.path.append(packages)
    for name in ("fastmcp", "fastmcp.client", "fastmcp.client.client", "fastmcp.exceptions", "mcp", "mcp.types"):
        sys.modules[name] = _Absent(name)

    # by name: they are no requirement of this project
    types_, interfaces, http = (
        importlib.import_module(f"openenv.core.env_server.{name}") for name in ("types", "interfaces", "http_server")
    )

    class Say(types_.Action):
        message: str

    class Heard(types_.Observation):
        text: str = ""

    class Echo(interfaces.Environment):
        def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Heard:
            self.steps = 0
            return Heard(text=f"begin {seed}", done=False, reward=None)

        def step(self, action: Say, **_: Any) -> Heard:
            self.steps += 1
            return Heard(text=f"{self.steps}: {action.message}", done=self.steps >= 2, reward=0.5)

        @property
        def state(self) -> Any:
            return types_.State(episode_id="e", step_count=self.steps)

    uvicorn = importlib.import_module("uvicorn")
    uvicorn.run(http.create_fastapi_app(Echo, Say, Heard), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
